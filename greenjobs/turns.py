"""Whose turn it is when a job has ended that excluded others: the next one starts at once, here or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from gevent.pool import Group

from greenjobs import storage

if TYPE_CHECKING:
    from greenjobs.service import Service
    from greenjobs.worker import Worker


class Fellow(Protocol):
    """What the turns need of their runner."""

    workers: Mapping[str, Worker]

    def claim_suspect(self, queue: str) -> None:
        """Take one job whose runner died from this queue, unless one is held here."""


class Turns:
    """Passes the turn on for the exclusive keys of a runner's jobs."""

    def __init__(self, fellow: Fellow, service: Service) -> None:
        self._fellow = fellow
        self._service = service
        self._under_way = Group()

    def settled(self, jobs: set[int]) -> None:
        """The database knows that these jobs run here no more: pass on the turns of those that had a key. Returns at
        once."""
        for worker in self._fellow.workers.values():
            if worker.exclusive_keys:
                keys = [worker.exclusive_keys.pop(id) for id in jobs & worker.exclusive_keys.keys()]
                if keys:
                    self._under_way.spawn(self._pass_on, worker, keys)

    def wait(self) -> None:
        """Block until every turn so far is passed on."""
        self._under_way.join()

    def stop(self) -> None:
        """End it; whose turn was not passed on is found when somebody looks by itself."""
        self._under_way.kill()

    def _pass_on(self, worker: Worker, keys: Sequence[str]) -> None:
        # Where the last one ran there is room now, most likely, and nobody has to be woken.
        taken = worker.claim_next(keys)
        left = [key for key in keys if key not in taken]
        if left:
            for queue in self._service.call(storage.wake_next, left, queues=list(self._fellow.workers)):
                self._fellow.claim_suspect(queue)
