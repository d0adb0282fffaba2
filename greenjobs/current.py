"""The job that runs in this greenlet, what it can ask about itself, and the connections it enqueues on.

Nothing here needs gevent. The worker says which attempt runs, in a context variable; `current_job` shows it.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from greenjobs import config, overrides
from greenjobs.errors import NoCurrentJob
from greenjobs.keeping import NO_RESULT
from greenjobs.progress import JobLog, Progress, Recorder, Report
from greenjobs.stacks import lines_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from psycopg2.extensions import connection as Connection

    from greenjobs.completion import Transaction
    from greenjobs.elsewhere import CompletedElsewhere, ElsewhereCall
    from greenjobs.events import Outcome
    from greenjobs.keeping import ResultCodec
    from greenjobs.lending import JobPool
    from greenjobs.policy import Policy
    from greenjobs.pool import ConnectionPool
    from greenjobs.storage import ClaimedJob, NewJobs


@dataclass(frozen=True, slots=True)
class JobRow:
    """The row of a running job, as it was claimed. `data` is the JSON object as Python has it."""

    id: int
    job_type: str
    data: Any
    queue: str
    priority: int
    retries: int
    crashes: int
    created_at: datetime


@dataclass(slots=True)
class Abroad:
    """That an attempt runs in a process which hears of no AttemptEnded: the runner publishes that in its own.

    `outcome_of` says what an error will mean, or None; it is asked before the surroundings are left. `is_reported` is
    set by whoever reports the error here, where its traceback is, so that it is not reported by the runner, too.
    """

    outcome_of: Callable[[BaseException | None], Outcome]
    is_reported: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where jobs run: the queue, what the runner was given as context, and the connections for jobs to enqueue on.

    `runner_ids` are those under which this process may have claimed its jobs; they become more. `recorder` writes what
    the jobs say of themselves; nobody does where it is None. `surroundings` are entered around each attempt. `abroad`
    is None in the runner's own process. `lends` says what lends connections to the code of jobs, where that is not the
    pool for it, as in a test.
    """

    queue: str
    context: Any
    pool: ConnectionPool
    runner_ids: Sequence[int] = ()
    recorder: Recorder | None = None
    surroundings: tuple[Callable[[], AbstractContextManager[Any]], ...] = ()
    lends: Callable[[], JobPool] | None = None
    abroad: Abroad | None = None


class Declaration(Protocol):
    """What an attempt asks its job: `@job` makes these."""

    name: str
    policy: Policy
    keep: float
    results: ResultCodec | None

    @property
    def max_retries(self) -> int:
        """How often it is tried again after a failure."""


class Attempt:
    """One attempt of one job, while it runs. Made by the worker; shown by `current_job`.

    `completion` is the transaction in which it completes, or has completed, if there is one. `elsewhere` is the call of
    its function, where that is not in a greenlet of the event loop.
    """

    __slots__ = ("completion", "elsewhere", "greenlet", "interrupted_by", "job", "place", "report", "row", "started")

    def __init__(self, job: Declaration, row: ClaimedJob, place: Place, greenlet: Any) -> None:
        self.job = job
        self.row = row
        self.place = place
        self.greenlet = greenlet
        self.started = 0.0
        self.interrupted_by: BaseException | None = None
        self.completion: Transaction | CompletedElsewhere | None = None
        self.elsewhere: ElsewhereCall | None = None
        self.report: Report | None = None

    @property
    def max_retries(self) -> int:
        """How often the job may fail and be tried again; the call that enqueued it may have said otherwise than it."""
        if self.row.options is None:
            return self.job.max_retries
        return overrides.retries(self.row.options, self.job.max_retries)

    def timeouts(self) -> tuple[float | None, float | None] | None:
        """The soft and the hard timeout in seconds; None when there is neither."""
        policy = self.job.policy
        soft, hard = policy.timeout, policy.hard_timeout
        if self.row.options is not None:
            said = overrides.read(self.row.options)
            soft, hard = overrides.seconds(said, "timeout", soft), overrides.seconds(said, "hard_timeout", hard)
        return None if soft is None and hard is None else (soft, hard)

    def frame(self) -> FrameType | None:
        """Where its function stands at this moment; None where that is not in this process."""
        frame: FrameType | None = self.greenlet.gr_frame if self.elsewhere is None else self.elsewhere.frame()
        return frame

    def lines(self) -> list[str]:
        """The same, a line for each frame; blocks for a moment where another process has to be asked."""
        if self.elsewhere is not None:
            return self.elsewhere.lines()
        return lines_of(self.frame())

    def stack(self) -> str:
        """The same, as text for people."""
        frame = self.frame()
        if frame is None and self.elsewhere is not None:
            return self.elsewhere.where
        return "".join(traceback.format_stack(frame))

    @property
    def number(self) -> int:
        """1 for the first time the job runs, and one more for every failure and every death of its runner since."""
        return self.row.retries + self.row.crashes + 1


