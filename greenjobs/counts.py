"""How many jobs ended how, and how long they ran and waited: by minute, queue and type, when their rows are long gone.

    from greenjobs import counts

    for total in counts.totals(since="1 day", queue="emails"):
        print(total.job_type, total.done, total.failed, total.mean_run_seconds)

Runners count every attempt when it ends, and write that every few seconds and when they stop. What a killed runner had
counted in its last seconds is lost; nothing is counted twice because a connection broke.

Inside a job this is about the database of its runner, elsewhere about that of the settings. Every function raises
OptionError for an argument that cannot be, DatabaseUnavailable, SchemaError where the tables are missing, and
AccessDenied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from greenjobs import config, storage
from greenjobs.current import lender
from greenjobs.durations import DURATION_FORMS, duration
from greenjobs.errors import OptionError
from greenjobs.refusals import explained

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Count", "Total", "minutes", "rates", "totals"]

Since = float | timedelta | str | datetime

# Long enough to be steady, and short enough to be now.
RATE_MINUTES = 5


@dataclass(frozen=True, slots=True)
class _Ended:
    """Attempts that ended, by outcome, and how long they ran and had waited together.

    `done`, `failed`, `discarded` and `cancelled` are jobs that came to their end; those that were `retried` or
    `snoozed` are counted again.
    """

    done: int
    retried: int
    failed: int
    discarded: int
    cancelled: int
    snoozed: int
    run_seconds: float
    waited_seconds: float

    @property
    def attempts(self) -> int:
        """How many attempts it is about, all outcomes together."""
        return self.done + self.retried + self.failed + self.discarded + self.cancelled + self.snoozed

    @property
    def mean_run_seconds(self) -> float | None:
        """How long an attempt ran in the mean; None without any."""
        return self.run_seconds / self.attempts if self.attempts else None

    @property
    def mean_waited_seconds(self) -> float | None:
        """How long an attempt had waited in the mean, from when it was due until it was claimed; None without any."""
        return self.waited_seconds / self.attempts if self.attempts else None


@dataclass(frozen=True, slots=True)
class Count(_Ended):
    """What ended in one minute, of one job type in one queue. `minute` is its beginning."""

    minute: datetime
    queue: str
    job_type: str


@dataclass(frozen=True, slots=True)
class Total(_Ended):
    """What ended within some seconds, in one queue: of one job type, or of all where that is None."""

    queue: str
    job_type: str | None
    seconds: float

    @property
    def done_per_minute(self) -> float:
        """How many jobs were done in a minute, in the mean."""
        return 60 * self.done / self.seconds

    @property
    def failed_per_minute(self) -> float:
        """How many jobs failed for good in a minute, in the mean."""
        return 60 * self.failed / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """All that it says, the means included, for JSON."""
        return {
            **asdict(self),
            "done_per_minute": self.done_per_minute,
            "failed_per_minute": self.failed_per_minute,
            "mean_run_seconds": self.mean_run_seconds,
            "mean_waited_seconds": self.mean_waited_seconds,
        }


def minutes(
    *, since: Since, queue: str | Iterable[str] | None = None, job_type: str | Iterable[str] | None = None
) -> list[Count]:
    """The counts from the minute on in which `since` is: one for each minute, queue and type, the oldest first.

    `since` is an aware datetime; or seconds, a timedelta, or a text such as "2h": so long ago. `queue` and `job_type`
    are a name or several.
    """
    return [Count(*row) for row in _read(storage.read_counts, since, queue, job_type)]


def totals(
    *, since: Since, queue: str | Iterable[str] | None = None, job_type: str | Iterable[str] | None = None
) -> list[Total]:
    """The sums of what `minutes` says: one for each queue and type."""
    return [Total(*row) for row in _read(storage.total_counts, since, queue, job_type, by_type=True)]


def rates(*, queue: str | Iterable[str] | None = None, job_type: str | Iterable[str] | None = None) -> list[Total]:
    """The sums of the last minutes, at least five: one for each queue in which an attempt ended."""
    since = timedelta(minutes=RATE_MINUTES)
    return [Total(*row) for row in _read(storage.total_counts, since, queue, job_type, by_type=False)]


def _read(
    read: Callable[..., list[tuple[Any, ...]]],
    since: Since,
    queue: str | Iterable[str] | None,
    job_type: str | Iterable[str] | None,
    **more: Any,
) -> list[tuple[Any, ...]]:
    instant, age_seconds = _moment(since)
    queues, job_types = _names("queue", queue), _names("job_type", job_type)
    with explained(), lender(config.current()).connection() as connection, storage.patiently(connection):
        return read(connection, since=instant, age_seconds=age_seconds, queues=queues, job_types=job_types, **more)


def _moment(since: Since) -> tuple[datetime | None, float | None]:
    """An instant, or how many seconds ago it was: that is for the clock of the database."""
    if isinstance(since, datetime):
        if since.utcoffset() is None:
            raise OptionError(f"since is {since!r}, which has no time zone; use an aware one")
        return since, None
    try:
        return None, duration(since)
    except (ValueError, OverflowError):
        raise OptionError(f"since is {since!r}; allowed: an aware datetime, {DURATION_FORMS}") from None


def _names(filter: str, given: str | Iterable[str] | None) -> list[str] | None:
    if given is None:
        return None
    names: list[Any] = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    for name in names:
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise OptionError(f"{filter} is {given!r}; allowed: a name, or a list of names")
    return names
