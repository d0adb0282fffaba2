"""How long callers waited because every connection of a pool was busy."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# Who waits longer makes a warning, and so often at most: a pool that is too small is so for every job.
LONG_WAIT_SECONDS = 1.0
_WARNING_SECONDS = 60.0


@dataclass(slots=True)
class Waits:
    """What was measured since the pool was made: how often somebody waited, in vain or not, and how long.

    `setting` is the one that makes the pool larger; with it, a long wait is worth a warning.
    """

    setting: str | None = None
    count: int = 0
    given_up: int = 0
    total_seconds: float = 0.0
    longest_seconds: float = 0.0
    _unreported: int = 0
    _warned_at: float | None = None

    def add(self, seconds: float, *, in_vain: bool) -> None:
        """Count one wait that has ended."""
        self.count += 1
        self.given_up += in_vain
        self.total_seconds += seconds
        self.longest_seconds = max(self.longest_seconds, seconds)
        self._unreported += seconds > LONG_WAIT_SECONDS

    def warn(self, seconds: float, size: int) -> None:
        """Say that somebody waited so long for one of `size` connections, if that is long and was not said just now."""
        now = time.monotonic()
        is_news = self._warned_at is None or now - self._warned_at > _WARNING_SECONDS
        if self.setting is not None and seconds > LONG_WAIT_SECONDS and is_news:
            waited, self._unreported, self._warned_at = self._unreported, 0, now
            logger.warning(
                "waited %.1f s for a connection, as %s others did for more than %g s: all %s were busy; "
                "%s is the setting that allows more",
                *(seconds, max(waited - 1, 0), LONG_WAIT_SECONDS, size, self.setting),
                extra={"setting": self.setting, "waited_seconds": round(seconds, 3)},
            )
