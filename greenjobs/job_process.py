"""A process that runs jobs for a runner, one after the other: what is at the other end of greenjobs.processes.

Nothing is patched here, unless the application does it: the main thread runs the jobs, a second thread hears what the
runner says. An error that is to be raised in a job goes by a signal to the main thread, whose handler raises it: that
ends waits of the interpreter as well. A statement that PostgreSQL is at is cancelled on the server, whosever connection
it is. The end of the line is that of the runner, and so of this process.

What this module needs of threads it takes before the application is loaded, which may patch them: a listener that is a
greenlet would never hear of anything.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from _thread import allocate_lock, get_ident, start_new_thread
from collections.abc import Callable, Mapping
from contextvars import Context
from queue import SimpleQueue
from time import sleep
from typing import Any, NoReturn, cast

import gevent
from gevent.hub import Hub
from greenlet import getcurrent

from greenjobs import companions, config, errors, logs, metrics_folder, pool, surroundings
from greenjobs.cli_options import configure
from greenjobs.contrib import equipment, metrics_number
from greenjobs.current import Abroad, Attempt, Place, enter_attempt
from greenjobs.error_record import error_record
from greenjobs.errors import GreenjobsError, JobControl
from greenjobs.events import Outcome
from greenjobs.frames import pack, unpack
from greenjobs.job import Job, find_job
from greenjobs.keeping import keep_seconds
from greenjobs.memory import resident_megabytes
from greenjobs.policy import judge, outcome_of
from greenjobs.progress import Report
from greenjobs.stacks import lines_of
from greenjobs.storage import ClaimedJob
from greenjobs.supervisor import EXIT_MISTAKE
from greenjobs.surroundings import Surrounding, call_within

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Nobody uses it, and who does not handle it does not notice it.
_WAKE = signal.SIGURG

_RUNNERS_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# What became of them at first, for the processes that a job forks.
_dispositions: dict[int, Any] = {}

# The main thread, unless it is in C code that does not let it, has heard of an error after this.
_HEARING_SECONDS = 0.2

# As the runner's own Reporter has it.
_PAUSE_SECONDS = 1.0


def main(line: str) -> None:
    """Serve the runner whose "PID:FD" this is, FD being this process's end of the line."""
    parent, fd = (int(part) for part in line.split(":"))
    os.set_inheritable(fd, False)
    _end_with(parent)
    _take_no_notice()
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGQUIT, all_threads=False)
    connection = socket.socket(fileno=fd)
    connection.setblocking(True)  # those of gevent are not
    hello = unpack(connection.recv)
    if hello is not None:
        made, around = _load(hello)
        _take_no_notice()  # whatever the application has set up
        JobProcess(connection, made, around, hello["runner_name"]).serve()


def _take_no_notice() -> None:
    """Of signals: it is for the runner to say when. Not ignored, which the programs that jobs start would inherit."""
    for number in _RUNNERS_SIGNALS:
        _dispositions.setdefault(number, signal.signal(number, lambda *_: None))


