"""What `.delay()` does inside of a test. Modes are of the whole process, nest, and end with their block.

Of the process, and not of a thread or a context: a live server runs the views that are tested in threads of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Literal, cast

from greenjobs import config, current, lending, pool, storage
from greenjobs.current import lender
from greenjobs.error_record import error_record
from greenjobs.errors import JobNotEnded, OptionError
from greenjobs.handle import Action, JobHandle
from greenjobs.history import Look, Status
from greenjobs.job import Job
from greenjobs.storage import NewJobs, rehearsal
from greenjobs.testing import ledger
from greenjobs.testing.attempts import Ran, new_row, next_id, run_attempt
from greenjobs.testing.lent import SharedPool, plain_rows
from greenjobs.testing.records import EnqueuedJob, options_of_call, readable_arguments
from greenjobs.testing.tables import tables_needed

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class _Stage:
    """A mode that changes nothing: what it does not do itself, the one around it does.

    `stores` says whether it has jobs stored, whatever the modes around it do.
    """

    stores = False

    def __init__(self) -> None:
        self.outer: Any = None

    def enqueue(self, job: Job[..., Any], new: NewJobs, *, connection: Any) -> list[JobHandle]:
        if self.outer is None:
            return _store(job, new, connection)
        handles: list[JobHandle] = self.outer.enqueue(job, new, connection=connection)
        return handles

    def lender(self, settings: config.Settings) -> pool.ConnectionPool:
        return pool.shared_pool(settings) if self.outer is None else self.outer.lender(settings)

    @property
    def is_unseen(self) -> bool:
        return self.outer is not None and self.outer.is_unseen

    @property
    def runs_at_once(self) -> bool:
        return self.outer is not None and self.outer.runs_at_once

    def job_pool(self, settings: config.Settings) -> lending.JobPool:
        return lending.job_pool(settings) if self.outer is None else self.outer.job_pool(settings)


def _store(job: Job[..., Any], new: NewJobs, given: Any) -> list[JobHandle]:
    """Enqueue as outside of tests, but for the clock; in one statement, however many they are."""
    new, settings, test = _by_the_clock(new), config.current(), joined()
    named = None if given is None else pool.raw_connection(given)
    if test is not None and new.run_at is None and new.delay_seconds and (named is None or test.is_behind(named)):
        new = new._replace(delay_seconds=new.delay_seconds + test.elapsed_seconds())
    with tables_needed():
        if named is not None:
            enqueued = storage.enqueue_inside(named, [new])
        else:
            with lender(settings).connection() as connection, pool.bounded(settings.enqueue_timeout):
                enqueued = storage.enqueue(connection, [new])
    return [JobHandle(id, job.name, action != "enqueued", cast("Action", action)) for id, action in enqueued]


def _by_the_clock(new: NewJobs) -> NewJobs:
    # What is due at once stays so, and an instant that was named is one of any clock.
    if new.run_at is None and new.delay_seconds:
        return new._replace(delay_seconds=new.delay_seconds + ahead(current.stage).total_seconds())
    return new


@contextlib.contextmanager
def _entered(stage: _Stage) -> Iterator[None]:
    stage.outer, current.stage = current.stage, stage
    try:
        yield
    finally:
        current.stage = stage.outer


# --- inline -----------------------------------------------------------------------------------------------------------


class Inline(_Stage):
    """Jobs run where they are enqueued. `ran` has every attempt that has ended, `jobs` what was enqueued."""

    runs_at_once = True

    def __init__(self, *, raise_errors: bool, context: Any) -> None:
        super().__init__()
        self.ran: list[Ran] = []
        self.jobs: list[EnqueuedJob] = []
        self._raise_errors = raise_errors
        self._context = context

    def enqueue(self, job: Job[..., Any], new: NewJobs, *, connection: Any) -> list[JobHandle]:
        return [self._run(job, new, data) for data in new.data]

    def _run(self, job: Job[..., Any], new: NewJobs, data: str) -> JobHandle:
        row = new_row(new, data)
        self.jobs.append(_enqueued(job, new, data, id=row.id))
        ran = run_attempt(job, row, new.queue, self._context)
        self.ran.append(ran)
        if self._raise_errors:
            ran.raise_error()
        return _EndedHandle(ran)


# What the outcomes of attempts that are not the last leave the job as.
_STATUS_AFTER: Mapping[str, Status] = {"retried": "scheduled", "snoozed": "scheduled", "interrupted": "available"}


class _NowhereHandle(JobHandle):
    """Of a job that is in no database. It says at once how the job is doing, for nothing happens to it by itself."""

    __slots__ = ()

    def _wait(self, timeout: float | timedelta | None) -> Look:
        seen = self._look()
        if not seen.has_ended:
            raise JobNotEnded(
                f"job {self.id} ({self.job_type}) is {seen.status}, and nothing runs it in this mode of the test",
                id=self.id,
                status=seen.status,
            )
        return seen


class _EndedHandle(_NowhereHandle):
    """Of a job that has run by now."""

    __slots__ = ("_ran",)

    def __init__(self, ran: Ran) -> None:
        super().__init__(ran.id, ran.job_type)
        self._ran = ran

    def result(self, timeout: float | timedelta | None = None) -> Any:
        """What the function returned, whether or not it would be kept."""
        return self._ran.value if self._ran.outcome == "done" else super().result(timeout)

    def _look(self) -> Look:
        error = self._ran.error
        return Look(
            _STATUS_AFTER.get(self._ran.outcome) or cast("Status", self._ran.outcome),
            self.job_type,
            None if error is None else error_record(error, self._ran.attempt, ledger.RUNNER_NAME),
        )

    def cancel(self) -> Literal["removed", "asked", "gone"]:
        return "gone"


@contextlib.contextmanager
def inline(*, raise_errors: bool = True, context: Any = None) -> Iterator[Inline]:
    """Inside the block `.delay()` runs the job here and now, one attempt, and needs no database.

    The arguments are stored and read as in production, and the job has a context of its own, and `current_job`. Jobs
    for later run at once, too. What a job raises comes out of `.delay()`, but for Discard, Snooze, a Retry that is
    granted, and errors of `discard_on`; with raise_errors=False nothing does, and `ran` tells. `context` is that of the
    runner.
    """
    mode = Inline(raise_errors=raise_errors, context=context)
    with _entered(mode):
        yield mode


# --- recording --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Recorded:
    job: EnqueuedJob
    unique_key: str | None


class Recording(_Stage):
    """Jobs are neither run nor stored. `jobs` has those that were enqueued and not cancelled, the oldest first."""

    runs_at_once = False

    def __init__(self) -> None:
        super().__init__()
        self._recorded: dict[int, _Recorded] = {}
        self._lock = threading.Lock()

    @property
    def jobs(self) -> list[EnqueuedJob]:
        with self._lock:
            return [each.job for each in self._recorded.values()]

    def clear(self) -> None:
        """Forget what was recorded so far."""
        with self._lock:
            self._recorded.clear()

    def remove(self, id: int) -> bool:
        """Forget one job; whether it was there."""
        with self._lock:
            return self._recorded.pop(id, None) is not None

    def has(self, id: int) -> bool:
        """Whether this job is recorded."""
        with self._lock:
            return id in self._recorded

    def enqueue(self, job: Job[..., Any], new: NewJobs, *, connection: Any) -> list[JobHandle]:
        keys = new.unique_keys or itertools.repeat(None)
        return [self._record(job, new, data, key) for data, key in zip(new.data, keys, strict=False)]

    def _record(self, job: Job[..., Any], new: NewJobs, data: str, key: str | None) -> JobHandle:
        enqueued = _enqueued(job, new, data, id=next_id())
        with self._lock:
            for known in self._recorded.values():
                if key is not None and known.unique_key == key:
                    return _RecordedHandle(known.job.id, job.name, duplicate=True, recording=self)
            self._recorded[enqueued.id] = _Recorded(enqueued, key)
        return _RecordedHandle(enqueued.id, job.name, recording=self)


class _RecordedHandle(_NowhereHandle):
    """Of a job that is nowhere but in a recording."""

    __slots__ = ("_recording",)

    def __init__(self, id: int, job_type: str, duplicate: bool = False, *, recording: Recording) -> None:
        super().__init__(id, job_type, duplicate)
        self._recording = recording

    def _look(self) -> Look:
        return Look("available" if self._recording.has(self.id) else "gone", self.job_type)

    def cancel(self) -> Literal["removed", "asked", "gone"]:
        return "removed" if self._recording.remove(self.id) else "gone"


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Inside the block `.delay()` only notes what was enqueued: nothing runs, nothing is stored, no database is needed.

    A unique job with the arguments of one that was recorded is its duplicate, as nothing ever starts.
    """
    mode = Recording()
    with _entered(mode):
        yield mode


