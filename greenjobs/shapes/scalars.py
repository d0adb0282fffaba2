"""Types of the standard library, and Enums, that are written as one string, number or boolean."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from greenjobs.shapes.plain import Unfit, plain
from greenjobs.shapes.shape import KINDS, NUMBER, STRING, Shape


class Scalar(Shape):
    """A value that is written as one string, number or boolean, and read from it."""

    __slots__ = ("_not_type", "_read", "_readable", "_type", "_write")

    def __init__(
        self,
        python_type: type,
        write: Callable[[Any], Any],
        read: Callable[[Any], Any],
        *,
        kinds: Iterable[str] = (STRING,),
        readable: tuple[type, ...] = (str,),
        not_type: type | None = None,
    ) -> None:
        super().__init__(python_type.__name__, kinds)
        self._type = python_type
        self._not_type = not_type
        self._write = write
        self._read = read
        self._readable = readable

    def accepts(self, value: Any) -> bool:
        # By type(), not isinstance(): a proxy claims to be what it stands for, and cannot be written in its place.
        kind = type(value)
        return issubclass(kind, self._type) and not (self._not_type and issubclass(kind, self._not_type))

    def dump(self, value: Any, depth: int) -> Any:
        if not self.accepts(value):
            raise self.unexpected(value)
        try:
            if _equals_itself(value):
                return self._write(value)
        except Unfit:
            raise
        except Exception as error:  # a tzinfo, or a subclass, is somebody else's code
            raise Unfit(f"cannot be written as {self.expected}: {type(error).__name__}: {error}") from error
        raise Unfit("is NaN or NaT, which equals nothing, and so could not come back equal: pass None")

    def load(self, value: Any) -> Any:
        if type(value) not in self._readable:
            raise self.unreadable(value)
        try:
            return self._read(value)
        except Exception as error:  # an Enum may have a _missing_ of its own
            raise Unfit(f"cannot be read as {self.expected} ({type(error).__name__})") from error


def enum_shape(enum: type[Enum]) -> Scalar | None:
    """Return the shape of an Enum, written by value; None if it has no members, or values that do not lead back."""

    def write(member: Enum) -> Any:
        return plain(member.value, 0)

    kinds = set()
    for member in enum:
        try:
            stored = write(member)
            leads_back = type(stored) in (str, int, float, bool) and enum(stored) is member
        except Exception:  # Unfit, or whatever the Enum raises when it is asked for a value
            return None
        if not leads_back:
            return None
        kinds.add(KINDS[type(stored)])
    return Scalar(enum, write, enum, kinds=kinds, readable=(str, int, float, bool)) if kinds else None


def _equals_itself(value: Any) -> bool:
    """Whether it does; Decimal("NaN") and pandas.NaT do not."""
    return bool(operator.eq(value, value))


def _write_timedelta(value: timedelta) -> int | float:
    if not value.microseconds:
        return value.days * 86400 + value.seconds
    seconds = value.total_seconds()
    if timedelta(seconds=seconds) != value:
        raise Unfit("is too long to be kept to the microsecond as a number of seconds: round it to seconds")
    return seconds


def _read_datetime(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return datetime.fromisoformat(_as_python_writes(text))


def _read_time(text: str) -> time:
    try:
        return time.fromisoformat(text)
    except ValueError:
        return time.fromisoformat(_as_python_writes(text))


_TIME_AT_END = re.compile(r"(\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d(?::?\d\d)?)?$")


def _as_python_writes(text: str) -> str:
    """Return ISO 8601 as Python 3.10 reads it: chrono writes Z and nine digits, PostgreSQL as few digits as it can."""

    def rewrite(found: re.Match[str]) -> str:
        clock, fraction, offset = found[1], found[2], found[3]
        digits = f"{fraction[:7]:0<7}" if fraction else ""
        if not offset or offset == "Z":
            return f"{clock}{digits}{'+00:00' if offset else ''}"
        return f"{clock}{digits}{offset[:3]}:{offset[3:].strip(':') or '00'}"

    return _TIME_AT_END.sub(rewrite, text)


# The methods are taken from the class, so that a subclass (pendulum, freezegun) is written in the one format, too.
SCALARS: dict[type, Scalar] = {
    datetime: Scalar(datetime, datetime.isoformat, _read_datetime),
    date: Scalar(date, date.isoformat, date.fromisoformat, not_type=datetime),
    time: Scalar(time, time.isoformat, _read_time),
    timedelta: Scalar(
        timedelta, _write_timedelta, lambda seconds: timedelta(seconds=seconds), kinds=[NUMBER], readable=(int, float)
    ),
    UUID: Scalar(UUID, UUID.__str__, UUID),
    # A number is read as well, for jobs enqueued from SQL: by its shortest text, as 19.99 and not 19.98999999999999843.
    Decimal: Scalar(Decimal, Decimal.__str__, lambda number: Decimal(str(number)), readable=(str, int, float)),
}
