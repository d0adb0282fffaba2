"""Celery's schedules as cron expressions, which is what greenjobs enqueues by.

Where the two do not say the same, it is refused: no schedule silently ticks at other times than it did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NoReturn

from greenjobs.contrib.celery.exceptions import ImproperlyConfigured, Unsupported
from greenjobs.cron import Timetable

__all__ = ["crontab", "schedule", "solar", "timetable"]

# The least and the most of minutes, hours, days of the month, months, and days of the week.
_BOUNDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
_NAMES = {
    **{name: day for day, name in enumerate(("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"))},
    **dict(zip(("JAN", "FEB", "MAR", "APR", "MAY", "JUN"), range(1, 7), strict=True)),
    **dict(zip(("JUL", "AUG", "SEP", "OCT", "NOV", "DEC"), range(7, 13), strict=True)),
}

_RANGE = re.compile(r"(\w+)-(\w+)(?:/(\d+))?")
_WORD = re.compile(r"[A-Za-z]+")
_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400


class schedule:
    """Every so many seconds (or a timedelta): of the clock, not from when the runner started."""

    def __init__(self, run_every: float | timedelta, **_: Any) -> None:
        self.run_every = run_every if isinstance(run_every, timedelta) else timedelta(seconds=run_every)

    def __repr__(self) -> str:
        return f"<freq: {self.run_every}>"

    @property
    def cron(self) -> str:
        """The expression, with seconds where it needs them. Raises Unsupported."""
        seconds = self.run_every.total_seconds()
        if seconds == int(seconds) and seconds > 0:
            seconds = int(seconds)
            if _MINUTE % seconds == 0:
                return f"*/{seconds} * * * * *" if seconds < _MINUTE else "* * * * *"
            if _HOUR % seconds == 0 and seconds % _MINUTE == 0:
                return f"*/{seconds // _MINUTE} * * * *" if seconds < _HOUR else "0 * * * *"
            if _DAY % seconds == 0 and seconds % _HOUR == 0:
                return f"0 */{seconds // _HOUR} * * *" if seconds < _DAY else "0 0 * * *"
        raise Unsupported(
            f"a schedule of every {self.run_every} is none by the clock: minutes, hours and days have to be multiples "
            f"of it; use a crontab(…), or an interval such as 10, 30, 60, 300 or 3600 seconds"
        )


class crontab:
    """As Celery's, in the `timezone` of the configuration."""

    def __init__(
        self,
        minute: int | str | Iterable[int] = "*",
        hour: int | str | Iterable[int] = "*",
        day_of_week: int | str | Iterable[int] = "*",
        day_of_month: int | str | Iterable[int] = "*",
        month_of_year: int | str | Iterable[int] = "*",
        **_: Any,
    ) -> None:
        given = (minute, hour, day_of_month, month_of_year, day_of_week)
        self._fields = tuple(_field(each, *bounds) for each, bounds in zip(given, _BOUNDS, strict=True))

    @classmethod
    def from_string(cls, expression: str) -> crontab:
        """That of a cron expression of five fields."""
        fields = expression.split()
        if len(fields) != len(cls()._fields):
            raise ImproperlyConfigured(f"crontab is {expression!r}; allowed: five fields, such as '*/5 * * * *'")
        minute, hour, day_of_month, month_of_year, day_of_week = fields
        return cls(minute, hour, day_of_week, day_of_month, month_of_year)

    def __repr__(self) -> str:
        return f"<crontab: {' '.join(self._fields)}>"

    @property
    def cron(self) -> str:
        """The expression. Raises Unsupported."""
        _, _, day_of_month, _, day_of_week = self._fields
        if not day_of_month.startswith("*") and not day_of_week.startswith("*"):
            raise Unsupported(
                f"{self!r}: Celery ticks on days that are both, day_of_month and day_of_week, and cron on those that "
                f"are either; give one of them, and look at the date in the task"
            )
        return " ".join(self._fields)


def solar(*_: Any, **__: Any) -> NoReturn:
    """Not in greenjobs. Raises Unsupported."""
    raise Unsupported("solar schedules are not in greenjobs; use crontab(…), and look at the sun in the task")


def timetable(name: str, when: object, timezone: str) -> Timetable:
    """When an entry of beat_schedule ticks. Raises ImproperlyConfigured and Unsupported, which name the entry."""
    if isinstance(when, (int, float, timedelta)) and not isinstance(when, bool):
        when = schedule(when)
    if not isinstance(when, (schedule, crontab)):
        raise ImproperlyConfigured(
            f"the schedule of {name!r} is {when!r}; allowed: seconds, a timedelta, or crontab(…) of "
            f"greenjobs.contrib.celery.schedules"
        )
    try:
        # Intervals know no daylight saving.
        return Timetable(when.cron, timezone if isinstance(when, crontab) else "UTC")
    except Unsupported as error:
        raise Unsupported(f"the schedule {name!r}: {error}") from None
    except ValueError as error:
        raise ImproperlyConfigured(f"the schedule {name!r}: {error}") from None


def _field(given: int | str | Iterable[int], first: int, last: int) -> str:
    if isinstance(given, str):
        # Celery reads names by their first three letters.
        text = _WORD.sub(lambda word: word[0][:3].upper(), "".join(given.split()))
        return ",".join(_range(part, first, last) for part in text.split(","))
    if isinstance(given, Iterable):
        return ",".join(str(each) for each in sorted(given))
    return str(given)


def _range(part: str, first: int, last: int) -> str:
    """A range that ends before it begins, such as 22-2, which Celery takes around and cron has not, as the values that
    it has; and one of a single value, whose step cron would take for one until the end."""
    found = _RANGE.fullmatch(part)
    if found is None:
        return part
    ends = [_NAMES.get(end, int(end) if end.isdecimal() else -1) for end in found.groups()[:2]]
    begin, end, step = *ends, int(found[3] or 1)
    if begin < end or not step or not all(first <= each <= last for each in ends):
        return part  # as it is, or for whoever reads the expression to refuse
    values = [begin] if begin == end else [*range(begin, last + 1), *range(first, end + 1)]
    return ",".join(map(str, values[::step]))
