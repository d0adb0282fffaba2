"""How long: seconds, timedeltas, and texts that people write."""

from __future__ import annotations

import re
from datetime import timedelta

_UNITS = {
    name: seconds
    for seconds, names in {
        1: "s sec secs second seconds",
        60: "m min mins minute minutes",
        3_600: "h hour hours",
        86_400: "d day days",
        604_800: "w week weeks",
    }.items()
    for name in names.split()
}
_PART_OF_DURATION = r"(\d+(?:\.\d+)?)\s*([a-z]+)"
_LONGEST_DURATION_DAYS = 36_500

DURATION_FORMS = f'seconds, or a text such as "90 s", "12h", "7 days" or "1w 3d", up to {_LONGEST_DURATION_DAYS:,} days'


def duration(value: object) -> float:
    """Return the seconds of a number of seconds, a timedelta, or a text as in DURATION_FORMS; else raise ValueError."""
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        seconds = _seconds_of_text(value.strip().lower())
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise ValueError
    # Written so that NaN, which no comparison holds for, is refused too.
    if not 0 <= seconds <= _LONGEST_DURATION_DAYS * 86_400:
        raise ValueError
    return seconds


def _seconds_of_text(text: str) -> float:
    if re.fullmatch(r"\d+(?:\.\d+)?", text, re.ASCII):
        return float(text)
    if not re.fullmatch(rf"(?:{_PART_OF_DURATION}\s*)+", text, re.ASCII):
        raise ValueError
    seconds = 0.0
    for number, unit in re.findall(_PART_OF_DURATION, text, re.ASCII):
        if unit not in _UNITS:
            raise ValueError
        seconds += float(number) * _UNITS[unit]
    return seconds
