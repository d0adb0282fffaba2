"""Several runners, each in its own interpreter: kept at work, replaced when their time has come, stopped together.

The supervisor itself is light: no gevent, no psycopg2, no application, no connection. Its children are started by the
command line that it was started by itself, never forked, as a forked child would go on with its parent's greenlets.

Each child is in a session of its own, so that Ctrl-C in a terminal reaches the supervisor alone. What the supervisor
wants of its children it says over a socket, and how urgent it is: a child that hears the same from others too (systemd
sends SIGTERM to every process of a service) does not take that for a second signal, which would mean impatience. The
end of that socket tells the child that its supervisor is gone.

A child that is to be replaced works on until its successor claims jobs, and only then drains. So there are never fewer
processes at work than before, and code that does not start replaces nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from greenjobs import logs
from greenjobs.address import Address
from greenjobs.bell import ASKED, FILES_CHANGED, Bell, watching_files
from greenjobs.errors import ConfigError
from greenjobs.metrics_folder import MetricsFolder, free_number
from greenjobs.order import SUPERVISED, Order
from greenjobs.systemd import Notifier
from greenjobs.version import __version__

if TYPE_CHECKING:
    from greenjobs.supervisor_http import Front, Picture

logger = logging.getLogger(__name__)

# What a person can mend ends with click's own status for a wrong command line.
EXIT_MISTAKE = 2

SUPERVISED_HTTP = "GREENJOBS_SUPERVISED_HTTP"
"""The one that tells a child where it is to answer, for its supervisor, how it is."""

# The lines that are said over it; what follows the word are its arguments.
UP = "up"
RETIRE = "retire"
STOP = "stop"

STUCK_SECONDS = 30.0
"""How much longer than `grace` a child may take to end. Tidying up and writing outcomes takes at most half of it."""

# A child that ends earlier than this has not proved that it can live; the next is started after a pause.
_EARLY_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 60.0
_MANY_EARLY_DEATHS = 3

# How long somebody who asks waits for the loop, which has nothing to do that takes long.
_ANSWER_SECONDS = 2.0


def supervise(order: Order) -> int:
    """Be the supervisor, until it is told to stop; returns the exit status. The children get this process's arguments.

    Call it in the main thread: on Linux a child is told when the thread ends that started it.
    """
    logs.set_up(order.settings)
    if order.reload:
        try:
            import watchfiles  # noqa: F401
        except ImportError:
            message = "greenjobs: --reload needs watchfiles, which the extra brings: pip install 'greenjobs[reload]'"
            print(message, file=sys.stderr)
            return EXIT_MISTAKE
    notifier = Notifier.taken()
    try:
        supervisor = Supervisor(order, [sys.executable, *sys.orig_argv[1:]], notifier)
    except ConfigError as error:
        print(f"greenjobs: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    return supervisor.run()


@dataclass(slots=True, eq=False)
class _Child:
    process: subprocess.Popen[bytes]
    line: socket.socket
    slot: _Slot
    generation: int
    number: int
    """That of its metrics; one that starts when this one has ended may get it, too."""
    started_at: float
    address: Address | None
    is_up: bool = False
    is_leaving: bool = False
    grace: float = 0.0
    """How long it takes to stop, at most: its own setting, which may be newer than that of the supervisor."""
    kill_at: float = math.inf
    unread: bytes = b""

    @property
    def age(self) -> float:
        return time.monotonic() - self.started_at

    @property
    def state(self) -> str:
        """Which part of its life it is in."""
        return "leaving" if self.is_leaving else "up" if self.is_up else "starting"

    def __str__(self) -> str:
        return f"process {self.process.pid}"


@dataclass(frozen=True, slots=True)
class _Renewal:
    """Why a child is to be replaced, and since when."""

    reason: str
    asked_at: float
    is_reload: bool


@dataclass(slots=True, eq=False)
class _Slot:
    """One of the processes that there are to be, whichever it is at the moment."""

    child: _Child | None = None
    successor: _Child | None = None
    renewal: _Renewal | None = None
    early_deaths: int = 0
    not_before: float = 0.0
    is_done: bool = False


class Supervisor:
    """Keeps the processes of an order at work, each started by `command`. Raises ConfigError where it cannot answer."""

    def __init__(self, order: Order, command: Sequence[str], notifier: Notifier) -> None:
        self._order = order
        self._command = command
        self._folder = _working_folder()
        self._slots = [_Slot() for _ in range(order.settings.processes)]
        self._children: list[_Child] = []
        self._metrics = MetricsFolder()
        self._generation = 0
        self._has_been_up = False
        self._looked_at = 0.0
        self._stops = 0
        self._status = 0
        self._selector = selectors.DefaultSelector()
        self._bell = Bell()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._has_terminal = _has_terminal()
        self._outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as nohup has it
        self._notifier = notifier
        self._beat_at = 0.0 if notifier.is_heard else math.inf
        self._is_reloading = False
        self._questions: deque[queue.SimpleQueue[Picture]] = deque()
        self._front = self._make_front(order.settings.http)

    def run(self) -> int:
        """Work until all children have ended for good; returns the exit status."""
        logger.info("greenjobs %s, supervisor %s of %s processes", __version__, os.getpid(), len(self._slots))
        watching = watching_files(self._bell, self._folder) if self._order.reload else contextlib.nullcontext()
        with contextlib.closing(self._metrics), self._bell.hearing_signals(), watching, self._answering():
            while not self._is_over():
                self._start_what_is_due()
                self._wait()
                self._reap()
                self._kill_the_stuck()
                self._tell_systemd()
        logger.info("supervisor %s ends with status %s", os.getpid(), self._status)
        return self._status

    def _is_over(self) -> bool:
        return not self._children and (self._stops > 0 or all(slot.is_done for slot in self._slots))

    # --- start --------------------------------------------------------------------------------------------------------

    def _start_what_is_due(self) -> None:
        if self._stops:
            return
        self._looked_at = now = time.monotonic()
        empty = [slot for slot in self._slots if slot.child is None and not slot.is_done]
        if not self._has_been_up:
            # Until one has come up, one at a time: what is wrong with application or settings is then said once.
            empty = [] if self._children else empty[:1]
        for slot in empty:
            if slot.not_before <= now:
                slot.child = self._start(slot)
        # One at a time here, too: it shows whether the code starts, and spares the machine a crowd of fresh processes.
        if any(slot.successor for slot in self._slots):
            return
        renewals = [
            (slot.renewal.asked_at, number)
            for number, slot in enumerate(self._slots)
            if slot.renewal and slot.not_before <= now
        ]
        if renewals:
            slot = self._slots[min(renewals)[1]]
            slot.successor = self._start(slot)

    def _start(self, slot: _Slot) -> _Child | None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        number = free_number({child.number for child in self._children})
        environment = {**os.environ, SUPERVISED: f"{os.getpid()}:{theirs.fileno()}"}
        environment.update(self._metrics.environment(number))
        address = None
        if self._front is not None:
            address = self._front.next_address()
            environment[SUPERVISED_HTTP] = str(address)
        try:
            process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            logger.error("cannot start a process: %s; trying again in %.1f s", error, self._pause(slot))
            return None
        finally:
            theirs.close()
        child = _Child(process, ours, slot, self._generation, number, time.monotonic(), address)
        self._children.append(child)
        self._selector.register(ours, selectors.EVENT_READ, child)
        logger.info("%s is starting", child, extra={"pid": process.pid})
        return child

    def _pause(self, slot: _Slot) -> float:
        """After an early death, let the next start wait, longer the more there were in a row; returns the seconds."""
        slot.early_deaths += 1
        longest = min(_FIRST_PAUSE_SECONDS * 2.0 ** min(slot.early_deaths - 1, 10), _LONGEST_PAUSE_SECONDS)
        pause = longest * random.uniform(0.5, 1.0)
        slot.not_before = time.monotonic() + pause
        return pause

    # --- hear ---------------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait for something to happen, and for no longer than until something is due; hear what children say."""
        moments = [self._beat_at, *(child.kill_at for child in self._children)]
        if not self._stops:
            # Later than the last look, not than now: what has become due in between would be waited for in vain.
            moments += [slot.not_before for slot in self._slots if slot.not_before > self._looked_at]
        next_at = min(moments, default=math.inf)
        timeout = None if next_at == math.inf else max(next_at - time.monotonic(), 0.0)
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                self._answer_signals()
            else:
                self._hear(key.data)

    def _hear(self, child: _Child) -> None:
        try:
            while data := child.line.recv(4096):
                child.unread += data
        except BlockingIOError:
            pass
        except OSError:
            self._hang_up(child)
        else:
            self._hang_up(child)
        *lines, child.unread = child.unread.split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == UP:
                child.grace = float(rest)
                self._note_up(child)
            elif word == RETIRE and not child.is_leaving:
                self._renew(child.slot, rest, is_reload=False)

    def _hang_up(self, child: _Child) -> None:
        """Listen to it no more; whether it lives is another matter."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.line)

    def _note_up(self, child: _Child) -> None:
        if not self._has_been_up:
            self._notifier.say_ready()
        self._has_been_up = child.is_up = True
        slot = child.slot
        logger.info("%s is up after %.1f s", child, child.age, extra={"pid": child.process.pid})
        if child.is_leaving:
            return
        if child is slot.successor:
            former, slot.child, slot.successor, slot.renewal = slot.child, child, None, None
            if former is not None:
                logger.info("%s takes the place of %s, which finishes what it runs", child, former)
                self._tell_to_stop(former)
        if child.generation < self._generation:
            self._renew(slot, "new code", is_reload=True)

    # --- replace ------------------------------------------------------------------------------------------------------

    def _renew(self, slot: _Slot, reason: str, *, is_reload: bool) -> None:
        """Have the slot's child replaced as soon as it is its turn."""
        if slot.renewal is None and not self._stops:
            slot.renewal = _Renewal(reason, time.monotonic(), is_reload)
            logger.info("%s is to be replaced: %s", slot.child, reason)

    def _reload(self) -> None:
        """Replace all children, one after the other, by such as load the code of now."""
        if self._stops:
            return
        self._generation += 1
        self._is_reloading = True
        self._notifier.say_reloading()
        for slot in self._slots:
            if slot.child is None:
                slot.not_before = 0.0
            elif slot.child.is_up and slot.successor is None:
                self._renew(slot, "new code", is_reload=True)

    def _abandon_reload(self) -> None:
        self._note_reloaded()
        for slot in self._slots:
            if slot.renewal and slot.renewal.is_reload:
                slot.renewal = None

    # --- end ----------------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        for child in [child for child in self._children if child.process.poll() is not None]:
            self._hear(child)
            self._hang_up(child)
            child.line.close()
            self._children.remove(child)
            self._metrics.forget(child.number, child.process.pid)
            if self._front is not None and child.address is not None:
                self._front.forget(child.address)
            self._note_end(child)

    def _note_end(self, child: _Child) -> None:
        slot, status = child.slot, child.process.returncode
        if child.is_up and child.age >= _EARLY_SECONDS:
            slot.early_deaths = 0
        end = f"{child} {_describe(status)} after {child.age:.1f} s"
        if child.is_leaving:
            self._note_departure(child, status, end)
        elif child is slot.successor:
            slot.successor = None
            self._note_failed_successor(child, end)
        elif slot.successor is not None:
            logger.warning("%s; its successor is on the way", end)
            slot.child, slot.successor, slot.renewal = slot.successor, None, None
        elif self._order.until_empty and child.is_up and status == 0:
            logger.info("%s; nothing waits that could run now", end)
            slot.child, slot.renewal, slot.is_done = None, None, True
        else:
            slot.child = slot.renewal = None
            self._note_death(child, status, end)

    def _note_departure(self, child: _Child, status: int, end: str) -> None:
        logger.log(logging.WARNING if status else logging.INFO, "%s, as it was told to", end)
        if self._stops and child.is_up:
            self._status = max(self._status, status if status >= 0 else 128 - status)

    def _note_failed_successor(self, child: _Child, end: str) -> None:
        slot = child.slot
        if slot.renewal and slot.renewal.is_reload:
            if child.generation == self._generation:
                logger.error("%s and did not come up; the old code goes on, until there is another reload", end)
                self._abandon_reload()
            return  # or there has been another reload since: at once
        pause = self._pause(slot)
        logger.error("%s and did not come up; %s goes on; trying again in %.1f s", end, slot.child, pause)

    def _note_death(self, child: _Child, status: int, end: str) -> None:
        slot = child.slot
        if status == EXIT_MISTAKE and not self._has_been_up:
            if self._order.reload:
                slot.not_before = math.inf
                logger.error("%s; waiting for files to change", end)
            else:
                # It has said itself what is wrong, and that will not pass.
                self._stops, self._status = 1, status
            return
        if child.is_up and child.age >= _EARLY_SECONDS:
            slot.not_before = 0.0
            logger.warning("%s; starting another", end)
            return
        pause = self._pause(slot)
        level = logging.ERROR if slot.early_deaths >= _MANY_EARLY_DEATHS else logging.WARNING
        logger.log(level, "%s, early death %s in a row; starting another in %.1f s", end, slot.early_deaths, pause)

    def _tell_to_stop(self, child: _Child, urgency: int = 1) -> None:
        """Say it to the child, which ends at once when it has not come up; and see to it that it does end."""
        child.is_leaving = True
        grace = child.grace if urgency == 1 else 0.0
        child.kill_at = min(child.kill_at, time.monotonic() + grace + STUCK_SECONDS)
        with contextlib.suppress(OSError):
            child.line.send(f"{STOP} {urgency}\n".encode())

    def _kill_the_stuck(self) -> None:
        for child in self._children:
            if child.kill_at <= time.monotonic():
                child.kill_at = math.inf
                logger.error("%s did not end when it was told to; killed, and what it ran will run again", child)
                child.process.kill()

    # --- signals ------------------------------------------------------------------------------------------------------

    def _answer_signals(self) -> None:
        for number in self._bell.heard():
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop(signal.Signals(number).name)
            elif number == signal.SIGHUP:
                self._answer_hangup()
            elif number == signal.SIGQUIT:
                self._pass_on_quit()
            elif number == FILES_CHANGED:
                logger.info("files have changed")
                self._reload()
            elif number == ASKED:
                self._answer_questions()

    def _stop(self, why: str) -> None:
        self._stops += 1
        logger.info("%s: telling %s processes to stop, urgency %s", why, len(self._children), self._stops)
        self._notifier.say_stopping(max((child.grace for child in self._children), default=0.0))
        for child in self._children:
            self._tell_to_stop(child, self._stops)

    def _answer_hangup(self) -> None:
        """SIGHUP asks for a reload, unless it comes because the terminal was closed."""
        if self._has_terminal and not _has_terminal():
            self._has_terminal = False
            if not self._outlives_terminal:
                self._stop("the terminal was closed")
            return
        logger.info("SIGHUP: reloading")
        self._reload()

    def _pass_on_quit(self) -> None:
        for child in self._children:
            logger.info("%s is %s, started %.1f s ago", child, child.state, child.age)
            if child.is_up:  # before, it does not handle the signal, which would end it
                child.process.send_signal(signal.SIGQUIT)

    # --- what others want to know -------------------------------------------------------------------------------------

    def _make_front(self, http: str | None) -> Front | None:
        if http is None:
            return None
        from greenjobs.supervisor_http import Front  # a supervisor that nobody asks does without a server

        return Front(Address.parse(http), self._look)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._front is not None:
                self._front.close()

    def _look(self) -> Picture | None:
        """How things stand, asked by another thread of the loop: that it answers shows that it turns."""
        answer: queue.SimpleQueue[Picture] = queue.SimpleQueue()
        self._questions.append(answer)
        with contextlib.suppress(BlockingIOError, queue.Empty):
            self._bell.ring(ASKED)
            return answer.get(timeout=_ANSWER_SECONDS)
        return None

    def _answer_questions(self) -> None:
        from greenjobs.supervisor_http import Picture, ProcessState

        places = 0 if self._stops else sum(not slot.is_done for slot in self._slots)
        at_work = [slot.child for slot in self._slots]
        processes = [
            ProcessState(child.process.pid, child.state, child in at_work, child.age, child.address)
            for child in self._children
            if child.address is not None
        ]
        while self._questions:
            self._questions.popleft().put(Picture(places, self._stops > 0, processes))

    def _tell_systemd(self) -> None:
        """Say how things stand, and that the loop turns, if it is time; and that a reload is over, when it is."""
        if self._is_reloading and all(self._is_of_now(slot) for slot in self._slots):
            self._note_reloaded()
        now = time.monotonic()
        if self._beat_at <= now:
            self._beat_at = now + self._notifier.beat_seconds
            up = sum(child.state == "up" for child in self._children)
            self._notifier.beat(f"{up} of {len(self._slots)} processes are up, {len(self._children)} there are in all")

    def _is_of_now(self, slot: _Slot) -> bool:
        child = slot.child
        return slot.is_done or (child is not None and child.is_up and child.generation == self._generation)

    def _note_reloaded(self) -> None:
        if self._is_reloading:
            self._is_reloading = False
            self._notifier.say_ready()


def _working_folder() -> str:
    """The working directory by the name that the shell has for it, as in $PWD.

    A deployment may exchange a symbolic link in that name: children that are started later then find the new code.
    """
    named = os.environ.get("PWD", "")
    with contextlib.suppress(OSError):
        if os.path.isabs(named) and os.path.samefile(named, os.curdir):
            return named
    return os.getcwd()


def _has_terminal() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return False
    os.close(terminal)
    return True


def _describe(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"
