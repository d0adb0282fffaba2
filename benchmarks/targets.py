"""What is to be reached on a machine of two cores, and whether it was."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.case import METRICS, Figure, shown


@dataclass(frozen=True, slots=True)
class Target:
    """A bound for a figure of greenjobs, or, with `of`, for its ratio to the figure of that other side.

    `obstacle` is what holds the figure back where it is not reached.
    """

    case: str
    metric: str
    bound: float
    is_at_least: bool
    of: str = ""
    obstacle: str = ""

    def wanted(self) -> str:
        """The bound for people, such as `≥ 0.75 × raw INSERT`."""
        relation = "≥" if self.is_at_least else "≤"
        if self.of:
            return f"{relation} {self.bound:g} × {self.of}"
        return f"{relation} {self.bound:,g} {METRICS[self.metric].unit}"

    def judge(self, figures: Sequence[Figure]) -> Judgement | None:
        """What the figures say; None when the case was not run."""
        for figure in figures:
            is_meant = figure.side == self.of if self.of else figure.ratio is None
            if (figure.case, figure.metric) == (self.case, self.metric) and is_meant:
                value = figure.ratio if self.of else figure.value
                if value is None:
                    return None
                compare = operator.ge if self.is_at_least else operator.le
                text = f"{value:.2f} × {self.of}" if self.of else f"{shown(self.metric, value)}"
                return Judgement(self, text, compare(value, self.bound))
        return None


@dataclass(frozen=True, slots=True)
class Judgement:
    """A target, what was measured, and whether that reaches it."""

    target: Target
    measured: str
    is_reached: bool


def _at_least(case: str, metric: str, bound: float, *, of: str = "", obstacle: str = "") -> Target:
    return Target(case, metric, bound, True, of, obstacle)


def _at_most(case: str, metric: str, bound: float, *, obstacle: str = "") -> Target:
    return Target(case, metric, bound, False, obstacle=obstacle)


# What holds figures back that are not reached.
_TWO_CORES = "one runner and its PostgreSQL fill two cores nearly alone; what a job costs both is all there is to save"
_ONE = "a commit takes this disk less than 0.2 ms; beside that, 25 µs of Python for binding, encoding, a handle show"
_BULK = "the limit has its JSON encoded beforehand; binding, encoding and a handle for each job is what is left"
_WAKING = "idle virtual processors take their time to wake up, twice a job; see the bare loop, which waits alike"
_SPAWNING = "claims of 200 and as many greenlets start within the first milliseconds of each tenth of a second"


TARGETS: Sequence[Target] = (
    _at_least("drain", "rate", 45_000),
    _at_least("drain", "rate", 0.75, of="bare gevent loop"),
    _at_least("drain_two_processes", "rate", 1.5, of="greenjobs, one process", obstacle=_TWO_CORES),
    _at_most("drain", "cpu_us", 22),
    _at_least("enqueue_one", "rate", 0.9, of="raw INSERT", obstacle=_ONE),
    _at_least("enqueue_concurrent", "rate", 0.75, of="raw INSERT"),
    _at_least("enqueue_bulk", "rate", 0.75, of="raw INSERT", obstacle=_BULK),
    _at_least("drain_under_scheduled", "rate", 0.95, of="greenjobs, nothing scheduled"),
    _at_least("drain_before_scheduled", "rate", 0.95, of="greenjobs, nothing scheduled"),
    _at_least("drain_under_snapshot", "last_to_first_tenth", 0.9),
    _at_least("drain_of_many", "rate", 0.9, of="greenjobs, nothing else waiting"),
    _at_most("latency", "p50_ms", 1.8, obstacle=_WAKING),
    _at_most("latency", "p99_ms", 4, obstacle=_WAKING),
    _at_most("fan_out", "of_ideal", 1.06, obstacle=_SPAWNING),
    _at_most("db_jobs", "of_ideal", 1.10),
    _at_most("fan_out_5000", "rss_mb", 250),
    _at_most("fan_out_5000", "connections", 6),
    _at_most("idle", "cpu_percent", 1),
    _at_most("idle", "queries_per_second", 12),
)


def judge(figures: Sequence[Figure]) -> list[Judgement]:
    """All targets of the cases that were run."""
    return [judgement for target in TARGETS if (judgement := target.judge(figures)) is not None]
