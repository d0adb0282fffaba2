"""Shifts the clock of a Python process by $FAULTS_CLOCK_HOURS: what time.time() and datetime.now() say.

Python imports this by itself when its folder is on PYTHONPATH, before anything of the application.
"""

from __future__ import annotations

import datetime
import os
import time

_SHIFT = datetime.timedelta(hours=float(os.environ["FAULTS_CLOCK_HOURS"]))

_right_time, _right_time_ns, _Right = time.time, time.time_ns, datetime.datetime


class _Meta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Right)


class _Shifted(datetime.datetime, metaclass=_Meta):
    """datetime, but for what it takes for now. What it makes are plain ones, as C code does, too."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
        return _Right.now(tz) + _SHIFT


time.time = lambda: _right_time() + _SHIFT.total_seconds()
time.time_ns = lambda: _right_time_ns() + int(_SHIFT.total_seconds() * 1_000_000_000)
datetime.datetime = _Shifted  # type: ignore[misc]
