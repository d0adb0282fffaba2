"""Writes the outcomes of a runner's jobs, in groups and under the fences of their claims.

There is no timer and no added delay: while one statement is under way the next outcomes gather, and go together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gevent.event import Event

from greenjobs import storage
from greenjobs.reporter import Reporter
from greenjobs.storage import Ended, Failure, Fence, Snoozed

if TYPE_CHECKING:
    from greenjobs.service import Service, Spawn

logger = logging.getLogger(__name__)

# An outcome may find up to this many others in its statement: some ten milliseconds of the server's time.
_LARGEST_GROUP = 2000

# Results are gathered up to so many bytes for one statement, or one result that is larger.
_LARGEST_RESULTS = 4 * 1024 * 1024

Item = TypeVar("Item")


class Group(Generic[Item]):
    """Gathers items and writes them together, one statement at a time."""

    def __init__(
        self, write: Callable[[Sequence[Item]], None], spawn: Spawn, on_written: Sequence[Callable[[float], None]] = ()
    ) -> None:
        self._write = write
        self._on_written = on_written
        self._gathered: list[Item] = []
        self._in_writing: list[Item] = []
        self._arrived = Event()
        self._drained = Event()
        self._greenlet = spawn(self._write_for_ever)

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
                started = time.perf_counter()
                self._write(self._in_writing)
                self._in_writing = []
                for tell in self._on_written:
                    tell(time.perf_counter() - started)
            self._drained.set()


class Acknowledger:
    """Writes outcomes for all workers of a runner: done, ended in another way or to be kept, failed, put off; or
    interrupted, or unfinished, which has not even started, both of which count nothing.

    `on_settled` is called with the ids of jobs whose outcome the database has, or has refused.
    """

    def __init__(self, service: Service, *, on_settled: Callable[[set[int]], None], spawn: Spawn) -> None:
        self._service = service
        self._on_settled = on_settled
        self.reporter = Reporter(service, spawn=spawn)
        self.on_written: list[Callable[[float], None]] = []
        """Called with how many seconds it took to write a group of outcomes; must not raise."""
        self.done: Group[Fence] = Group(self._write_done, spawn, self.on_written)
        self.ended: Group[Ended] = Group(self._write_ended, spawn, self.on_written)
        self.failed: Group[Failure] = Group(self._write_failed, spawn, self.on_written)
        self.unfinished: Group[Fence] = Group(self._write_unfinished, spawn, self.on_written)
        self.interrupted: Group[Fence] = Group(self._write_interrupted, spawn, self.on_written)
        self.snoozed: Group[Snoozed] = Group(self._write_snoozed, spawn, self.on_written)
        self._groups = (self.done, self.ended, self.failed, self.unfinished, self.interrupted, self.snoozed)

    def pending_ids(self) -> set[int]:
        """The jobs that are finished, which the database does not know yet."""
        fences = self.done.pending + self.unfinished.pending + self.interrupted.pending
        fences += [ended.fence for ended in self.ended.pending]
        fences += [failure.fence for failure in self.failed.pending]
        fences += [snoozed.fence for snoozed in self.snoozed.pending]
        return {fence.id for fence in fences}

    def note_completed(self, fence: Fence) -> None:
        """Nothing is to be written: the job has done so itself, in its own transaction."""
        self._on_settled({fence.id})

    def wait_empty(self) -> None:
        """Block until every outcome so far is in the database."""
        for group in self._groups:
            group.wait_empty()

    def stop(self) -> None:
        """End it; see Group.stop."""
        self.reporter.stop()
        for group in self._groups:
            group.stop()

    def _write_done(self, done: Sequence[Fence]) -> None:
        self._write(storage.acknowledge, done, done)

    def _write_ended(self, ended: Sequence[Ended]) -> None:
        self.reporter.flush()
        for batch in _by_size(ended):
            self._write(storage.end, batch, [each.fence for each in batch])

    def _write_failed(self, failures: Sequence[Failure]) -> None:
        self.reporter.flush()
        self._write(storage.fail, failures, [failure.fence for failure in failures])

    def _write_snoozed(self, snoozed: Sequence[Snoozed]) -> None:
        self.reporter.flush()
        self._write(storage.snooze, snoozed, [each.fence for each in snoozed])

    def _write_unfinished(self, unfinished: Sequence[Fence]) -> None:
        self.reporter.flush()
        self._write_held(storage.give_back, unfinished, unfinished)
        self._on_settled({fence.id for fence in unfinished})

    def _write_interrupted(self, interrupted: Sequence[Fence]) -> None:
        self.reporter.flush()
        self._write_held(storage.give_back, interrupted, interrupted, has_started=True)
        self._on_settled({fence.id for fence in interrupted})

    def _write(self, write: Callable[..., set[int]], items: Sequence[Any], fences: Sequence[Fence]) -> None:
        failures_before = self._service.failures
        held = self._write_held(write, items, fences)
        self._settle(held, fences, is_sure=self._service.failures == failures_before)

    def _write_held(
        self, write: Callable[..., set[int]], items: Sequence[Any], fences: Sequence[Fence], **options: bool
    ) -> set[int]:
        """Write down what became of the claims of these fences, one for each item; returns the ids of those held."""
        service = self._service
        known = len(service.runner_ids)
        held = service.call(write, service.runner_ids, items, **options)
        # The others may be held under an id that this process got while the statement was on its way.
        while len(held) < len(fences) and known < len(service.runner_ids):
            known = len(service.runner_ids)
            left = [item for item, fence in zip(items, fences, strict=True) if fence.id not in held]
            held |= service.call(write, service.runner_ids, left, **options)
        return held

    def _settle(self, held: set[int], fences: Sequence[Fence], *, is_sure: bool) -> None:
        """Report outcomes that were refused. Not `is_sure` when a try before may have been done and not answered."""
        if len(held) < len(fences) and is_sure:
            for fence in fences:
                if fence.id not in held:
                    logger.warning(
                        "job %s is no longer held here (claim %s): its outcome changes nothing",
                        *(fence.id, fence.attempt),
                        extra={"job_id": fence.id, "claim": fence.attempt},
                    )
        self._on_settled({fence.id for fence in fences})


def _by_size(ended: Sequence[Ended]) -> Iterator[list[Ended]]:
    batch: list[Ended] = []
    size = 0
    for each in ended:
        more = len(each.result or "")
        if batch and size + more > _LARGEST_RESULTS:
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += more
    yield batch
