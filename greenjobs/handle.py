"""What enqueuing returns: the job, as seen from outside."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from greenjobs import config
from greenjobs.current import database_rooms, lender
from greenjobs.errors import JobFailed, NoResult, OptionError
from greenjobs.keeping import read_result

if TYPE_CHECKING:
    from greenjobs.history import Look, Status

EndedAs = Literal["done", "failed", "discarded", "cancelled", "expired", "gone"]
"""failed: out of retries. gone: in no table; it ended and was not kept, or was deleted, or never was."""

Action = Literal["enqueued", "kept", "replaced", "extended", "merged"]

_WHY_NO_RESULT = {
    "done": "is done, but its result was not kept: declare it with @job(keep=…, keep_result=True); if it is, the log "
    "of the runner says why this one could not be",
    "gone": "is gone, and nothing of it was kept: it was done, or deleted; declare it with "
    "@job(keep=…, keep_result=True)",
}


class _Enqueued:
    """Where a handle keeps what is about this process alone."""

    __slots__ = ("_inside",)

    _inside: Callable[[], Any]


@dataclass(slots=True, unsafe_hash=True)  # frozen would make it three times as dear
class JobHandle(_Enqueued):
    """A job that was enqueued. With `duplicate`, `id` is that of the job that has its unique key already, and `action`
    says what became of that one.

    One of an id alone, `greenjobs.jobs.handle(id)`, does the same; its `job_type` is "".
    """

    id: int
    job_type: str
    duplicate: bool = False
    action: Action = field(default="enqueued", compare=False)

    def status(self) -> Status:
        """How the job is doing at this moment: "scheduled", "available", "running" or "failed"; or how it ended, where
        that is kept: "done", "discarded", "cancelled" or "expired"; else "gone". Raises DatabaseUnavailable."""
        return self._look().status

    def wait(self, timeout: float | timedelta | None = None) -> EndedAs:
        """Block until the job has ended, `timeout` seconds at most, and return how; of a job that is not kept, and had
        ended before, "gone" is all that can be said.

        It opens one connection for as long as it takes. Raises JobNotEnded when the time is up; JobNotCommitted when
        the transaction that enqueued the job is still open; DatabaseUnavailable when the database does not answer.
        """
        return self._wait(timeout).status  # type: ignore[return-value]  # it has ended

    def result(self, timeout: float | timedelta | None = None) -> Any:
        """Wait as `wait` does, and return what the job returned, which jobs with keep_result=True keep.

        It is read by the function's return annotation where this process knows the job, else it is plain JSON. Raises
        JobFailed, with the last error, when the job failed for good; NoResult when it ended in another way, or when the
        result was not kept; PayloadMismatch when the stored one does not fit the annotation any more; and as `wait`.
        """
        seen = self._wait(timeout)
        name = f"job {self.id} ({seen.job_type or self.job_type or 'of unknown type'})"
        if seen.status == "failed":
            error = seen.error or {}
            raise JobFailed(
                f"{name} failed: {error.get('error')}: {error.get('message')}",
                id=self.id,
                error=error.get("error"),
                message=error.get("message"),
            )
        if seen.status != "done" or seen.result is None:
            why = _WHY_NO_RESULT.get(seen.status, f"was {seen.status}, and so has no result")
            if seen.status == "expired":
                why = "expired before it started, and so has no result"
            raise NoResult(f"{name} {why}", id=self.id, outcome=seen.status)
        return read_result(seen.job_type, seen.result)

    def cancel(self) -> Literal["removed", "asked", "gone"]:
        """End the job. One that waits is removed; one that runs is asked to end, and JobCancelled raised in it within a
        second, in whichever process it runs; one that is done or failed is gone."""
        from greenjobs.refusals import explained  # it needs psycopg2

        _, storage = database_rooms()
        with explained(), lender(config.current()).connection() as connection:
            removed, asked = storage.cancel(connection, [self.id])
        return "removed" if removed else "asked" if asked else "gone"

    def __reduce__(self) -> tuple[type[JobHandle], tuple[int, str, bool]]:
        return JobHandle, (self.id, self.job_type, self.duplicate)

    def _look(self) -> Look:
        from greenjobs import watch  # it needs psycopg2

        return watch.look(self.id, getattr(self, "_inside", None))

    def _wait(self, timeout: float | timedelta | None) -> Look:
        from greenjobs import watch

        return watch.wait(self.id, timeout=_checked_timeout(timeout), inside=getattr(self, "_inside", None))


def note_transaction(handles: Iterable[JobHandle], connection: Any) -> None:
    """Remember on whose connection, in whose transaction, these jobs were enqueued."""
    inside = weakref.ref(connection)
    for handle in handles:
        handle._inside = inside


def _checked_timeout(timeout: object) -> float | None:
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or math.isnan(seconds) or seconds < 0:
        raise OptionError(f"timeout is {timeout!r}; allowed: 0 or more seconds, a timedelta, or None, which waits on")
    return None if math.isinf(seconds) else float(seconds)
