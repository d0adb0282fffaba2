"""Draining: how fast jobs that wait are run, in all the surroundings that make a queue slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.backlog import Backlog
from benchmarks.case import Case, Side, Sizes, Values
from benchmarks.measure import Report, Runners, drain
from benchmarks.server import Database

POOL = 50

# What the bare loop is fastest with on two cores; it knows no jobs that are slow or more important.
BARE_READ_AHEAD = 500

_GREENJOBS = Runners("benchmarks.programs.runner", pool=POOL)
_BARE = Runners("benchmarks.programs.bare", pool=POOL, read_ahead=BARE_READ_AHEAD)
_RAW = Runners("benchmarks.programs.raw")


def greenjobs_side(backlog: Backlog, *, name: str = "greenjobs", processes: int = 1) -> Side:
    """greenjobs with this backlog, all of which it drains."""

    def measure(database: Database) -> Values:
        backlog.fill(database)
        runners = replace(_GREENJOBS, processes=processes)
        return _speed(drain(database, runners, table="background_jobs", jobs=backlog.jobs))

    return Side(name, measure)


def bare_side(backlog: Backlog, *, name: str = "bare gevent loop", processes: int = 1) -> Side:
    """The bare loop with the same jobs in its own table."""

    def measure(database: Database) -> Values:
        backlog.fill_bare(database)
        return _speed(drain(database, replace(_BARE, processes=processes), table="bare_jobs", jobs=backlog.jobs))

    return Side(name, measure, migrated=False)


def raw_side(backlog: Backlog, *, name: str = "raw SQL") -> Side:
    """What PostgreSQL does on one connection when nobody runs the jobs."""

    def measure(database: Database) -> Values:
        backlog.fill_bare(database)
        return {"rate": drain(database, _RAW, table="bare_jobs", jobs=backlog.jobs).rate}

    return Side(name, measure, migrated=False)


@dataclass(frozen=True, slots=True)
class Drain:
    """Jobs run per second, beside the bare loop and the raw limit with the same jobs."""

    name: str
    title: str
    backlog: Backlog
    processes: int = 1

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        """greenjobs, the bare loop and raw SQL; and greenjobs in one process, where there are several."""
        backlog = _scaled(self.backlog, sizes)
        sides = [greenjobs_side(backlog, processes=self.processes), bare_side(backlog, processes=self.processes)]
        if self.processes > 1:
            sides.append(greenjobs_side(backlog, name="greenjobs, one process"))
        # The raw limit claims in the order of ids.
        return [*sides, raw_side(replace(backlog, mixed_priorities=False))]


@dataclass(frozen=True, slots=True)
class DrainUnderScheduled:
    """Jobs run per second while very many others are not due, beside the same without them."""

    name: str
    title: str
    backlog: Backlog

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        """greenjobs with and without the scheduled jobs, and the raw limit without."""
        backlog = _scaled(self.backlog, sizes)
        plain = replace(backlog, scheduled=0)
        return [greenjobs_side(backlog), greenjobs_side(plain, name="greenjobs, nothing scheduled"), raw_side(plain)]


@dataclass(frozen=True, slots=True)
class DrainUnderSnapshot:
    """Jobs run per second, at the beginning and at the end, while another session keeps vacuum away."""

    name: str
    title: str
    backlog: Backlog

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        """greenjobs, and the raw limit that passes the dead rows over."""
        backlog = _scaled(self.backlog, sizes)

        def greenjobs(database: Database) -> Values:
            backlog.fill(database)
            with database.held_snapshot("background_jobs"):
                report = drain(database, _GREENJOBS, table="background_jobs", jobs=backlog.jobs, marks=10)
            return {**_speed(report), **_tenths(report)}

        def raw(database: Database) -> Values:
            backlog.fill_bare(database)
            with database.held_snapshot("bare_jobs"):
                report = drain(database, _RAW, table="bare_jobs", jobs=backlog.jobs, marks=10)
            return {"rate": report.rate}

        return [Side("greenjobs", greenjobs), Side("raw SQL", raw, migrated=False)]


@dataclass(frozen=True, slots=True)
class DrainOfMany:
    """Jobs run per second, the first of very many that wait, beside as many that are all there is."""

    name: str
    title: str
    waiting: int
    jobs: int

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        """greenjobs with the many and with the few, and the raw limit with the few."""
        few = Backlog(sizes.of(self.jobs, at_least=200))
        many = Backlog(max(sizes.of(self.waiting), 2 * few.jobs))
        filled = set[str]()

        def first_of_many(database: Database) -> Values:
            # Filling takes a minute: the rounds after the first go on where the one before stopped.
            if database.name not in filled or database.count("background_jobs") < 2 * few.jobs:
                many.fill(database)
                filled.add(database.name)
            database.settle("background_jobs")
            report = drain(database, _GREENJOBS, table="background_jobs", jobs=few.jobs, is_whole=False)
            return _speed(report)

        return [
            Side("greenjobs", first_of_many),
            greenjobs_side(few, name="greenjobs, nothing else waiting"),
            raw_side(few),
        ]


def _scaled(backlog: Backlog, sizes: Sizes) -> Backlog:
    return replace(
        backlog, jobs=sizes.of(backlog.jobs, at_least=200), scheduled=sizes.of(backlog.scheduled, at_least=0)
    )


def _speed(report: Report) -> Values:
    return {"rate": report.rate, "cpu_us": report.cpu_us}


def _tenths(report: Report) -> Values:
    tenths = [report.first_at, *report.marks]
    return {"last_to_first_tenth": (tenths[1] - tenths[0]) / (tenths[-1] - tenths[-2])}


CASES: Sequence[Case] = (
    Drain("drain", "drain, one process, 50 at a time", Backlog(100_000)),
    Drain("drain_two_processes", "drain, two processes", Backlog(200_000), processes=2),
    Drain("drain_mixed_priorities", "drain, five priorities mixed", Backlog(100_000, mixed_priorities=True)),
    Drain("drain_10kb", "drain, payloads of 10 kB", Backlog(20_000, payload_bytes=10_000)),
    DrainUnderSnapshot("drain_under_snapshot", "drain of 200,000 while a snapshot is held", Backlog(200_000)),
    DrainUnderScheduled(
        "drain_under_scheduled",
        "drain, 1,000,000 scheduled before",
        Backlog(100_000, scheduled=1_000_000, scheduled_first=True),
    ),
    DrainUnderScheduled(
        "drain_before_scheduled",
        "drain, 1,000,000 scheduled after",
        Backlog(100_000, scheduled=1_000_000, scheduled_first=False),
    ),
    DrainOfMany("drain_of_many", "drain, 5,000,000 waiting", waiting=5_000_000, jobs=100_000),
)