def _enqueued(job: Job[..., Any], new: NewJobs, data: str, *, id: int) -> EnqueuedJob:
    new, now = _by_the_clock(new), datetime.now(timezone.utc)
    is_later = new.delay_seconds > 0 if new.run_at is None else new.run_at > now + ahead(current.stage)
    run_at = new.run_at if new.run_at is not None else now + timedelta(seconds=new.delay_seconds)
    return EnqueuedJob(
        id=id,
        job_type=job.name,
        args=readable_arguments(job, data),
        queue=new.queue,
        priority=new.priority,
        run_at=run_at,
        state="scheduled" if is_later else "available",
        options=options_of_call(job, None if new.options is None else json.loads(new.options)),
    )


# --- a database, and a transaction of the test's ----------------------------------------------------------------------


class _Joined(_Stage):
    """All is done in the transaction of one connection, which stands for the pool of the process."""

    stores = True
    is_unseen = True
    runs_at_once = False

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection
        self.ended: list[ledger.Ended] = []

    def enqueue(self, job: Job[..., Any], new: NewJobs, *, connection: Any) -> list[JobHandle]:
        return _store(job, new, self.connection if connection is None else connection)

    def is_behind(self, connection: Connection) -> bool:
        """Whether this is the connection, or a part of its transaction that was lent."""
        return connection.get_backend_pid() == self.connection.get_backend_pid()

    def elapsed_seconds(self) -> float:
        """By how much the clock is ahead of the transaction, where it is always the time of its beginning."""
        if ledger.is_aborted(self.connection):
            return 0.0
        return rehearsal.elapsed(plain_rows(self.connection))

    def lender(self, settings: config.Settings) -> Any:
        return _Lender(self)

    def job_pool(self, settings: config.Settings) -> Any:
        return SharedPool(self.connection)