def _end_with(parent: int) -> None:
    """Let the kernel end this process when the runner ends, even while a job holds the interpreter; now, if it has."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def _load(hello: Mapping[str, Any]) -> tuple[Any, tuple[Surrounding, ...]]:
    """The application, and what surrounds its jobs; exits when it cannot be loaded, having said why."""
    metrics_number.take()  # before the application makes metrics
    try:
        configure(hello["settings"], loads_application=True)
        found, equipped = equipment.load(hello["application"] or None)
    except GreenjobsError as error:
        if logs.writes_json():
            logger.error("%s", error)
        else:
            sys.stderr.write(f"greenjobs: {error}\n")
        sys.exit(EXIT_MISTAKE)
    except Exception as error:  # the application's own mistake: its traceback says where
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(EXIT_MISTAKE)
    logs.settle()
    logs.note_runner(hello["runner_name"])
    around = _Around()
    for each in equipped:
        each.adopt()
        each.equip(cast("Any", around))
    companions.meet(runs_jobs=True)
    _count_what_is_enqueued()
    return found, (*surroundings.everywhere, *around.surroundings, _Offspring)


def _count_what_is_enqueued() -> None:
    """Where the runner shows metrics, and those of its processes among them."""
    is_shown = config.current().http is not None and metrics_folder.FOLDER in os.environ
    if is_shown and importlib.util.find_spec("prometheus_client") is not None:
        importlib.import_module("greenjobs.contrib.prometheus")


class _Around:
    """Takes the place of the runner where an application says what is around its jobs."""

    def __init__(self) -> None:
        self.surroundings: list[Surrounding] = []

    def surround(self, make: Surrounding) -> None:
        """As Runner.surround."""
        self.surroundings.append(make)


class _Offspring:
    """Ends a process that the job has forked where that leaves the job's function: it is no process of the runner's,
    and what surrounds the job is not for it to end."""

    def __enter__(self) -> None:
        self._pid = os.getpid()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if os.getpid() != self._pid:
            _end_offspring(error or SystemExit())


def _end_offspring(error: BaseException) -> NoReturn:
    """As the interpreter ends, without what others have put off until then."""
    status = 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif error.code is None or isinstance(error.code, int):
        status = error.code or 0
    else:
        sys.stderr.write(f"{error.code}\n")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status & 0xFF)


class JobProcess:
    """Serves one runner over this connection; `context` is what its jobs have as current_job.context."""

    def __init__(
        self, connection: socket.socket, context: Any, around: tuple[Surrounding, ...], runner_name: str
    ) -> None:
        self._connection = connection
        self._context = context
        self._surroundings = around
        self._runner_name = runner_name
        self._orders: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._sending = allocate_lock()
        self._thread = get_ident()
        # Where the application has patched, its jobs wait in a hub beside it.
        self._greenlet = getcurrent()
        self._runner_ids: list[int] = []
        self._inside: list[int] | None = None
        """Whose function runs at this moment: the id and the claim of the job."""
        self._attempt: Attempt | None = None
        self._to_raise: tuple[list[int], BaseException] | None = None
        self._relay = _Relay(self._say)

    def serve(self) -> None:
        """Run what the runner says, until it hangs up."""
        signal.signal(_WAKE, self._raise_it)
        self._masks: dict[int, set[int]] = {}
        os.register_at_fork(before=self._hold, after_in_parent=self._go_on, after_in_child=self._let_go)
        start_new_thread(self._listen, ())
        self._say({"what": "up"})
        while (order := self._orders.get()) is not None:
            self._say({"what": "begun", "id": order["row"][0]})
            self._say(Context().run(self._run, order))

    # --- the line -----------------------------------------------------------------------------------------------------

    def _say(self, message: Mapping[str, Any]) -> None:
        data = pack(message)
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError:  # the runner is gone; or a job has closed the line, of whose outcome nobody could hear
            os._exit(1)

    def _listen(self) -> None:
        try:
            self._hear()
        except Exception:  # such as a want of memory
            traceback.print_exc()
            os._exit(1)
        if self._inside is not None:  # what it runs is somebody else's by now, or will be
            os.kill(os.getpid(), signal.SIGKILL)
        self._orders.put(None)

    def _hear(self) -> None:
        while message := unpack(self._connection.recv):
            if message["do"] == "run":
                self._runner_ids[:] = message["runner_ids"]
                self._orders.put(message)
            elif message["do"] == "show":
                frame = self._greenlet.gr_frame or sys._current_frames().get(self._thread)
                inside = self._inside
                self._say({"what": "stands", "id": inside and inside[0], "stack": lines_of(frame)})
            elif message["do"] == "know":
                self._runner_ids[:] = message["runner_ids"]
            else:
                error = getattr(errors, message["error"], errors.JobInterrupted)(message["text"])
                self._to_raise = told = (message["claim"], error)
                signal.pthread_kill(self._thread, _WAKE)
                start_new_thread(self._insist, (told,))

    # --- processes that a job forks -----------------------------------------------------------------------------------

    def _hold(self) -> None:
        """A signal that comes to the child at once waits until that heeds it: the interpreter would forget it."""
        self._masks[get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, _RUNNERS_SIGNALS)

    def _go_on(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.pop(get_ident()))

    def _let_go(self) -> None:
        """In the child: it may be told to end as any other process, and has nothing to say here."""
        self._connection.close()
        for number, disposition in (*_dispositions.items(), (_WAKE, signal.SIG_DFL)):
            signal.signal(number, disposition)
        self._go_on()

    # --- ending a job from outside ------------------------------------------------------------------------------------

    def _raise_it(self, *_: Any) -> None:
        """The handler of the signal, in the main thread, wherever that is."""
        told = self._to_raise
        if told is not None and told[0] == self._inside:
            self._to_raise = None
            if self._attempt is not None:  # current_job is not there in a hub
                self._attempt.interrupted_by = told[1]
            if not isinstance(getcurrent(), (Hub, gevent.Greenlet)):
                raise told[1]
            gevent.get_hub().loop.run_callback(self._greenlet.throw, told[1])

    def _insist(self, told: tuple[list[int], BaseException]) -> None:
        sleep(_HEARING_SECONDS)
        # Told too late, it is nobody's: what this process is at by now may be another job.
        if self._to_raise is told and told[0] == self._inside:
            # A signal that arrives just before the thread goes to sleep does not wake it.
            signal.pthread_kill(self._thread, _WAKE)
            if "psycopg2" in sys.modules:
                _cancel_statements()

    # --- one attempt --------------------------------------------------------------------------------------------------

    def _run(self, order: Mapping[str, Any]) -> dict[str, Any]:
        row = ClaimedJob(*order["row"])
        settings = config.current()
        ended = {"what": "ended", "id": row.id, "completed": False, "error": None, "result": None, "verdict": None}
        try:
            job = find_job(row.job_type)
        except GreenjobsError as error:  # the runner judges it, who knows the job
            ended |= {"error": _described(error), "record": None, "is_reported": False}
            return {**ended, "megabytes": resident_megabytes()}
        abroad = Abroad(lambda error: _outcome(attempt, error))
        place = Place(
            order["queue"],
            self._context,
            pool.shared_pool(settings, settings.require_database_url()),
            runner_ids=self._runner_ids,
            recorder=self._relay,
            surroundings=self._surroundings,
            abroad=abroad,
        )
        attempt = Attempt(job, row, place, None)
        enter_attempt(attempt)
        attempt.started = time.perf_counter()
        try:
            value = self._call(job, attempt)
            if attempt.completion is not None:
                attempt.completion.end()
        except BaseException as error:  # a job may raise anything
            error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
            ended |= self._raised(job, attempt, error)
            ended["is_reported"] = abroad.is_reported
        else:
            if job.results is not None and keep_seconds(job.keep, row.options):
                ended["result"] = job.results.encode(value, max_bytes=settings.max_payload_bytes)
        ended["completed"] = attempt.completion is not None
        if attempt.report is not None:
            attempt.report.end(stays=False)
            self._relay.pass_on(attempt.report)
        return {**ended, "megabytes": resident_megabytes()}

    def _call(self, job: Job[Any, Any], attempt: Attempt) -> Any:
        args, kwargs = job.codec.decode(attempt.row.data)
        self._attempt, self._inside = attempt, [attempt.row.id, attempt.row.attempt]
        try:
            self._raise_it()  # what came before the job had begun
            return call_within(self._surroundings, job.function, args, kwargs)
        finally:
            self._attempt = self._inside = None

    def _raised(self, job: Job[Any, Any], attempt: Attempt, error: BaseException) -> dict[str, Any]:
        """What the runner has to know of the error; judged here, where its class is known, and the job's backoff."""
        if attempt.completion is not None and not attempt.completion.is_committed:
            attempt.completion.abandon()
            attempt.completion = None
        verdict = judge(job.policy, error, failures=attempt.row.retries + 1, max_retries=attempt.max_retries)
        return {
            "error": _described(error),
            "record": error_record(error, attempt.number, self._runner_name),
            "verdict": (verdict.outcome, verdict.retry_in),
        }


