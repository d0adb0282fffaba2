"""A game under load: players send real jobs through a real runner, and a ledger proves what became of each.

    make stress
    make stress ARGS="--jobs 500 --workers 12 --duration 60"

Read on in game.py, where the jobs are. command.py runs them, ledger.py keeps the evidence in the same database,
arena.py lends a schema for the time being, and display.py draws.
"""
