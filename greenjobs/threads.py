"""Jobs in native threads, each with an event loop of its own: whoever computes, or waits in C code, holds only that.

The standard library is as cooperative there as everywhere in the process, and waits in the thread's own loop. So a job
that waits is interrupted as one in a greenlet is: the error is thrown into its greenlet, by its own loop. One that
computes has the error raised by the interpreter, at its next line of Python.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import gevent
from gevent.hub import Hub, Waiter
from gevent.monkey import get_original

from greenjobs import green, programs
from greenjobs.annex import Annex, Surroundings
from greenjobs.elsewhere import ElsewhereCall
from greenjobs.surroundings import call_within

if TYPE_CHECKING:
    from greenlet import greenlet

    from greenjobs.current import Attempt

# As concurrent.futures has it: enough for jobs that wait in C code, and few enough that the event loop, which needs the
# interpreter lock as well, gets it in time.
_MOST_THREADS = 32
_MORE_THAN_CORES = 4

# A job that waits hears within a turn of its loop; one that has not after this computes.
_HEARING_SECONDS = 0.1

# How long somebody waits for a lock before he looks whether it is free, at first, and when he has waited for a while.
_FIRST_LOOK_SECONDS = 0.001
# Thousands of greenlets may wait on a condition: their looks are to cost next to nothing.
_LONGEST_LOOK_SECONDS = 0.5

_get_ident: Callable[[], int] = get_original("_thread", "get_ident")
_start_thread = get_original("_thread", "start_new_thread")
_allocate_lock = get_original("_thread", "allocate_lock")


def default_size() -> int:
    """How many threads, where the settings do not say."""
    return min(_MOST_THREADS, (os.cpu_count() or 1) + _MORE_THAN_CORES)


class Threads(Annex):
    """The threads of a runner. They are started when they are needed, and wait for the next job then."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._idle: list[_Thread] = []
        self._is_closed = False

    def call(self, attempt: Attempt, surroundings: Surroundings) -> ElsewhereCall:
        """As in every annex; a payload that does not fit raises here."""
        job: Any = attempt.job
        args, kwargs = job.codec.decode(attempt.row.data)
        function = functools.partial(call_within, surroundings, job.function, args, kwargs)
        thread = self._idle.pop() if self._idle else _Thread()
        carrier = attempt.greenlet
        call = _ThreadCall(attempt, function, thread, self._take_back)
        attempt.elsewhere = call
        thread.tell(thread.begin, call)
        try:
            call.wait()
        finally:
            attempt.greenlet = carrier
        return call

    def close(self) -> None:
        """End the idle threads; the others end with their jobs, and keep no process from ending."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().stop()

    def _take_back(self, call: _ThreadCall) -> None:
        if self._is_closed:
            call.thread.stop()
        else:
            self._idle.append(call.thread)
        call.end()


class _ThreadCall(ElsewhereCall):
    """`on_end` is called in the event loop when the function has ended."""

    def __init__(
        self,
        attempt: Attempt,
        function: Callable[[], Any],
        thread: _Thread,
        on_end: Callable[[_ThreadCall], None],
    ) -> None:
        super().__init__()
        self.attempt = attempt
        self.thread = thread
        self._function = function
        self._context = contextvars.copy_context()
        self._on_end = on_end
        self._loop = gevent.get_hub().loop
        self._greenlet: greenlet | None = None
        # Between the end of the function and an error that is on its way from another thread.
        self._lock = _allocate_lock()
        self._has_ended = False
        self._told: set[int] = set()
        self._early: BaseException | None = None

    # --- in the event loop --------------------------------------------------------------------------------------------

    def interrupt(self, error: BaseException) -> None:
        """In its own loop if it waits there; else, soon after, wherever it computes."""
        self.thread.tell(self._raise_where_it_waits, error)
        gevent.get_hub().loop.timer(_HEARING_SECONDS, ref=False).start(self._raise_where_it_computes, error)

    def _raise_where_it_computes(self, error: BaseException) -> None:
        with self._lock:
            if not self._has_ended and id(error) not in self._told and self._greenlet is not None:
                self._told.add(id(error))
                _raise_in_thread(self.thread.ident, _raising(error))

    def frame(self) -> FrameType | None:
        """That of its greenlet, or of the thread, while it computes."""
        if self._greenlet is None:
            return None
        return self._greenlet.gr_frame or sys._current_frames().get(self.thread.ident)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Call the function, in a greenlet of the thread's loop."""
        try:
            self._run()
        except BaseException as error:  # what was raised from another thread, in the moment after the end
            self.error = error
        while not self._has_ended:
            try:
                self._close()
            except BaseException as error:
                self.error = error
        self.error = self.error and _original(self.error)
        self.thread.finish()
        self._loop.run_callback_threadsafe(self._on_end, self)

    def _run(self) -> None:
        self._greenlet = self.attempt.greenlet = gevent.getcurrent()
        try:
            if self._early is not None:
                raise self._early
            self.value = self._context.run(self._function)
        except BaseException as error:  # a job may raise anything
            trace = error.__traceback__ and error.__traceback__.tb_next
            self.error = error.with_traceback(trace)
        finally:
            self._close()

    def _close(self) -> None:
        """From here on nothing is raised from another thread, nor is what was about to be."""
        with self._lock:
            self._has_ended = True
            _raise_in_thread(self.thread.ident, None)

    def _raise_where_it_waits(self, error: BaseException) -> None:
        """In the hub of the thread."""
        with self._lock:
            if self._has_ended or id(error) in self._told:
                return
            self._told.add(id(error))
            if self._greenlet is None:
                self._early = error
                return
        self._greenlet.throw(error)

    def throw_stray(self, error: BaseException) -> None:
        """The job began to wait just when the error was raised, so that it came out elsewhere: pass it on, in the hub.

        It comes out in whatever line of Python is the next there, which may be the first one of a callback.
        """
        if self._greenlet is not None and not self._has_ended:
            self._greenlet.throw(error)


