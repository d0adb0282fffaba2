"""Enqueuing: through greenjobs, and by the plain INSERT into the same table that wakes nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.backlog import Backlog
from benchmarks.case import Case, Side, Sizes, Values
from benchmarks.measure import enqueue
from benchmarks.server import Database

_TABLE = "background_jobs"
_ENQUEUER = "benchmarks.programs.enqueuer"


@dataclass(frozen=True, slots=True)
class Enqueue:
    """Jobs enqueued per second. `mode` is one of programs/enqueuer.py."""

    name: str
    title: str
    mode: str
    jobs: int
    concurrency: int = 1
    payload_bytes: int = 0

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        """greenjobs and the raw INSERT, on the same number of connections."""
        jobs = sizes.of(self.jobs, at_least=self.concurrency)

        def side(name: str, program_side: str) -> Side:
            def measure(database: Database) -> Values:
                Backlog(0).fill(database)
                order = {
                    "side": program_side,
                    "mode": self.mode,
                    "jobs": jobs,
                    "concurrency": self.concurrency,
                    "payload_bytes": self.payload_bytes,
                }
                return {"rate": enqueue(database, order, module=_ENQUEUER, table=_TABLE)}

            return Side(name, measure)

        return [side("greenjobs", "greenjobs"), side("raw INSERT", "raw")]


CASES: Sequence[Case] = (
    Enqueue("enqueue_one", "enqueue, one after the other", mode="one", jobs=5_000),
    Enqueue("enqueue_concurrent", "enqueue, 50 callers at a time", mode="concurrent", jobs=20_000, concurrency=50),
    Enqueue("enqueue_bulk", "enqueue in bulk", mode="several", jobs=200_000),
    Enqueue("enqueue_10kb", "enqueue 10 kB, one after the other", mode="one", jobs=2_000, payload_bytes=10_000),
)
