"""When a schedule is due: cron expressions in a time zone, as instants.

The library cronsim reads the expressions and walks through the calendar; what daylight saving does to a wall clock is
decided here, because cronsim's own handling loses ticks where the clock moves by half an hour. The rule is that of
Debian's cron. Where second, minute and hour are all given as numbers, a tick happens once on each of its days: at the
first of two such times, and right after the gap when the time does not exist. Where one of them begins with `*`, ticks
follow the clock on the wall: those of the repeated hour come twice, those of the missing hour do not come.

Instants go in aware and come out in UTC; two datetimes of one zone would be compared by their wall clocks. Nothing here
asks what time it is.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

CATCH_UP = ("none", "last", "all")

#: A tick that is found no later than this counts as on time, whatever `catch_up` says: deploys and lost connections
#: take seconds.
ON_TIME = timedelta(minutes=1)

_NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}

_INSTANT = timedelta(microseconds=1)
_ANY_DAY = datetime(2000, 1, 1)


@dataclass(frozen=True, slots=True)
class Timetable:
    """When ticks come, and what becomes of those that were missed. Raises ValueError, which says what is wrong.

    `cron` has five fields, or six with seconds first, or is a nickname such as @daily; `timezone` is a name of the IANA
    database. `catch_up` is for ticks that nobody enqueued within a minute: none of them, the last one, or all.
    Without `overlap` a tick is left out while the job of the one before waits or runs.
    """

    cron: str
    timezone: str = "UTC"
    catch_up: str = "last"
    overlap: bool = True

    def __post_init__(self) -> None:
        zone_named(self.timezone)
        if self.catch_up not in CATCH_UP:
            raise ValueError(f'catch_up is {self.catch_up!r}; allowed: "none", "last" or "all"')
        if not isinstance(self.overlap, bool):
            raise ValueError(f"overlap is {self.overlap!r}; allowed: True or False")
        if not isinstance(self.cron, str):
            raise ValueError(f'cron is {self.cron!r}; allowed: a text such as "*/5 * * * *"')
        _check_expression(self.cron)

    def ticks_after(self, instant: datetime) -> Iterator[datetime]:
        """Every tick later than this instant, in order, without end."""
        if instant.tzinfo is None:
            raise ValueError(f"{instant!r} has no time zone")
        zone = zone_named(self.timezone)
        instant = instant.astimezone(timezone.utc)
        local = instant.astimezone(zone)
        expression = _fields(self.cron)
        is_at_fixed_times = not any(field.startswith("*") for field in expression.split()[:-3])
        walk = _at_fixed_times if is_at_fixed_times else _by_the_wall_clock
        last = instant
        for tick in walk(expression, local, zone):
            if tick > last:
                yield tick
                last = tick

    def next_after(self, instant: datetime) -> datetime:
        """The first tick later than this instant."""
        return next(self.ticks_after(instant))

    def ticks_between(self, after: datetime, until: datetime) -> Iterator[datetime]:
        """The ticks later than `after`, up to and including `until`."""
        return itertools.takewhile(lambda tick: tick <= until, self.ticks_after(after))

    def due_ticks(self, since: datetime, now: datetime) -> Iterator[datetime]:
        """Those to enqueue, in order, when all from `since` up to `now` were left to us: what `catch_up` says."""
        before = since - _INSTANT
        if self.catch_up == "all":
            yield from self.ticks_between(before, now)
            return
        late_before = now - ON_TIME - _INSTANT
        on_time = list(self.ticks_between(max(before, late_before), now))
        if on_time or self.catch_up == "none":
            yield from on_time
            return
        # Backwards in growing strides: a schedule of seconds that was left alone for a year has 31 million ticks.
        stride = ON_TIME
        while late_before > before:
            stride *= 2
            missed = list(self.ticks_between(max(before, late_before - stride), late_before))
            if missed or late_before - stride <= before:
                yield from missed[-1:]
                return


def zone_named(name: str) -> ZoneInfo:
    """The time zone of this name; raises ValueError when there is none."""
    from zoneinfo import ZoneInfo

    if isinstance(name, str) and name:
        # A path that leads nowhere, or to a folder, is refused in as many ways.
        with contextlib.suppress(KeyError, ValueError, OSError):
            return ZoneInfo(name)
    raise ValueError(f'timezone is {name!r}; allowed: a name of the IANA database, such as "UTC" or "Europe/Paris"')


def _fields(expression: str) -> str:
    return _NICKNAMES.get(expression.strip().lower(), expression)


@functools.lru_cache(maxsize=1024)
def _check_expression(given: str) -> None:
    from cronsim import CronSim, CronSimError

    try:
        has_tick = next(CronSim(_fields(given), _ANY_DAY), None) is not None
    except CronSimError as error:
        reason = str(error)
    else:
        if has_tick:
            return
        reason = "there is no such day"
    raise ValueError(
        f"cron is {given!r}: {reason}; the fields are [second] minute hour day-of-month month day-of-week, "
        f'as in "*/5 * * * *" or "30 2 * * MON-FRI"'
    )


def _walls(expression: str, after: datetime) -> Iterator[datetime]:
    """What a wall clock shows at the ticks after `after`, without any zone, where cronsim has nothing to correct."""
    from cronsim import CronSim

    return CronSim(expression, after)


def _at_fixed_times(expression: str, local: datetime, zone: ZoneInfo) -> Iterator[datetime]:
    for wall in _walls(expression, local.replace(tzinfo=None)):
        instant = _instant(wall, zone, fold=0)
        yield _end_of_gap(wall, zone) if instant is None else instant


def _by_the_wall_clock(expression: str, local: datetime, zone: ZoneInfo) -> Iterator[datetime]:
    """The clock's first and second readings, each in order, merged; all but the repeated ones are in both."""
    wall = local.replace(tzinfo=None)
    repeated = (local.replace(fold=0).utcoffset() or timedelta()) - (local.replace(fold=1).utcoffset() or timedelta())
    return heapq.merge(
        _readings(expression, wall, zone, fold=0),
        # While the clock goes through a time that it will repeat, the second readings begin before it.
        _readings(expression, wall - max(repeated, timedelta()), zone, fold=1),
    )


def _readings(expression: str, after: datetime, zone: ZoneInfo, *, fold: int) -> Iterator[datetime]:
    for wall in _walls(expression, after):
        instant = _instant(wall, zone, fold=fold)
        if instant is not None:
            yield instant


def _instant(wall: datetime, zone: ZoneInfo, *, fold: int) -> datetime | None:
    """When the clock of the zone shows this (the first time, or with `fold` the second); None when it never does."""
    instant = wall.replace(tzinfo=zone, fold=fold).astimezone(timezone.utc)
    return instant if instant.astimezone(zone).replace(tzinfo=None) == wall else None


def _end_of_gap(wall: datetime, zone: ZoneInfo) -> datetime:
    """The instant at which the clock jumps over this time; by bisection, for zoneinfo does not tell."""
    before = wall.replace(tzinfo=zone, fold=1).astimezone(timezone.utc)
    after = wall.replace(tzinfo=zone, fold=0).astimezone(timezone.utc)
    offset = after.astimezone(zone).utcoffset()
    second = timedelta(seconds=1)
    while after - before > second:
        middle = before + (after - before) // 2 // second * second
        if middle.astimezone(zone).utcoffset() == offset:
            after = middle
        else:
            before = middle
    return after
