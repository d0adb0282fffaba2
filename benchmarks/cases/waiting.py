"""Jobs that wait for something else: how well they overlap, and what each costs meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.backlog import Backlog
from benchmarks.case import Case, Side, Sizes, Values
from benchmarks.measure import Runners, drain
from benchmarks.server import Database


@dataclass(frozen=True, slots=True)
class Waiting:
    """The time that jobs of one duration take together, by the time that they would take if nothing else took any.

    `at_once` of them run at the same time. With `own_connections`, each waits for a statement on a connection of the
    jobs' own, of which there are as many.
    """

    name: str
    title: str
    jobs: int
    seconds: float
    at_once: int
    own_connections: bool = False

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        """greenjobs and the bare loop."""
        jobs = sizes.of(self.jobs, at_least=20)
        at_once = min(self.at_once, jobs)
        backlog = Backlog(jobs, job_type="query" if self.own_connections else "sleep", seconds=self.seconds)
        ideal_seconds = self.seconds * -(-jobs // at_once)

        def measured(database: Database, module: str, table: str) -> Values:
            connections = at_once if self.own_connections else 0
            runners = Runners(module, pool=at_once, job_connections=connections)
            report = drain(database, runners, table=table, jobs=jobs, watch_connections=True)
            return {
                "of_ideal": report.seconds / ideal_seconds,
                "rss_mb": report.peak_bytes / 1e6,
                "connections": report.connections - connections,
                "kb_per_greenlet": report.grown_bytes / 1e3 / at_once,
            }

        def greenjobs(database: Database) -> Values:
            backlog.fill(database)
            return measured(database, "benchmarks.programs.runner", "background_jobs")

        def bare(database: Database) -> Values:
            backlog.fill_bare(database)
            return measured(database, "benchmarks.programs.bare", "bare_jobs")

        return [Side("greenjobs", greenjobs), Side("bare gevent loop", bare, migrated=False)]


CASES: Sequence[Case] = (
    Waiting("fan_out", "2,000 × sleep 0.1 s, 200 at a time", jobs=2_000, seconds=0.1, at_once=200),
    Waiting(
        "db_jobs",
        "2,000 × one query of 10 ms, 20 at a time on connections of their own",
        jobs=2_000,
        seconds=0.01,
        at_once=20,
        own_connections=True,
    ),
    Waiting("memory", "2,000 jobs that wait at once", jobs=2_000, seconds=1.0, at_once=2_000),
    Waiting("fan_out_5000", "10,000 × sleep 1 s, 5,000 at a time", jobs=10_000, seconds=1.0, at_once=5_000),
)
