"""What a check finds: ok, warn, fail or skipped, what was seen, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check has to say. A remedy says what to do; one that is well needs none."""

    level: Level
    message: str
    remedy: str | None = None


def ok(message: str) -> Verdict:
    """All is well."""
    return Verdict("ok", message)


def warn(message: str, remedy: str) -> Verdict:
    """Jobs run, but worse than they could."""
    return Verdict("warn", message, remedy)


def fail(message: str, remedy: str | None = None) -> Verdict:
    """Jobs do not run, or not as promised."""
    return Verdict("fail", message, remedy)


def skipped(reason: str) -> Verdict:
    """It was not looked at."""
    return Verdict("skipped", reason)


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict of a check by its name; `area` is what was looked at: "process", "database" or "jobs"."""

    name: str
    area: str
    level: Level
    message: str
    remedy: str | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What is still well."""

    total_seconds: float = 30.0
    """The whole examination; what has not been looked at by then is skipped."""
    connect_seconds: float = 5.0
    clock_seconds: float = 1.0
    clock_failure_seconds: float = 60.0
    snapshot_seconds: float = 300.0
    """The oldest snapshot of the database: until it is gone, vacuum removes nothing that is younger."""
    snapshot_transactions: int = 1_000_000
    """The same, where nobody knows its age: how many transactions have begun since."""
    dead_rows: float = 5.0
    """Times the number at which autovacuum is to come."""
    waiting_seconds: float = 300.0
    """A job that could run now, in a queue that is served."""
    sampled_payloads: int = 1_000
    """Of each job type."""
    listed: int = 5
    """How many of a kind one line names."""


def several(names: list[str], limits: Limits) -> str:
    """The first few of these, and how many more there are."""
    shown = ", ".join(names[: limits.listed])
    return shown if len(names) <= limits.listed else f"{shown} and {len(names) - limits.listed} more"
