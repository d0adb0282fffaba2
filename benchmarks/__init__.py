"""How fast greenjobs is, beside what PostgreSQL itself could do on the same machine in the same minute.

`python -m benchmarks --help` says how to run it. The rooms, from top to bottom:

    __main__.py   arguments, the order of things
    report.py, picture.py, machine.py    what comes out
    targets.py    what is to be reached
    peers/        other job queues, measured the same way
    cases/        what is compared with what, a module for each group of cases
    measure.py    one measurement, with programs in processes of their own
    case.py       Case, Side, rounds, medians and ratios
    server.py, backlog.py    databases, and jobs that wait in them
    programs/     what is measured: each a process, which talks with the harness through programs/protocol.py
"""