@dataclass(frozen=True, slots=True)
class _Lender:
    of: _Joined

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection]:
        connection = plain_rows(self.of.connection)
        ledger.write_again(connection, self.of.ended)
        yield connection


@contextlib.contextmanager
def using(connection: Any) -> Iterator[None]:
    """Inside the block every `.delay()` joins the transaction of this psycopg2 connection (or cursor), unless the call
    names another; `drain`, `enqueued_jobs`, handles and `greenjobs.jobs` work in it, too.

    Nothing is committed: when the test rolls it back, all is gone. Raises OptionError when the connection commits every
    statement by itself.
    """
    given = pool.raw_connection(connection)
    if given.autocommit:
        raise OptionError(
            "testing.using: the connection is in autocommit, so that there would be nothing to roll back; "
            "set connection.autocommit = False first"
        )
    with _entered(_Joined(given)):
        yield


@contextlib.contextmanager
def rolled_back(database_url: str | None = None) -> Iterator[Connection]:
    """`using` a connection of its own, which is rolled back and closed at the end; to the database of the settings.

    Raises DatabaseUnavailable.
    """
    settings = config.current()
    connection = pool.connect(
        database_url or settings.require_database_url(),
        application_name="greenjobs testing",
        timeout_seconds=settings.enqueue_timeout,
    )
    try:
        connection.autocommit = False
        with using(connection):
            yield connection
    finally:
        if not connection.closed:
            connection.rollback()
        connection.close()


# --- the clock --------------------------------------------------------------------------------------------------------


class Clock(_Stage):
    """The clock of greenjobs in a test: `ahead` is how much it was moved, that of clocks around it included."""

    def __init__(self) -> None:
        super().__init__()
        self._moved = timedelta()

    @property
    def ahead(self) -> timedelta:
        return self._moved + ahead(self.outer)

    def move(self, step: timedelta | None = None, /, **units: float) -> None:
        """Move it forward by a timedelta, or by `days`, `hours`, `minutes`, `seconds` and so on, as a timedelta has."""
        try:
            moved = timedelta(**units) + (timedelta() if step is None else step)
        except (TypeError, ValueError, OverflowError):
            raise OptionError(f"the clock is moved by {step or units!r}; allowed: a timedelta, or its units") from None
        if moved < timedelta():
            raise OptionError(f"the clock is moved by {moved}; allowed: forward only")
        self._moved += moved


@contextlib.contextmanager
def travel(step: timedelta | None = None, /, **units: float) -> Iterator[Clock]:
    """Inside the block it is later, for greenjobs: `drain` runs what is due by then, and `delay=…` and retries count
    from then on. `with travel(hours=1) as clock:`, and further with `clock.move(minutes=5)`.

    No row is changed. Python's own clock, and the now() of the database, are not moved.
    """
    clock = Clock()
    clock.move(step, **units)
    with _entered(clock):
        yield clock


def memory() -> Inline | Recording | None:
    """The mode that counts, if it keeps jobs in memory; None where they are stored."""
    stage: Any = current.stage
    while stage is not None and not stage.stores:
        if isinstance(stage, (Inline, Recording)):
            return stage
        stage = stage.outer
    return None


def joined() -> _Joined | None:
    """The mode of the transaction that the test is using, if it is."""
    stage: Any = current.stage
    while stage is not None and not stage.stores:
        stage = stage.outer
    return stage if isinstance(stage, _Joined) else None


def ahead(stage: Any) -> timedelta:
    """How much later it is by the clock of the test."""
    while stage is not None:
        if isinstance(stage, Clock):
            return stage.ahead
        stage = stage.outer
    return timedelta()