_attempt: ContextVar[Attempt] = ContextVar("greenjobs_attempt")

#: For the worker, which calls it first thing in the greenlet and the context of the job.
enter_attempt = _attempt.set


def attempt_here() -> Attempt | None:
    """The attempt that runs in this greenlet, or thread; None outside of a job."""
    return _attempt.get(None)


class CurrentJob:
    """What a job can ask about itself. Every attribute raises NoCurrentJob outside a job; bool(current_job) tells."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return _attempt.get(None) is not None

    def __repr__(self) -> str:
        attempt = _attempt.get(None)
        return "<no current job>" if attempt is None else f"<current job {attempt.row.id} ({attempt.job.name})>"

    @property
    def id(self) -> int:
        """The id of the row."""
        return _running().row.id

    @property
    def name(self) -> str:
        """The name of the job type."""
        return _running().job.name

    @property
    def queue(self) -> str:
        """The queue it was claimed from."""
        return _running().place.queue

    @property
    def attempt(self) -> int:
        """1 for the first time it runs, and one more for every failure and every death of its runner since."""
        return _running().number

    @property
    def retries(self) -> int:
        """How often it has failed so far."""
        return _running().row.retries

    @property
    def max_retries(self) -> int:
        """How often it may fail and be tried again."""
        return _running().max_retries

    @property
    def is_last_attempt(self) -> bool:
        """Whether a failure now is final."""
        attempt = _running()
        return attempt.row.retries >= attempt.max_retries

    @property
    def tick_at(self) -> datetime | None:
        """The tick of the schedule that enqueued it; None if no schedule did."""
        try:
            return datetime.fromisoformat(overrides.read(_running().row.options)["tick_at"])
        except (KeyError, TypeError, ValueError):  # also what somebody else's SQL says
            return None

    @property
    def schedule(self) -> dict[str, str] | None:
        """`name`, `cron` expression and `timezone` of the schedule that enqueued it, as they were; None if none did."""
        schedule = overrides.read(_running().row.options).get("schedule")
        return schedule if isinstance(schedule, dict) else None

    @property
    def headers(self) -> dict[str, str]:
        """What the enqueue gave the job to carry, such as the trace it belongs to; see greenjobs.surroundings."""
        headers = overrides.read(_running().row.options).get("headers")
        if not isinstance(headers, dict):  # somebody else's SQL may say anything
            return {}
        return {name: value for name, value in headers.items() if isinstance(value, str)}

    @property
    def context(self) -> Any:
        """What the runner was given as `context`."""
        return _running().place.context

    @property
    def row(self) -> JobRow:
        """The row of this job as it was claimed."""
        import orjson

        attempt = _running()
        row = attempt.row
        return JobRow(
            id=row.id,
            job_type=row.job_type,
            data=orjson.loads(row.data),
            queue=attempt.place.queue,
            priority=row.priority,
            retries=row.retries,
            crashes=row.crashes,
            created_at=datetime.fromtimestamp(row.created_at, timezone.utc),
        )

    def transaction(self, connection: Any = None, *, result: Any = NO_RESULT) -> AbstractContextManager[Any]:
        """A `with` block at whose end the job completes, in one transaction with all that was written in the block.

        Yields a psycopg2 connection from the pool for job code; or `connection`, as for `.options(connection=…)`, of
        the caller's; on one of Django's the block is one of `atomic()`. Jobs that are enqueued in the block are part of
        it. A job with keep_result=True keeps `result`, as it completes before it returns. An error rolls back, and
        fails the attempt like any other. Raises JobLost when the job is somebody else's by then, CompletionError when
        it has completed already, and whatever the database says; in all cases nothing was written, unless the answer to
        COMMIT was lost.
        """
        return completion_room().Transaction(_running(), connection, result)  # type: ignore[no-any-return]

    def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Say how far the job is, on its row, for `greenjobs jobs show` and `jobs.get`. Returns at once.

        Call it as often as you like: the newest is written about once a second. It takes the place of the one before,
        which stays until then, over retries, too: see `last_progress`. Numbers are from 0; `done` may be more than
        `total`, where that was an estimate; a message is cut after 500 characters. Raises OptionError.
        """
        attempt = _running()
        (attempt.report or begin_report(attempt)).say(done, total, message)

    @property
    def last_progress(self) -> Progress | None:
        """How far the job was said to be last, by this attempt or by one before; None when none said so.

        Asks the database, once, unless this attempt has said so itself, or is the first. Raises DatabaseUnavailable.
        """
        attempt = _running()
        report = attempt.report or begin_report(attempt)
        if report.progress is None and not report.former_is_known and attempt.row.attempt > 1:
            settings = config.current()
            pool, storage = database_rooms()
            with lender(settings).connection() as connection, pool.bounded(settings.enqueue_timeout):
                report.former = Progress.read(storage.last_progress(connection, attempt.row.id))
            report.former_is_known = True
        return report.progress or report.former

    @property
    def log(self) -> JobLog:
        """The logger of the job's module, which puts job_id, job_type, queue and attempt on every line.

        With @job(keep_log=True) the newest lines are kept on the row as well, as far as it is.
        """
        attempt = _running()
        return (attempt.report or begin_report(attempt)).log


