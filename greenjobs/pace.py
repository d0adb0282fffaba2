"""How fast the jobs of a worker finish, and so how many are worth claiming before there is room for them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from greenjobs.execution import Executor

# How much work is claimed ahead, and from which mean duration on none is: there the 5 to 10 ms between two claims are
# little beside a job's own time, and a job claimed ahead would wait here while another runner may be free for it.
_READ_AHEAD_SECONDS = 0.05
_SLOW_JOB_SECONDS = 0.2

# The rate is measured over at least so long, and an old measurement fades with every new one.
_RATE_WINDOW_SECONDS = 0.005
_RATE_WEIGHT = 0.5


class Pace:
    """How many jobs finish in the time that is worth claiming ahead for: 0 while jobs are slow, or unknown."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._rate = 0.0
        self._duration = _SLOW_JOB_SECONDS
        self._measured_at = time.monotonic()
        self._finished = -1
        self._busy_seconds = 0.0

    def measure(self, executor: Executor) -> int:
        """Bring the measurement up to date, and return how many jobs to have ready."""
        now = time.monotonic()
        finished = executor.finished - self._finished
        if self._finished < 0 or now - self._measured_at > 1.0:
            # The first look, or one after a pause, in which the rate says more about what there was to do.
            self._start_window(now, executor)
        elif finished > 0 and now - self._measured_at >= _RATE_WINDOW_SECONDS:
            rate = finished / (now - self._measured_at)
            duration = (executor.busy_seconds - self._busy_seconds) / finished
            self._rate += _RATE_WEIGHT * (rate - self._rate)
            self._duration += _RATE_WEIGHT * (duration - self._duration)
            self._start_window(now, executor)
        return int(self._rate * _READ_AHEAD_SECONDS) if self._duration < _SLOW_JOB_SECONDS else 0

    def _start_window(self, now: float, executor: Executor) -> None:
        self._measured_at = now
        self._finished = executor.finished
        self._busy_seconds = executor.busy_seconds
