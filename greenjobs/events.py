"""What happens to jobs, told to whoever wants to know; free while nobody does.

Handlers are called in the runner's process, in the job's greenlet and context, right after the outcome is decided and
before it is written. One that raises is logged; it changes nothing for the job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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


Handler = Callable[[AttemptEnded], None]

handlers: list[Handler] = []
"""Those that are called for every attempt, in order; see subscribe."""


def subscribe(handler: Handler) -> Handler:
    """Call this for every attempt that ends in this process from now on. Can be used as a decorator."""
    handlers.append(handler)
    return handler


def unsubscribe(handler: Handler) -> None:
    """Call it no more."""
    handlers.remove(handler)


def publish(event: AttemptEnded, *more: Handler) -> None:
    """Tell every handler, and these."""
    for handler in (*handlers, *more):
        try:
            handler(event)
        except Exception:
            logger.exception("a handler of events failed for job %s (%s): %r", event.id, event.job_type, handler)
