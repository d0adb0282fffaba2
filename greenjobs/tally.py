"""Counts of one job type in one queue of one runner, until they are written."""

from __future__ import annotations


class Tally:
    """How many attempts ended how, and how long they ran, and had waited, together.

    The counts are named as the outcomes of `events.Outcome`. Jobs that expired count as discarded; attempts that were
    interrupted are not counted.
    """

    __slots__ = (
        "cancelled",
        "discarded",
        "done",
        "failed",
        "retried",
        "run_seconds",
        "snoozed",
        "waited_seconds",
    )

    def __init__(self) -> None:
        self._clear()

    def add(self, outcome: str, run_seconds: float, waited_seconds: float) -> None:
        """Count an attempt that ended; done jobs, the most, are counted where they end."""
        if outcome == "interrupted":
            return
        name = "discarded" if outcome == "expired" else outcome
        setattr(self, name, getattr(self, name) + 1)
        self.run_seconds += run_seconds
        self.waited_seconds += waited_seconds

    def take(self) -> dict[str, float] | None:
        """What was counted since the last time, None for nothing; counting begins anew."""
        taken = {name: getattr(self, name) for name in self.__slots__}
        if not any(taken.values()):
            return None
        self._clear()
        return taken

    def _clear(self) -> None:
        self.done = 0
        self.retried = 0
        self.failed = 0
        self.discarded = 0
        self.cancelled = 0
        self.snoozed = 0
        self.run_seconds = 0.0
        self.waited_seconds = 0.0
