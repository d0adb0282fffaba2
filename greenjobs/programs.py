"""Programs that jobs in threads start: what gevent lacks for that.

Only the loop of the main thread can watch for the end of a program, and gevent's subprocess asks the loop of the thread
that it is called in. Here the main one is asked. It stands still from the fork until it watches: it reaps whatever has
ended, and the status of a program that it does not know yet would be lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gevent.os
import gevent.subprocess
from gevent.monkey import get_original

# Who is ended in the middle of it does not stop the loop for longer.
_LONGEST_SECONDS = 1.0

_allocate_lock = get_original("_thread", "allocate_lock")

_fork_and_watch: Callable[..., int] = gevent.os.fork_and_watch


def watch_by(loop: Any, hub: Any) -> None:
    """Have the loop of the main thread watch the programs that are started in the thread of this hub."""
    hub.watching_loop = loop
    gevent.subprocess.fork_and_watch = _fork  # type: ignore[attr-defined]  # the stubs lack it


def _fork(callback: Any = None, loop: Any = None, ref: bool = False, fork: Any = gevent.os.fork_gevent) -> int:
    """As fork_and_watch of gevent.os, for all threads."""
    hub = gevent.get_hub()
    watching = getattr(hub, "watching_loop", None)
    if watching is None or callback is None:
        return _fork_and_watch(callback, loop, ref, fork)

    def tell(watcher: Any) -> None:
        # There, for events of gevent are not for two threads; and as it is now, for it is closed when this returns.
        own_loop = hub.loop
        if own_loop is not None:  # the thread may have ended
            own_loop.run_callback_threadsafe(callback, _Ended(watcher.rpid, watcher.rstatus))

    with _standing_still(watching):
        return _fork_and_watch(tell, watching, ref, fork)


@dataclass(frozen=True, slots=True)
class _Ended:
    """A program that has ended, as a watcher shows it."""

    rpid: int
    rstatus: int

    def stop(self) -> None:
        """It watches no longer."""


@contextlib.contextmanager
def _standing_still(loop: Any) -> Iterator[None]:
    """Keep a loop of another thread from its turns; blocks this thread until it is there."""
    stands, may_go = _allocate_lock(), _allocate_lock()
    stands.acquire()
    may_go.acquire()

    def stand() -> None:
        stands.release()
        may_go.acquire(timeout=_LONGEST_SECONDS)

    loop.run_callback_threadsafe(stand)
    stands.acquire()
    try:
        yield
    finally:
        may_go.release()
