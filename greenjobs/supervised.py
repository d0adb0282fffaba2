"""A runner's line to its supervisor: what it is told, what it reports, and its end when the supervisor is gone.

A native thread listens, so that neither an application that is still being imported nor a job that holds the event loop
keeps the child from hearing. A child whose supervisor was killed stops as on SIGTERM: what runs may finish within
`grace`, the rest is given back. Should it hang, it kills itself: it is no orphan for longer than that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
from typing import TYPE_CHECKING

import gevent
from gevent.monkey import get_original

from greenjobs import order, supervisor
from greenjobs.errors import ConfigError
from greenjobs.memory import resident_megabytes

if TYPE_CHECKING:
    from greenjobs.config import Settings
    from greenjobs.runner import RunnerHandle

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Ends a child of whose start nobody waits for the outcome any more.
_EXIT_UNSUPERVISED = 1

_LOOK_SECONDS = 0.25


class Line:
    """The child's end of the line. It may be ended at any time until `begin`; from then on it is told to stop."""

    def __init__(self, fd: int, settings: Settings, http: str | None = None) -> None:
        self.http = http
        """Where the supervisor asks this process how it is, if it does."""
        self._fd = fd
        self._settings = settings
        self._loop = gevent.get_hub().loop
        self._has_begun = False
        self._urgency = 0
        self._handle: RunnerHandle | None = None
        get_original("_thread", "start_new_thread")(self._listen, ())

    @classmethod
    def open(cls, settings: Settings) -> Line | None:
        """The line to the supervisor of this process, None when it has none; exits if it is gone already."""
        given = os.environ.pop(order.SUPERVISED, None)
        http = os.environ.pop(supervisor.SUPERVISED_HTTP, None)
        if given is None:
            return None
        parent, fd = (int(part) for part in given.split(":"))
        os.set_inheritable(fd, False)
        # Which it is not when something has had gevent patch the supervisor, such as what instruments all processes.
        os.set_blocking(fd, True)
        if sys.platform == "linux":
            import ctypes

            # Whoever else may hold the other end of the line, this comes. Not SIGTERM: systemd may send that as well.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
        if os.getppid() != parent:  # it died before that was arranged
            sys.exit(_EXIT_UNSUPERVISED)
        return cls(fd, settings, http)

    def begin(self, settings: Settings) -> None:
        """From here on there is something to lose: a wish to stop is passed on to the runner, once there is one.

        The settings are those that the application was heard about, too. Raises ConfigError when the process is too
        large to live by its own limit.
        """
        self._settings = settings
        limit, megabytes = self._settings.max_memory, resident_megabytes()
        if limit is not None and megabytes >= limit:
            raise ConfigError(
                f"max_memory is {limit}, but this process takes {megabytes:.0f} MB before its first job; "
                f"allow it more, such as {2 * megabytes:.0f}"
            )
        self._has_begun = True

    def report_up(self, handle: RunnerHandle) -> None:
        """Tell the supervisor that this runner claims; from now on it stops when it is told to, and asks to be replaced
        when it has reached a limit."""
        self._handle = handle
        self._heed(self._urgency)
        self._say(supervisor.UP, str(self._settings.grace))
        gevent.spawn(self._watch_limits, handle)

    # --- hear ---------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """In a thread of its own, in which nothing is cooperative."""
        unread = b""
        while data := self._read():
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                word, _, urgency = line.decode().partition(" ")
                if word == supervisor.STOP:
                    self._pass_on(int(urgency), status=0)
        self._pass_on(1, status=_EXIT_UNSUPERVISED)
        self._loop.run_callback_threadsafe(gevent.spawn, logger.warning, "the supervisor is gone; stopping")
        get_original("time", "sleep")(self._settings.grace + supervisor.STUCK_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, 4096)
        except OSError:
            return b""

    def _pass_on(self, urgency: int, *, status: int) -> None:
        if not self._has_begun:
            os._exit(status)
        self._loop.run_callback_threadsafe(self._heed, urgency)

    def _heed(self, urgency: int) -> None:
        self._urgency = max(self._urgency, urgency)
        if self._handle is not None and self._urgency:
            self._handle.shutdown(urgency=self._urgency)

    # --- say ----------------------------------------------------------------------------------------------------------

    def _say(self, *words: str) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone, which the thread hears
            os.write(self._fd, f"{' '.join(words)}\n".encode())

    def _watch_limits(self, handle: RunnerHandle) -> None:
        """Ask to be replaced, once, when a limit is reached. The runner goes on until its successor has come up."""
        settings = self._settings
        # A tenth of chance, so that processes that were started together do not all come to their end together.
        most_jobs = settings.max_jobs and settings.max_jobs - random.randrange(settings.max_jobs // 10 + 1)
        while True:
            finished, megabytes = handle.finished_jobs(), resident_megabytes()
            if most_jobs is not None and finished >= most_jobs:
                self._say(supervisor.RETIRE, f"it has finished {finished} jobs (max_jobs)")
                return
            # Without a job it will not have grown, and the next would be as large.
            if settings.max_memory is not None and megabytes >= settings.max_memory and finished:
                self._say(supervisor.RETIRE, f"it occupies {megabytes:.0f} MB (max_memory) after {finished} jobs")
                return
            gevent.sleep(_LOOK_SECONDS)
