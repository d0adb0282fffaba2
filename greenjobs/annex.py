"""Where jobs run that are not for the event loop: threads, and processes. What the two have in common.

An annex has room for so many at a time. A runner claims no more of such jobs than there is room for, so that what waits
is left to other runners; those that came all the same, by claims that do not ask for room, are put aside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from greenjobs.elsewhere import ElsewhereCall

if TYPE_CHECKING:
    from greenjobs.current import Attempt

Surroundings = Sequence[Callable[[], AbstractContextManager[Any]]]


class User(Protocol):
    """Who brings jobs to an annex: the worker of a queue."""

    def count_waiting(self, annex: Annex) -> int:
        """How many jobs it has that are going to run there, and have not started."""

    def note_room_elsewhere(self) -> None:
        """There is room for one more. Returns at once."""


class Annex:
    """A place with room for `size` jobs at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.busy = 0
        self._reserved = 0
        self._users: list[User] = []

    def join(self, user: User) -> None:
        """From now on this user may bring jobs here, and hears when there is room."""
        if user not in self._users:
            self._users.append(user)

    @property
    def free(self) -> int:
        """How many jobs could start at this moment."""
        return self.size - self.busy

    @property
    def room(self) -> int:
        """How many jobs to claim, besides those that have been and are about to start."""
        return self.free - self._reserved - sum(user.count_waiting(self) for user in self._users)

    @contextlib.contextmanager
    def reserved(self, room: int) -> Iterator[None]:
        """Keep so much room, while jobs for it are claimed, from others that would claim for the same."""
        self._reserved += room
        try:
            yield
        finally:
            self._reserved -= room

    def leave(self) -> None:
        """A job has ended that had come in by adding itself to `busy`."""
        self.busy -= 1
        for user in self._users:
            user.note_room_elsewhere()

    def call(self, attempt: Attempt, surroundings: Surroundings) -> ElsewhereCall:
        """Run the attempt's function inside these; returns when it has ended. Blocks the greenlet, and nothing else."""
        raise NotImplementedError

    def close(self) -> None:
        """End what is idle here, and let what is not end with its job, or before."""
        raise NotImplementedError
