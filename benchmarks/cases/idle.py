"""A runner that has nothing to do: how soon it starts a job, and what it costs meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.backlog import QUEUE, Backlog
from benchmarks.case import Case, Side, Sizes, Values
from benchmarks.measure import Runners, percentile, started
from benchmarks.server import Database

_ENQUEUER = "benchmarks.programs.enqueuer"

# Long enough for a runner to be idle again; uneven, so that no rhythm of its own can fall in with it.
_PAUSE_MS = (60, 100)

# The first jobs find a runner that is still getting up.
_WARM_UP = 5

# Until the start of a runner is over, and its sessions have told the server's statistics of it.
_SETTLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds from the call that enqueues a job, in another process, to the job's first line."""

    name: str
    title: str
    jobs: int

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        """greenjobs, and the bare loop woken by a NOTIFY with each INSERT."""

        def measured(database: Database, module: str, side: str) -> Values:
            return latencies(
                database,
                Runners(module),
                enqueuer=_ENQUEUER,
                order={
                    "database_url": database.url,
                    "side": side,
                    "mode": "paced",
                    "concurrency": 1,
                    "payload_bytes": 0,
                },
                jobs=sizes.of(self.jobs, at_least=10),
            )

        def greenjobs(database: Database) -> Values:
            Backlog(0).fill(database)
            return measured(database, "benchmarks.programs.runner", "greenjobs")

        def bare(database: Database) -> Values:
            Backlog(0).fill_bare(database)
            return measured(database, "benchmarks.programs.bare", "raw")

        return [Side("greenjobs", greenjobs), Side("bare gevent loop", bare, migrated=False)]


def latencies(
    database: Database,
    runners: Runners,
    *,
    enqueuer: str,
    order: Mapping[str, Any],
    jobs: int,
    python: str = sys.executable,
) -> Values:
    """Have one program enqueue stamps now and then, and others run them; milliseconds in between."""
    stamps = _WARM_UP + jobs
    order = {**order, "jobs": stamps, "pause_ms": _PAUSE_MS}
    with runners.started(database) as running, started(enqueuer, order, python=python) as (sender,):
        running.go()
        sender.go()
        sender.report()
        running.wait_until_done(stamps)
        measured = running.stop().latencies_ms[_WARM_UP:]
    return {"p50_ms": percentile(measured, 0.50), "p99_ms": percentile(measured, 0.99)}


@dataclass(frozen=True, slots=True)
class Idle:
    """What a runner that finds nothing costs itself and the server."""

    name: str
    title: str
    queues: int
    poll_interval: float
    seconds: float

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        """greenjobs alone: who waits for NOTIFY and never looks costs nothing, and misses what it was not told."""
        seconds = max(self.seconds * sizes.scale, self.poll_interval)
        queues = [f"{QUEUE}_{number}" for number in range(self.queues)]

        def greenjobs(database: Database) -> Values:
            Backlog(0).fill(database)
            runners = Runners("benchmarks.programs.runner", queues=queues, poll_interval=self.poll_interval)
            with runners.started(database) as running:
                running.go()
                time.sleep(_SETTLE_SECONDS)
                before = database.server.transactions_in(database.name)
                running.programs[0].mark()
                time.sleep(seconds)
                after = database.server.transactions_in(database.name)
                report = running.stop()
            return {
                "queries_per_second": (after - before) / seconds,
                "cpu_percent": report.cpu_seconds / report.seconds * 100,
            }

        return [Side("greenjobs", greenjobs)]


CASES: Sequence[Case] = (
    Latency("latency", "latency, idle runner", jobs=150),
    Idle("idle", "idle runner, 10 queues, poll 1 s", queues=10, poll_interval=1.0, seconds=10.0),
)