class _Thread:
    """A native thread with a loop, which is told what to do."""

    def __init__(self) -> None:
        self.ident = 0
        self._runners_loop = gevent.get_hub().loop
        self._mail: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._bell: Any = None
        self._call: _ThreadCall | None = None
        _share_locks()
        _start_thread(self._live, ())

    def tell(self, do: Callable[..., None], *args: Any) -> None:
        """Have this done in the hub of the thread, as soon as it is in there. From any thread; returns at once."""
        self._mail.append((do, args))
        if self._bell is not None:
            self._bell.send()

    def begin(self, call: _ThreadCall) -> None:
        """Run this call; in the hub of the thread."""
        self._call = call
        gevent.Greenlet(call.run).start()

    def finish(self) -> None:
        """The call has ended: keep nothing of it alive until the next one comes. In the thread."""
        self._call = None

    def stop(self) -> None:
        """End when nothing runs in it. From any thread; returns at once."""
        self.tell(lambda: self._end.switch(None))

    def _live(self) -> None:
        self.ident = _get_ident()
        hub = gevent.get_hub()
        hub.handle_error = functools.partial(self._note_error, hub.handle_error)  # type: ignore[method-assign]
        # sys.exit() in a greenlet that the job has made ends that alone: the main greenlet here has to go on.
        hub.handle_system_error = lambda *error: None  # type: ignore[method-assign]
        programs.watch_by(self._runners_loop, hub)
        self._end: Waiter[None] = Waiter(hub)
        bell = hub.loop.async_()
        bell.start(self._read_mail)
        self._bell = bell
        # What was sent before there was a bell.
        bell.send()
        self._end.get()
        self._bell = None
        bell.close()
        green.leave(hub)
        hub.destroy(destroy_loop=True)

    def _read_mail(self) -> None:
        while self._mail:
            do, args = self._mail.popleft()
            do(*args)

    def _note_error(self, note: Callable[..., None], context: Any, kind: Any, error: Any, trace: Any) -> None:
        """Something raised where nobody catches it. It may be what is for the job, which had just begun to wait."""
        if not _stands_for_another(error):
            note(context, kind, error, trace)
        elif self._call is not None:
            gevent.get_hub().loop.run_callback(self._call.throw_stray, error)
        if self._bell is not None:  # for what may not have been read
            self._bell.send()


# --- locks of several threads -----------------------------------------------------------------------------------------


@functools.cache
def _share_locks() -> None:
    """Have whoever waits for a lock of the standard library look at it himself, now and then.

    gevent tells those who wait that it is free in the loop of one of the threads that had to wait for it. That may be
    one which computes by then, for as long as its job does, or one that has ended: nobody would ever hear of it.
    """
    kind: Any = type(threading.Lock())
    acquire: Callable[..., bool] = kind.acquire

    def acquire_in_turns(lock: Any, blocking: bool = True, timeout: float | None = -1) -> bool:
        limit = math.inf if timeout is None or timeout == -1 else timeout
        if not blocking or limit <= _FIRST_LOOK_SECONDS or isinstance(gevent.getcurrent(), Hub):
            return acquire(lock, blocking, timeout)
        deadline, pause = time.monotonic() + limit, _FIRST_LOOK_SECONDS
        while not acquire(lock, True, pause):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            pause = min(2 * pause, _LONGEST_LOOK_SECONDS, left)
        return True

    if kind.__module__ == "gevent.thread":
        kind.acquire = acquire_in_turns


# --- raising in another thread ----------------------------------------------------------------------------------------


def _raise_in_thread(ident: int, error_type: type[BaseException] | None) -> None:
    """Have it raised at the thread's next line of Python; None: not, if it was not raised yet."""
    set_async = ctypes.pythonapi.PyThreadState_SetAsyncExc
    set_async(ctypes.c_ulong(ident), None if error_type is None else ctypes.py_object(error_type))


def _raising(error: BaseException) -> type[BaseException]:
    """A type that can be raised in place of the error: the interpreter takes no instance there."""
    kind = type(error)

    def __init__(self: BaseException) -> None:
        kind.__init__(self, *error.args)

    body = {"__init__": __init__, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "original": error}
    return type(kind.__name__, (kind,), body)


def _stands_for_another(error: object) -> bool:
    """Whether it was raised by the interpreter in place of another error."""
    return isinstance(error, BaseException) and hasattr(type(error), "original")


def _original(error: BaseException) -> BaseException:
    """The error in place of which this one was raised, if that is so."""
    original: BaseException | None = getattr(type(error), "original", None)
    return error if original is None else original.with_traceback(error.__traceback__)
