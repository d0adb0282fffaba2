"""When a failed job runs again: pure arithmetic, in seconds.

A backoff is a function of how often the job has failed, the last time included, and of the error.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone

Backoff = Callable[[int, BaseException], float]

LONGEST_DELAY_SECONDS = 24 * 60 * 60.0
JITTER = 0.1  # so that a thousand jobs that failed together do not come back together


def exponential(
    *, base: float = 60.0, factor: float = 2.0, max: float = LONGEST_DELAY_SECONDS, jitter: float = JITTER
) -> Backoff:
    """Wait base × factor^failures seconds, at most `max`, varied by the share `jitter` either way.

    With the defaults that is the rule of crates.io's jobs, 1 minute × 2^retries: 2 minutes, 4 minutes, 8 minutes, ….
    """
    _check(base=base, factor=factor, max=max, jitter=jitter)
    if factor < 1:
        raise ValueError(f"factor is {factor!r}; allowed: 1 or more")

    def delay(failures: int, error: BaseException) -> float:
        try:
            seconds = base * factor**failures
        except OverflowError:
            seconds = max
        return _vary(seconds, jitter, max)

    return delay


def linear(*, step: float = 60.0, max: float = LONGEST_DELAY_SECONDS, jitter: float = JITTER) -> Backoff:
    """Wait step × failures seconds, at most `max`, varied by the share `jitter` either way."""
    _check(step=step, max=max, jitter=jitter)
    return lambda failures, error: _vary(step * failures, jitter, max)


def fixed(seconds: float, *, jitter: float = 0.0) -> Backoff:
    """Wait this long each time, varied by the share `jitter` either way."""
    _check(seconds=seconds, jitter=jitter)
    return lambda failures, error: _vary(seconds, jitter, math.inf)


def listed(delays: Sequence[float]) -> Backoff:
    """Wait as long as the list says, in seconds; the last one counts for all that follow."""
    if not delays:
        raise ValueError("the list of delays is empty")
    for place, seconds in enumerate(delays):
        _check(**{f"delay {place}": seconds})
    return lambda failures, error: float(delays[min(failures, len(delays)) - 1])


def backoff(given: object) -> Backoff:
    """The backoff that was meant: a number, a list of numbers, or a function (failures, error) → seconds.

    Raises ValueError for anything else.
    """
    if callable(given):
        return given
    if isinstance(given, (list, tuple)):
        return listed(given)
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return fixed(given)
    raise ValueError(
        f"backoff is {given!r}; allowed: exponential(…), linear(…), fixed(…) of greenjobs.retry, a number of seconds, "
        f"a list of them, or a function (failures, error) that returns one"
    )


def seconds_after(after: float | timedelta | str) -> float:
    """Seconds to wait, from a number, a timedelta, or the value of an HTTP Retry-After header (seconds, or a date).

    Never less than 0. Raises ValueError for what is none of these.
    """
    if isinstance(after, timedelta):
        seconds = after.total_seconds()
    elif isinstance(after, str):
        seconds = _header_seconds(after.strip())
    elif isinstance(after, (int, float)) and not isinstance(after, bool):
        seconds = float(after)
    else:
        raise ValueError(f"{after!r} is no time to wait; allowed: seconds, a timedelta, or a Retry-After header")
    if not math.isfinite(seconds):
        raise ValueError(f"{after!r} is no time to wait: it must be finite")
    return max(seconds, 0.0)


def _header_seconds(header: str) -> float:
    """RFC 9110, 10.2.3: delay-seconds or HTTP-date."""
    if header.isascii() and header.isdigit():
        return float(header)
    from email.utils import parsedate_to_datetime  # slow to load, and seldom needed

    try:
        instant = parsedate_to_datetime(header)
    except ValueError:
        raise ValueError(f"{header!r} is no Retry-After header: neither seconds nor a date") from None
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=timezone.utc)
    return (instant - datetime.now(timezone.utc)).total_seconds()


def _vary(seconds: float, jitter: float, longest: float) -> float:
    return min(seconds * random.uniform(1 - jitter, 1 + jitter), longest)


def _check(**numbers: float) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or number < 0:
            raise ValueError(f"{name} is {number!r}; allowed: a number of seconds, 0 or more")
        if name == "jitter" and number > 1:
            raise ValueError(f"jitter is {number!r}; allowed: a share from 0 to 1")
