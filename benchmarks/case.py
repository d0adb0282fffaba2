"""What a case is, how its sides take turns, and what becomes of the values.

The machine may be busy with other things. So the sides of a case take turns within each round, the figure of a side is
the median of its rounds, and a ratio is the median of the rounds' ratios: what slows a whole round down cancels out.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.server import Database, Server

Values = Mapping[str, float]
"""What one round of one side gave, by metric."""


class BenchmarkFailed(Exception):
    """A measurement that is none: a program failed, or did not do the work that its figure would stand for."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number means. `digits` behind the point are shown."""

    unit: str
    digits: int = 0


METRICS: Mapping[str, Metric] = {
    "rate": Metric("jobs/s"),
    "cpu_us": Metric("µs of CPU per job", 1),
    "last_to_first_tenth": Metric("last tenth / first tenth", 2),
    "p50_ms": Metric("ms, p50", 2),
    "p99_ms": Metric("ms, p99", 2),
    "of_ideal": Metric("× ideal time", 3),
    "rss_mb": Metric("MB peak RSS"),
    "connections": Metric("connections"),
    "kb_per_greenlet": Metric("kB per waiting job", 1),
    "queries_per_second": Metric("queries/s", 1),
    "cpu_percent": Metric("% CPU", 2),
}


@dataclass(frozen=True, slots=True)
class Side:
    """One of the things that a case compares; `measure` does one round of it, in the side's own database.

    `migrated`: whether the database has greenjobs' tables.
    """

    name: str
    measure: Callable[[Database], Values]
    migrated: bool = True


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything: numbers of jobs are scaled, what makes a case what it is stays."""

    scale: float = 1.0

    def of(self, full: int, *, at_least: int = 1) -> int:
        """The number at this scale."""
        return max(round(full * self.scale), at_least)


class Case(Protocol):
    """A question, asked of several sides. The first side is the one it is about; the others are what it may reach."""

    @property
    def name(self) -> str:
        """How the command line calls it."""

    @property
    def title(self) -> str:
        """How a person would ask."""

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        """Who takes part."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One value: one metric of one side in one round."""

    case: str
    side: str
    round: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class Figure:
    """The median over the rounds; `ratio` is the first side's value by this one's, None on the first side itself."""

    case: str
    side: str
    metric: str
    value: float
    ratio: float | None


def measure(
    case: Case,
    server: Server,
    *,
    sizes: Sizes,
    rounds: int,
    on_side: Callable[[str, int], None],
    on_failure: Callable[[str, BenchmarkFailed], None],
) -> list[Measurement]:
    """Let the sides take turns; each has a database of its own, which it keeps from round to round.

    A side that fails has no figure, and the others go on without it; without the first one there is no case.
    """
    measurements: dict[str, list[Measurement]] = {}
    with contextlib.ExitStack() as stack:
        sides = [(side, stack.enter_context(server.database(migrated=side.migrated))) for side in case.sides(sizes)]
        subject, _ = sides[0]
        for round in range(1, rounds + 1):
            for side, database in sides.copy():
                on_side(side.name, round)
                try:
                    values = side.measure(database)
                except BenchmarkFailed as error:
                    on_failure(side.name, error)
                    if side is subject:
                        return []
                    sides.remove((side, database))
                    measurements.pop(side.name, None)
                    continue
                measurements.setdefault(side.name, []).extend(
                    Measurement(case.name, side.name, round, metric, value) for metric, value in values.items()
                )
    return [each for of_side in measurements.values() for each in of_side]


def figures(measurements: Sequence[Measurement]) -> list[Figure]:
    """Medians, and medians of the ratios, in the order in which the values came."""
    by_round: dict[tuple[str, str, str], dict[int, float]] = {}
    subjects: dict[str, str] = {}
    for each in measurements:
        subjects.setdefault(each.case, each.side)
        by_round.setdefault((each.case, each.side, each.metric), {})[each.round] = each.value
    return [
        Figure(*key, statistics.median(values.values()), _ratio(by_round, subjects[key[0]], *key))
        for key, values in by_round.items()
    ]


def _ratio(
    by_round: Mapping[tuple[str, str, str], Mapping[int, float]], subject: str, case: str, side: str, metric: str
) -> float | None:
    own = by_round.get((case, subject, metric), {})
    ratios = [own[round] / value for round, value in by_round[case, side, metric].items() if round in own and value]
    return statistics.median(ratios) if ratios and side != subject else None


def shown(metric: str, value: float) -> str:
    """The value for people, without its unit."""
    return f"{value:,.{METRICS[metric].digits}f}"


def as_record(measurement: Measurement, **more: Any) -> dict[str, Any]:
    """The measurement as it stands in the JSON lines."""
    return {
        "case": measurement.case,
        "side": measurement.side,
        "round": measurement.round,
        "metric": measurement.metric,
        "value": measurement.value,
        "unit": METRICS[measurement.metric].unit,
        **more,
    }