class _Relay:
    """Passes on what the job says of itself, about once a second."""

    def __init__(self, say: Callable[[Mapping[str, Any]], None]) -> None:
        self._say = say
        self._expected: SimpleQueue[Report] = SimpleQueue()
        self._passing = allocate_lock()
        start_new_thread(self._pass_on_for_ever, ())

    def expect(self, report: Report) -> None:
        """There are news in this report; returns at once."""
        self._expected.put(report)

    def finish(self, report: Report) -> None:
        """Its attempt has ended: what is left is passed on before the outcome."""

    def pass_on(self, report: Report) -> None:
        """Say what there is to say."""
        with self._passing:  # else older news might come after newer ones
            if report.is_news:
                self._say({"what": "said", "id": report.id, "document": report.take()})

    def _pass_on_for_ever(self) -> NoReturn:
        while True:
            report = self._expected.get()
            report.is_expected = False
            self.pass_on(report)
            sleep(_PAUSE_SECONDS)


def _outcome(attempt: Attempt, error: BaseException | None) -> Outcome:
    """That of an attempt whose function ended with this error, as the runner will have it."""
    if isinstance(attempt.interrupted_by, JobControl):
        error = attempt.interrupted_by
    if error is None or (attempt.completion is not None and attempt.completion.is_committed):
        return "done"
    failures = attempt.row.retries + 1
    return outcome_of(attempt.job.policy, error, failures=failures, max_retries=attempt.max_retries)


def _described(error: BaseException) -> dict[str, Any]:
    """The error, as far as JSON has it, for one like it to be made in the runner."""
    kind = type(error)
    frames = "".join(traceback.format_tb(error.__traceback__))
    return {
        "module": kind.__module__,
        "type": kind.__qualname__,
        "message": _or(lambda: str(error), ""),
        "traceback": _or(lambda: "".join(traceback.format_exception(error)), frames),
        "args": _or(lambda: [each if _is_plain(each) else _shown(each) for each in error.args], []),
        "state": _or(lambda: {name: value for name, value in vars(error).items() if _is_plain({name: value})}, {}),
    }


def _shown(value: object) -> str:
    return str(_or(lambda: repr(value), f"<{type(value).__name__} that cannot be shown>"))


def _is_plain(value: object) -> bool:
    return bool(_or(lambda: json.dumps(value), ""))


def _or(look: Callable[[], Any], instead: Any) -> Any:
    """What it answers; or something else, where code of the application's, which it calls, raises whatever it may."""
    try:
        return look()
    except BaseException:
        return instead


def _cancel_statements() -> None:
    """End the statements that the server is at for this process, which keep its main thread in C code."""
    import psycopg2
    from psycopg2 import extensions

    for found in gc.get_objects():
        if isinstance(found, extensions.connection) and not found.closed:
            with contextlib.suppress(psycopg2.Error):
                if found.info.transaction_status == extensions.TRANSACTION_STATUS_ACTIVE:
                    found.cancel()
