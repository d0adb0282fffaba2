"""What the jobs do; the same functions in greenjobs, in the bare loop, and in the peers."""

from __future__ import annotations

import time

from benchmarks.programs.tally import tally

RECIPIENT = "someone@example.com"


def noop(n: int, to: str) -> None:
    """Nothing but being counted: what remains is the price of the queue."""
    tally.begin()
    tally.count()


def stamp(sent_ns: int) -> None:
    """Note how long ago the job was enqueued, by a clock that the enqueuing process shares."""
    tally.latencies_ns.append(time.monotonic_ns() - sent_ns)
    tally.begin()
    tally.count()


def sleep(seconds: float) -> None:
    """Wait, as a job does that calls a slow service."""
    tally.begin()
    time.sleep(seconds)
    tally.count()
