"""The call of a job's function where that does not run in a greenlet of the event loop, as the executor sees it."""

from __future__ import annotations

from collections.abc import Mapping
from types import FrameType
from typing import Any

from gevent.event import Event

from greenjobs.keeping import NO_RESULT
from greenjobs.policy import Verdict
from greenjobs.stacks import lines_of


class ElsewhereCall:
    """The call of one attempt's function, while it is under way and afterwards. `wait` is for the attempt's carrier.

    Where it ran in a process, the error was judged there: `verdict` and `record` say how, `is_reported` that somebody
    such as Sentry has it already, and `encoded` is what it returned, as ResultCodec.encode has it.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.verdict: Verdict | None = None
        self.record: Mapping[str, Any] | None = None
        self.encoded: tuple[str | None, str | None] | None = None
        self.is_reported = False
        self.is_over = False
        self._ended = Event()

    def wait(self) -> None:
        """Block the greenlet until the function has ended."""
        self._ended.wait()

    def end(self) -> None:
        """The outcome is there: let the carrier go on. In the event loop's thread; returns at once."""
        self.is_over = True
        self._ended.set()

    def interrupt(self, error: BaseException) -> None:
        """Raise this error in the function; returns at once. To be called in the event loop's hub."""
        raise NotImplementedError

    def frame(self) -> FrameType | None:
        """Where it stands at this moment, if it is in this process, and has begun."""
        return None

    def lines(self) -> list[str]:
        """Where it stands, for people; blocks for a moment where another process has to be asked."""
        frame = self.frame()
        return [self.where] if frame is None else lines_of(frame)

    @property
    def where(self) -> str:
        """What people are told in place of that."""
        return "(it is about to begin)"


class CompletedElsewhere:
    """In place of the transaction in which a job has completed that ran in another process."""

    is_committed = True
    result = NO_RESULT  # it was written there, too

    def end(self) -> None:
        """It was looked at there."""

    def abandon(self) -> None:
        """There is nothing to be rolled back."""

    def joined(self) -> None:
        """Nothing can be enqueued in it any more."""