current_job = CurrentJob()


def _running() -> Attempt:
    attempt = _attempt.get(None)
    if attempt is None:
        raise NoCurrentJob("current_job is only there while a job runs; bool(current_job) tells whether one does")
    return attempt


def begin_report(attempt: Attempt) -> Report:
    """What the attempt says of itself, from now on."""
    row, place = attempt.row, attempt.place
    attempt.report = Report(
        id=row.id,
        claim=row.attempt,
        job_type=row.job_type,
        queue=place.queue,
        attempt=attempt.number,
        logger_name=attempt.job.__module__,
        kept_lines=attempt.job.policy.keep_log,
        recorder=place.recorder,
    )
    return attempt.report


# --- what to enqueue on -----------------------------------------------------------------------------------------------


@functools.cache
def database_rooms() -> tuple[Any, Any]:
    """`greenjobs.pool` and `greenjobs.storage`, which need psycopg2: loaded with the first job that is enqueued."""
    from greenjobs import pool, storage

    return pool, storage


class Stage(Protocol):
    """What stands between enqueuing and the database in the tests of an application: `greenjobs.testing` has them."""

    def enqueue(self, job: Any, new: NewJobs, *, connection: Any) -> list[Any]:
        """Do whatever is done with these jobs, and return their handles; `connection` is what the call named."""

    def lender(self, settings: config.Settings) -> ConnectionPool:
        """The connections of whoever is not inside a job."""

    @property
    def is_unseen(self) -> bool:
        """Whether no runner sees the jobs that are stored."""

    @property
    def runs_at_once(self) -> bool:
        """Whether a job has run when it has been enqueued."""

    def job_pool(self, settings: config.Settings) -> JobPool:
        """What lends connections to the code of jobs, and to whoever else asks for one."""


#: Nothing, wherever jobs are not tested. Of the whole process, for a view may be tested that runs in another thread.
stage: Stage | None = None


@functools.cache
def completion_room() -> Any:
    """`greenjobs.completion`, which needs psycopg2 and gevent."""
    from greenjobs import completion

    return completion


def connection() -> AbstractContextManager[Connection]:
    """Lend a psycopg2 connection for a `with` block: committed at its end, rolled back after an error.

    It leads to the database that holds the jobs. Inside a job and elsewhere, one process lends `job_connections` of
    them at most; whoever finds all of them busy waits, for `job_connection_timeout` seconds at most, and gets
    DatabaseUnavailable then.
    """
    from greenjobs import lending

    attempt = _attempt.get(None)
    if attempt is not None:
        return lending.Lent(lending.pool_at(attempt.place))
    settings = config.current()
    return lending.Lent(lending.job_pool(settings) if stage is None else stage.job_pool(settings))


def joined() -> Any:
    """The connection of the transaction in which the job that runs here is about to complete; None if it is in none."""
    attempt = _attempt.get(None)
    return None if attempt is None or attempt.completion is None else attempt.completion.joined()


ambient: Callable[[str, str], Any] | None = None
"""Set by greenjobs.contrib: given the database URL and the name of a job, what a call that names no connection is to be
enqueued on, as for `.options(connection=…)`; None for a connection of ours, a greenjobs.holding.Hold for later."""


def lender(settings: config.Settings) -> ConnectionPool:
    """The connections to enqueue on: those of the runner inside a job, else those of the process."""
    attempt = _attempt.get(None)
    if attempt is not None:
        return attempt.place.pool
    if stage is not None:
        return stage.lender(settings)
    pool, _ = database_rooms()
    shared: ConnectionPool = pool.shared_pool(settings)
    return shared
