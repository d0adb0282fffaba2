"""What happens to jobs, told to whoever wants to know; free while nobody does.

Handlers of attempts are called in the runner's process, in the job's greenlet and context: right before the function
and what surrounds it, and right after the outcome is decided and before it is written. One that raises is logged; it
changes nothing for the job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from greenjobs.errors import OptionError

logger = logging.getLogger(__name__)

Outcome = Literal["done", "retried", "failed", "discarded", "snoozed", "interrupted", "cancelled", "expired"]
"""retried: this attempt failed, there will be another. failed: it was the last. interrupted: given back, runs again.
expired: it never ran."""


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """One attempt of one job has ended. `run_seconds` it ran, `waited_seconds` it had waited since it was due.

    `retry_in` is in seconds from now; `error` is what was raised, if anything was.
    """

    outcome: Outcome
    id: int
    job_type: str
    queue: str
    attempt: int
    run_seconds: float
    waited_seconds: float
    retry_in: float | None
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """One attempt of one job is about to begin; it had waited `waited_seconds` since it was due."""

    id: int
    job_type: str
    queue: str
    attempt: int
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class JobsEnqueued:
    """So many new jobs were inserted by one call in this process; in a transaction of the caller's, they are not
    committed yet. Unique jobs that were there already are not counted."""

    job_type: str
    queue: str
    count: int


@dataclass(frozen=True, slots=True)
class LoopHeld:
    """Something held the runner's event loop for `seconds`, longer than `max_blocking`, and has let go of it now.

    `job_type`, `id` and `queue` are None where no job did, or nobody can say which; `stack` is where it stood, as text,
    "" where nobody could see it. The handlers are called in the loop, afterwards.
    """

    job_type: str | None
    id: int | None
    queue: str | None
    seconds: float
    stack: str


@dataclass(frozen=True, slots=True)
class RunnerEnded:
    """A runner has ended, and the outcomes of its jobs are written. The process ends when the handlers have returned:
    for what is to leave it before."""

    name: str


Event = TypeVar("Event")
Handler = Callable[[AttemptEnded], None]

handlers: list[Handler] = []
"""Those that are called for every attempt that ends, in order; see subscribe."""

start_handlers: list[Callable[[AttemptStarted], None]] = []
"""Those that are called for every attempt that begins."""

enqueue_handlers: list[Callable[[JobsEnqueued], None]] = []
"""Those that are called for every enqueue."""

_handlers: dict[type, list[Any]] = {
    AttemptEnded: handlers,
    AttemptStarted: start_handlers,
    JobsEnqueued: enqueue_handlers,
    LoopHeld: [],
    RunnerEnded: [],
}


@overload
def subscribe(handler: Handler) -> Handler: ...


@overload
def subscribe(handler: Callable[[Event], None], kind: type[Event]) -> Callable[[Event], None]: ...


def subscribe(handler: Callable[[Any], None], kind: type = AttemptEnded) -> Callable[[Any], None]:
    """Call this for every event of a kind from now on, in this process: of attempts that end, unless another is named.
    Can be used as a decorator.
    """
    _handlers_of(kind).append(handler)
    return handler


def unsubscribe(handler: Callable[[Any], None], kind: type = AttemptEnded) -> None:
    """Call it no more for that kind."""
    _handlers_of(kind).remove(handler)


def publish(event: Any, *more: Callable[[Any], None]) -> None:
    """Tell every handler of this kind, and these."""
    for handler in (*_handlers[type(event)], *more):
        try:
            handler(event)
        except Exception:
            logger.exception("a handler of events failed: %r, for %r", handler, event)


def _handlers_of(kind: type) -> list[Any]:
    try:
        return _handlers[kind]
    except (KeyError, TypeError):
        names = ", ".join(each.__name__ for each in _handlers)
        raise OptionError(f"there are no events of the kind {kind!r}; there are {names}") from None
