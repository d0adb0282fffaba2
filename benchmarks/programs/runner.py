"""The product: one Runner, as `greenjobs run` starts it, that stops when the harness says so.

Its report comes after the runner has ended: every acknowledgement is in the database then.
"""

from __future__ import annotations

from greenjobs import green

green.patch()

import logging  # noqa: E402

import gevent  # noqa: E402

from benchmarks.programs import jobs, protocol  # noqa: E402
from benchmarks.programs.tally import tally  # noqa: E402
from greenjobs.config import configure  # noqa: E402
from greenjobs.runner import Runner  # noqa: E402


def main() -> None:
    """Run jobs from `go` to `stop`."""
    order = protocol.receive_order()
    tally.open(order["tally"], mark_every=order["mark_every"])
    logging.basicConfig(level=logging.INFO)
    configure(database_url=order["database_url"])
    runner = Runner().register(*jobs.JOBS.values())
    for queue in order["queues"]:
        runner.configure_queue(queue, pool=order["pool"], poll_interval=order["poll_interval"])
    if order["job_connections"]:
        jobs.open_connections(order["database_url"], order["job_connections"])
    protocol.wait_for_go()
    handle = runner.start()
    # In a native thread, which costs the event loop nothing while it waits.
    while gevent.get_hub().threadpool.apply(protocol.next_command) == protocol.MARK:
        tally.begin()
    handle.shutdown()
    handle.wait_for_shutdown()
    protocol.send_report(tally.report())


if __name__ == "__main__":
    main()
