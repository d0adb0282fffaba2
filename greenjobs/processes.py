"""Jobs in processes of their own: fresh interpreters that have loaded the application, one job at a time in each.

A runner starts one more whenever none is free, up to the size, and claims such a job only when there is a process that
waits for it. So a process that does not start fails no job; and what ends one, be it kill -9 or the kernel for want of
memory, fails only the job in it. A process ends with its runner, whatever ends that.

greenjobs.job_process is what happens at the other end of the line.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import AsyncResult
from gevent.lock import BoundedSemaphore

from greenjobs import config
from greenjobs.annex import Annex, Surroundings
from greenjobs.current import begin_report
from greenjobs.elsewhere import CompletedElsewhere, ElsewhereCall
from greenjobs.errors import JobControl, JobProcessDied, JobProcessError
from greenjobs.frames import pack, unpack
from greenjobs.metrics_folder import JobProcessMetrics
from greenjobs.policy import Verdict

if TYPE_CHECKING:
    from greenjobs.current import Attempt

logger = logging.getLogger(__name__)

# The path of the runner, so that the application is found as it was there; and nothing of the working directory before.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from greenjobs.job_process import main; main(sys.argv[1])"

# A job that was told to end has so long to tidy up, which is a little less than a runner that is to stop waits for it.
_TIDY_SECONDS = 4.0

# A process is given so long to say where its job stands.
_STACK_SECONDS = 0.5

# A process that has hung up, or is to end, has so long to do so.
_END_SECONDS = 5.0

# One that did not come up is started again after a pause, which doubles from one to the other.
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0

# An order that so many processes died of, each before it had begun, goes to no other.
_MOST_GIVEN_OUT = 3


@dataclass(frozen=True, slots=True)
class Origin:
    """What the processes of a runner have to know of it. `runner_ids` become more."""

    application: str | None
    settings: config.Settings
    database_url: str
    runner_name: str
    runner_ids: Sequence[int]

    def hello(self) -> dict[str, Any]:
        """The first message to a process."""
        settings = {name: getattr(self.settings, name) for name in config.OPTIONS}
        settings["database_url"] = self.database_url
        return {"application": self.application, "settings": settings, "runner_name": self.runner_name}


class Processes(Annex):
    """The processes of a runner."""

    def __init__(self, size: int, origin: Origin) -> None:
        super().__init__(size)
        self._origin = origin
        self._children: list[_Child] = []
        self._idle: list[_Child] = []
        self._awaiting: deque[_ProcessCall] = deque()
        self._failed_starts = 0
        self._is_pausing = False
        self._is_closed = False
        self.metrics_numbers: set[int] = set()

    def start(self) -> None:
        """Have a process ready for the first job; returns at once."""
        self._provide()

    @property
    def free(self) -> int:
        """How many processes have come up, and wait."""
        return sum(child.is_up for child in self._children) - self.busy

    def call(self, attempt: Attempt, surroundings: Surroundings) -> ElsewhereCall:
        """As in every annex; a process has surroundings of its own."""
        call = _ProcessCall(attempt)
        attempt.elsewhere = call
        self._awaiting.append(call)
        self._distribute()
        call.wait()
        return call

    def note_runner_ids(self) -> None:
        """The runner has one more id: a job that completes in its process is known by all of them. Returns at once."""
        for child in self._children:
            child.say_runner_ids(self._origin)

    def close(self) -> None:
        """End them; blocks until they are gone. A job that still runs in one ends with it."""
        self._is_closed = True
        children = tuple(self._children)
        for child in children:
            if child.call is not None:
                child.kill()
            child.hang_up()
        gevent.joinall([child.greenlet for child in children], timeout=_END_SECONDS)
        for child in children:
            child.kill()
        gevent.joinall([child.greenlet for child in children], timeout=_END_SECONDS)

    # --- who runs what ------------------------------------------------------------------------------------------------

    def _provide(self) -> None:
        """Start a process unless one is free, or on its way."""
        is_enough = any(child.call is None and not child.is_leaving for child in self._children)
        if self._is_closed or self._is_pausing or is_enough or len(self._children) >= self.size:
            return
        try:
            self._children.append(_Child(self._origin, self))
        except OSError as error:
            self._provide_later(f"no process for jobs can be made: {error}")

    def _provide_later(self, why: str, **keys: Any) -> None:
        pause = min(_FIRST_PAUSE_SECONDS * 2.0 ** min(self._failed_starts, 10), _LONGEST_PAUSE_SECONDS)
        self._failed_starts += 1
        self._is_pausing = True
        gevent.spawn_later(pause, self._provide_now)
        logger.error("%s; jobs for it wait; trying again in %.0f s", why, pause, extra=keys)

    def _provide_now(self) -> None:
        self._is_pausing = False
        self._provide()

    def _distribute(self) -> None:
        while self._awaiting and (self._awaiting[0].is_over or self._idle):
            call = self._awaiting.popleft()
            if not call.is_over:  # it was told to end meanwhile
                self._idle.pop().run(call, self._origin)
        self._provide()

    # --- what the processes say ---------------------------------------------------------------------------------------

    def note_up(self, child: _Child) -> None:
        """It waits for its first job."""
        self._failed_starts = 0
        self._note_idle(child)

    def note_done(self, child: _Child, megabytes: float) -> None:
        """It has finished a job, and occupies so much memory."""
        settings = self._origin.settings
        if settings.max_jobs is not None and child.finished >= settings.max_jobs:
            why = f"it has finished {child.finished} jobs (max_jobs)"
        elif settings.max_memory is not None and megabytes >= settings.max_memory:
            why = f"it occupies {megabytes:.0f} MB (max_memory) after {child.finished} jobs"
        else:
            self._note_idle(child)
            return
        logger.info("job process %s is to be replaced: %s", child.pid, why)
        child.is_up = False
        child.hang_up()
        self._provide()

    def _note_idle(self, child: _Child) -> None:
        self._idle.append(child)
        self._distribute()
        for user in self._users:
            user.note_room_elsewhere()

    def note_end(self, child: _Child, status: int | None) -> None:
        """It is gone."""
        self._children.remove(child)
        if child in self._idle:
            self._idle.remove(child)
        call = child.call
        is_in_job = call is not None and (call.has_begun or call.attempt.interrupted_by is not None)
        if call is not None and (is_in_job or call.given_out >= _MOST_GIVEN_OUT):
            when = "" if is_in_job else f" before it began, as {call.given_out - 1} others had"
            call.fail(JobProcessDied(f"its process {child.pid} {_described(status)}{when}", status=status))
        elif call is not None:  # it died before the job came, which is for another one, then
            call.child = None
            self._awaiting.appendleft(call)
        if self._is_closed:
            return
        if child.has_been_up or child.is_leaving:
            if not (is_in_job or child.is_leaving):  # else the job that ran there says it
                logger.warning(
                    "job process %s %s while it waited for a job; another takes its place",
                    *(child.pid, _described(status)),
                    extra={"pid": child.pid},
                )
            self._distribute()
            return
        self._provide_later(f"job process {child.pid} {_described(status)} and did not come up", pid=child.pid)


class _ProcessCall(ElsewhereCall):
    def __init__(self, attempt: Attempt) -> None:
        super().__init__()
        self.attempt = attempt
        self.child: _Child | None = None
        self.given_out = 0
        """To how many processes it was given."""
        self.has_begun = False

    def interrupt(self, error: BaseException) -> None:
        """There, and with the process if the job does not end by that."""
        if self.is_over:
            return
        if self.child is None:
            self.fail(error)
            return
        gevent.spawn(self.child.tell_to_raise, self, error)
        if isinstance(error, JobControl):
            gevent.spawn_later(_TIDY_SECONDS, self._kill)

    def lines(self) -> list[str]:
        """As the process itself says, or what stands for it."""
        told = self.child.ask_where(self) if self.child is not None and self.has_begun else None
        return told or [self.where]

    @property
    def where(self) -> str:
        """Only the process itself could say more."""
        return super().where if self.child is None else f"(in process {self.child.pid}, which prints it on SIGQUIT)"

    def fail(self, error: BaseException) -> None:
        """End with an error of this process."""
        self.error = error
        self.end()

    def answer(self, message: Mapping[str, Any]) -> None:
        """End with what the process says of it."""
        if message["completed"]:
            self.attempt.completion = CompletedElsewhere()
        if message["error"] is not None:
            self.error = _rebuilt(message["error"])
            self.record = message["record"]
            self.is_reported = message["is_reported"]
            self.verdict = message["verdict"] and Verdict(*message["verdict"])
        elif message["result"] is not None:
            result, complaint = message["result"]
            self.encoded = result, complaint
        self.end()

    def _kill(self) -> None:
        if not self.is_over and self.child is not None:
            row = self.attempt.row
            logger.warning(
                "job %s (%s) did not end when it was told to: its process %s is killed",
                *(row.id, row.job_type, self.child.pid),
                extra={"job_id": row.id, "job_type": row.job_type, "pid": self.child.pid},
            )
            self.child.kill()


class _Child:
    """One process, from its start on; `greenlet` ends when it has ended."""

    def __init__(self, origin: Origin, processes: Processes) -> None:
        self.call: _ProcessCall | None = None
        self.finished = 0
        self.is_up = self.has_been_up = self.is_leaving = False
        self.pid = 0
        self._processes = processes
        self._process: subprocess.Popen[bytes] | None = None
        self._sending = BoundedSemaphore()
        self._asked: AsyncResult[tuple[int | None, list[str]]] | None = None
        self._line, self._theirs = socket.socketpair()
        self._metrics = JobProcessMetrics(processes.metrics_numbers)
        self.greenlet = gevent.spawn(self._live, origin)

    # --- say ----------------------------------------------------------------------------------------------------------

    def run(self, call: _ProcessCall, origin: Origin) -> None:
        """Have this call made there; returns at once."""
        self.call, call.child = call, self
        call.given_out += 1
        attempt = call.attempt
        order = {
            "do": "run",
            "row": attempt.row._replace(start_by=None),
            "queue": attempt.place.queue,
            "runner_ids": list(origin.runner_ids),
        }
        gevent.spawn(self._say, order)

    def tell_to_raise(self, call: _ProcessCall, error: BaseException) -> None:
        """Have this error raised in the job, if it still runs."""
        if self.call is call:
            row = call.attempt.row
            claim = [row.id, row.attempt]
            self._say({"do": "raise", "claim": claim, "error": type(error).__name__, "text": str(error)})

    def ask_where(self, call: _ProcessCall) -> list[str] | None:
        """Where this call stands; None if it does not say so at once, as C code may keep it from doing."""
        if self._asked is None:
            self._asked = AsyncResult()
            gevent.spawn(self._say, {"do": "show"})
        told: tuple[int | None, list[str]] | None = self._asked.wait(_STACK_SECONDS)
        return told[1] if told is not None and told[0] == call.attempt.row.id else None

    def say_runner_ids(self, origin: Origin) -> None:
        """Have it know the ids of the runner, as they are now; returns at once."""
        if self.is_up:  # else it hears of them with its first job
            gevent.spawn(self._say, {"do": "know", "runner_ids": list(origin.runner_ids)})

    def hang_up(self) -> None:
        """Let it end, or make it, where it does not; returns at once."""
        self.is_leaving, self.is_up = True, False
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_WR)
        # A thread of the application's may keep it from ending.
        gevent.spawn_later(_END_SECONDS, self.kill)

    def kill(self) -> None:
        """End it at once, unless it has ended."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _say(self, message: Mapping[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError):  # it is gone, which is noticed elsewhere
            self._line.sendall(pack(message))

    # --- hear ---------------------------------------------------------------------------------------------------------

    def _live(self, origin: Origin) -> None:
        status = None
        try:
            self._start()
            self._say(origin.hello())
            while message := unpack(self._line.recv):
                self._answer(message)
            status = self._wait()
        except OSError as error:
            logger.error("cannot start a process for jobs: %s", error)
        finally:
            self._theirs.close()
            self._line.close()
            self.is_up = False
            if status is None:  # what it said was not to be understood, and it may still be at work
                self.kill()
            self._metrics.forget(self.pid)
            self._processes.note_end(self, status)

    def _start(self) -> None:
        fd = self._theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, f"{os.getpid()}:{fd}", *sys.path],
            stdin=subprocess.DEVNULL,
            pass_fds=[fd],
            env={**os.environ, **self._metrics.environment()},
            start_new_session=True,  # Ctrl-C is for the runner
        )
        self._theirs.close()
        self.pid = self._process.pid
        gevent.spawn(self._listen_no_longer_than_it_lives, self._process)

    def _listen_no_longer_than_it_lives(self, process: subprocess.Popen[bytes]) -> None:
        """A program that the job started may hold the other end of the line for longer."""
        process.wait()
        gevent.sleep(1.0)  # for what is still on the line
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)

    def _wait(self) -> int | None:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_END_SECONDS)
        self.kill()
        return self._process.wait()

    def _answer(self, message: Mapping[str, Any]) -> None:
        what, call = message["what"], self.call
        if what == "up":
            self.is_up = self.has_been_up = not self.is_leaving
            if self.is_up:
                self._processes.note_up(self)
        elif what == "stands" and self._asked is not None:
            asked, self._asked = self._asked, None
            asked.set((message["id"], message["stack"]))
        elif call is None or message["id"] != call.attempt.row.id:
            return
        elif what == "begun":
            call.has_begun = True
        elif what == "said":
            (call.attempt.report or begin_report(call.attempt)).receive(message["document"])
        elif what == "ended":
            self.call = None
            self.finished += 1
            call.answer(message)
            self._processes.note_done(self, message["megabytes"])


class _ProcessTraceback(Exception):
    """The traceback of an error in another process, as text."""

    def __str__(self) -> str:
        return f"in its own process:\n{self.args[0]}"


def _rebuilt(described: Mapping[str, Any]) -> BaseException:
    """The error, as far as this process knows its class, without having called that; else what stands for it."""
    error: BaseException = JobProcessError(f"{described['type']}: {described['message']}")
    with contextlib.suppress(Exception):  # a class may be anything
        kind = functools.reduce(getattr, described["type"].split("."), sys.modules[described["module"]])
        if isinstance(kind, type) and issubclass(kind, BaseException):
            known = kind.__new__(kind, *described["args"])
            known.args = tuple(described["args"])
            known.__dict__.update(described["state"])
            error = known
    error.__cause__ = _ProcessTraceback(described["traceback"])
    return error


def _described(status: int | None) -> str:
    if status is None:
        return "could not be started"
    if status >= 0:
        return f"ended with status {status}"
    name = f"signal {-status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
    return f"was ended by {name}"
