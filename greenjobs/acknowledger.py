"""Writes the outcomes of a runner's jobs, in groups and under the fences of their claims.

There is no timer and no added delay: while one statement is under way the next outcomes gather, and go together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import gevent
from gevent.event import Event

from greenjobs import storage
from greenjobs.storage import Failure, Fence

if TYPE_CHECKING:
    from greenjobs.service import Service

logger = logging.getLogger(__name__)

# An outcome may find up to this many others in its statement: some ten milliseconds of the server's time.
_LARGEST_GROUP = 2000

Item = TypeVar("Item")


class Group(Generic[Item]):
    """Gathers items and writes them together, one statement at a time."""

    def __init__(self, write: Callable[[Sequence[Item]], None]) -> None:
        self._write = write
        self._gathered: list[Item] = []
        self._in_writing: list[Item] = []
        self._arrived = Event()
        self._drained = Event()
        self._greenlet = gevent.spawn(self._write_for_ever)

    def add(self, item: Item) -> None:
        """Hand over one item; returns at once."""
        if not self._gathered:
            self._arrived.set()
        self._gathered.append(item)

    @property
    def pending(self) -> list[Item]:
        """What was handed over and is not written yet."""
        return self._in_writing + self._gathered

    def wait_empty(self) -> None:
        """Block until all that was handed over is written."""
        while self.pending:
            self._drained.clear()
            self._drained.wait()

    def stop(self) -> None:
        """End it; what is not written by then is not going to be."""
        self._greenlet.kill()

    def _write_for_ever(self) -> None:
        while True:
            self._arrived.wait()
            self._arrived.clear()
            while self._gathered:
                self._in_writing, self._gathered = self._gathered[:_LARGEST_GROUP], self._gathered[_LARGEST_GROUP:]
                self._write(self._in_writing)
                self._in_writing = []
            self._drained.set()


class Acknowledger:
    """Writes outcomes for all workers of a runner: finished jobs in one kind of group, failures in another.

    `on_settled` is called with the ids of jobs whose outcome the database has, or has refused.
    """

    def __init__(self, service: Service, *, on_settled: Callable[[set[int]], None]) -> None:
        self._service = service
        self._on_settled = on_settled
        self.done: Group[Fence] = Group(self._write_done)
        self.failed: Group[Failure] = Group(self._write_failed)

    def pending_ids(self) -> set[int]:
        """The jobs that are finished, which the database does not know yet."""
        return {fence.id for fence in self.done.pending} | {failure.fence.id for failure in self.failed.pending}

    def wait_empty(self) -> None:
        """Block until every outcome so far is in the database."""
        self.done.wait_empty()
        self.failed.wait_empty()

    def stop(self) -> None:
        """End it; see Group.stop."""
        self.done.stop()
        self.failed.stop()

    def _write_done(self, done: Sequence[Fence]) -> None:
        self._settle(self._service.call(storage.acknowledge, done), done)

    def _write_failed(self, failures: Sequence[Failure]) -> None:
        self._settle(self._service.call(storage.fail, failures), [failure.fence for failure in failures])

    def _settle(self, held: set[int], fences: Sequence[Fence]) -> None:
        if len(held) < len(fences):
            for fence in fences:
                if fence.id not in held:
                    logger.warning(
                        "job %s is no longer held by runner %s (attempt %s): its outcome changes nothing",
                        *(fence.id, fence.runner, fence.attempt),
                        extra={"job_id": fence.id, "attempt": fence.attempt, "runner": fence.runner},
                    )
        self._on_settled(held)
