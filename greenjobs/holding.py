"""Jobs that are kept back for a while: enqueued when what they belong to has succeeded, dropped when it has failed.

For where a job cannot be part of a transaction. A job that is held is in the memory of one process only, and lost with
it. Whoever holds jobs, such as a request, is a `Hold`, and takes the place of a connection in `current.ambient`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

from greenjobs import config
from greenjobs.current import database_rooms, lender
from greenjobs.errors import JobHeld
from greenjobs.handle import JobHandle

_OF_THE_ROW = ("id", "duplicate", "action")


class HeldHandle(JobHandle):
    """The handle of a job that is held: it knows the job type alone, and is an ordinary one once that is enqueued."""

    __slots__ = ()

    def __init__(self, job_type: str) -> None:
        self.job_type = job_type

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_ROW:
            raise JobHeld(
                f"{self.job_type} has not been enqueued yet, and so has no {name}: it is held until the transaction is "
                f"committed, or the request has succeeded, to which it belongs; .options(independent=True) enqueues at "
                f"once"
            )
        raise AttributeError(name)

    def __repr__(self) -> str:
        return f"<{self.job_type}, held>"


class Held:
    """What one call of `delay` or `delay_many` enqueues, later, in the context in which it was called."""

    def __init__(self, job_type: str, count: int, enqueue: Callable[[Any], list[JobHandle]]) -> None:
        self.job_type = job_type
        self.handles: list[JobHandle] = [HeldHandle(job_type) for _ in range(count)]
        self._enqueue = enqueue
        self._context = copy_context()

    def enqueue(self, connection: Any = None) -> list[JobHandle]:
        """Enqueue the jobs on this connection, as for `.options(connection=…)`, or by themselves; to be settled then.

        Raises as `delay` does.
        """
        return self._context.run(self._enqueue, connection)

    def settle(self, enqueued: Sequence[JobHandle]) -> None:
        """Let the handles that were given out be those of the jobs that were enqueued, and are committed."""
        for handle, row in zip(self.handles, enqueued, strict=True):
            handle.id, handle.duplicate, handle.action = row.id, row.duplicate, row.action
            handle.__class__ = JobHandle


class Hold(abc.ABC):
    """Whoever holds jobs."""

    @abc.abstractmethod
    def take(self, held: Held) -> None:
        """Have them enqueued in time, or dropped."""


def release(held: Sequence[Held], settings: config.Settings) -> None:
    """Enqueue all of them, or none, in one transaction. Raises as `delay` does."""
    if len(held) == 1:
        held[0].settle(held[0].enqueue())
        return
    pool, storage = database_rooms()
    with lender(settings).connection() as connection, pool.bounded(settings.enqueue_timeout):
        with storage.atomic(connection):
            enqueued = [each.enqueue(connection) for each in held]
        for each, handles in zip(held, enqueued, strict=True):
            each.settle(handles)
