"""The transaction in which a job completes: what it writes there, the jobs that it enqueues there, and the end of its
own row are committed together, or not at all.

At the end of the block the row is acknowledged on the job's connection, under the fence of its claim. A job that was
given to somebody else meanwhile finds nothing to acknowledge, and is rolled back. The other way round, whoever wants to
take the row in that moment waits for the commit, and then finds it gone: so of two runners that ran the same job, one
commits. That also decides when the answer to a COMMIT is lost: the job has failed then, as far as it knows, and the
fence of that failure finds the row, or does not.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import gevent

from greenjobs import alchemy, config, djangodb, lending, pool, storage
from greenjobs.errors import CompletionError, JobLost, SchemaError
from greenjobs.keeping import NO_RESULT, ResultCodec, keep_seconds
from greenjobs.storage import ClaimedJob, Fence

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from greenjobs.pool import ConnectionPool

logger = logging.getLogger(__name__)

_UNDEFINED_TABLE = "42P01"  # PostgreSQL's error code


class CompletingPlace(Protocol):
    """What is needed to know of where the job runs."""

    @property
    def pool(self) -> ConnectionPool:
        """A pool of the database that has the jobs."""

    @property
    def runner_ids(self) -> Sequence[int]:
        """The ids under which this process may have claimed the job."""

    @property
    def lends(self) -> Callable[[], lending.JobPool] | None:
        """What lends connections to the job, if it is not the pool for it."""


class CompletingJob(Protocol):
    """What is needed to know of a job."""

    keep: float
    results: ResultCodec | None


class CompletingAttempt(Protocol):
    """What is needed to know of an attempt; see greenjobs.current.Attempt."""

    row: ClaimedJob
    greenlet: Any
    started: float
    completion: Transaction | None

    @property
    def job(self) -> CompletingJob:
        """Whose attempt it is."""

    @property
    def place(self) -> CompletingPlace:
        """Where it runs."""


class _State(enum.Enum):
    CLOSED = "closed"  # not begun, or rolled back
    OPEN = "open"
    COMMITTED = "committed"
    LOST = "lost"


class Transaction:
    """A block of `current_job.transaction()`. From its beginning on it is the `completion` of the attempt; after it has
    rolled back the attempt has none, and may begin another.
    """

    def __init__(self, attempt: CompletingAttempt, given: Any = None, result: Any = NO_RESULT) -> None:
        self._attempt = attempt
        self._given = given
        self._result = result
        self._state = _State.CLOSED
        self._lent: lending.JobConnection | None = None
        self._pool: lending.JobPool | None = None
        self._number: int | None = None
        self._block: djangodb.AtomicBlock | None = None

    # --- what the executor and enqueuing ask --------------------------------------------------------------------------

    @property
    def is_committed(self) -> bool:
        """Whether the job has completed."""
        return self._state is _State.COMMITTED

    @property
    def result(self) -> Any:
        """What the block was given as result; NO_RESULT without."""
        return self._result

    def joined(self) -> Any:
        """What to enqueue on here, for it to be part of this transaction; None when it is not open, or not here."""
        if self._state is not _State.OPEN or not _is_here(self._attempt):
            return None
        if self._lent is not None:
            return self._lent
        # Not in a hook of a session that is called when the end of the block has committed.
        return self._given if alchemy.takes_statements(self._given) else None

    def end(self) -> None:
        """The function has ended. One that leaves a block open, or went on though it had lost the job, has failed."""
        if self._state is _State.LOST:
            raise self._lost_error()
        if self._state is _State.OPEN:
            self.abandon()
            raise CompletionError(
                f"job {self._attempt.row.id} ({self._attempt.row.job_type}) ended inside its block of "
                f"current_job.transaction(), which is rolled back; leave the block before"
            )

    def abandon(self) -> None:
        """Roll back if it is still open, because nobody is going to end it."""
        if self._state is _State.OPEN:
            self._roll_back()

    # --- the block ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Any:
        self._refuse_misuse()
        if self._given is None:
            self._pool = lending.pool_at(self._attempt.place)
            self._lent = self._pool.take()
            self._lent.is_completing = True
        else:
            self._block = djangodb.begin(self._given)
            try:
                self._number = storage.transaction_id(self._shared())
            except BaseException as error:
                pool.forget_if_broken(self._given, error)
                if self._block is not None:
                    self._block.rollback()
                raise
        self._state = _State.OPEN
        self._attempt.completion = self
        return self._given if self._lent is None else self._lent

    def __exit__(self, error_type: object, error: BaseException | None, trace: object) -> None:
        if self._state is not _State.OPEN:  # it was abandoned
            return
        if error is not None:
            self._roll_back()
            return
        try:
            is_held = self._acknowledge()
            if is_held:
                self._commit()
        except BaseException:
            # Also when a COMMIT was sent and not answered. Nobody here can know what became of it.
            self._roll_back()
            raise
        if not is_held:
            self._roll_back()
            self._state = _State.LOST
            self._attempt.completion = self
            raise self._lost_error()

    def _refuse_misuse(self) -> None:
        attempt = self._attempt
        subject = f"job {attempt.row.id} ({attempt.row.job_type})"
        if not _is_here(attempt):
            raise CompletionError(
                f"{subject} calls current_job.transaction() in a greenlet or thread that it started; only the job's "
                f"own can complete it, as it ends when its function returns"
            )
        if attempt.completion is None:
            return
        if attempt.completion._state is _State.LOST:
            raise self._lost_error()
        if attempt.completion.is_committed:
            raise CompletionError(f"{subject} has completed already; a job completes once: put all of it in one block")
        raise CompletionError(f"{subject} is in a block of current_job.transaction() already; there is one of them")

    def _lost_error(self) -> JobLost:
        row = self._attempt.row
        return JobLost(
            f"job {row.id} ({row.job_type}) is no longer held here (claim {row.attempt}); "
            f"what its transaction wrote is rolled back"
        )

    def _acknowledge(self) -> bool:
        """End the row in the open transaction, if it is still ours; whether it was."""
        row = self._attempt.row
        connection = self._shared()
        if self._was_ended_within(connection):
            raise CompletionError(
                f"job {row.id} ({row.job_type}): the transaction of current_job.transaction() has been committed or "
                f"rolled back inside the block; take out what does so, or what was written before may be written twice"
            )
        known = self._attempt.place.runner_ids
        if not known:
            return True  # claimed by nobody, for it is stored nowhere: an attempt in a test
        try:
            while True:
                runners = tuple(known)
                if self._end_row(connection, runners):
                    return True
                # It may be held under an id that this process got while the statement was on its way.
                if runners == tuple(known):
                    return False
        except Exception as error:
            if getattr(error, "pgcode", None) != _UNDEFINED_TABLE:
                raise
            raise SchemaError(
                f"job {row.id} ({row.job_type}) cannot complete on this connection: the tables of greenjobs are not in "
                f"its database, or not in a schema of its search_path"
            ) from error

    def _was_ended_within(self, connection: Connection) -> bool:
        if self._number is None:  # ours, which refuses all but statements, and saves a round trip
            return lending.was_ended_by_statement(connection)
        return storage.transaction_id(connection) != self._number

    def _end_row(self, connection: Connection, runners: Sequence[int]) -> set[int]:
        attempt, fence = self._attempt, Fence(self._attempt.row.id, self._attempt.row.attempt)
        seconds = keep_seconds(attempt.job.keep, attempt.row.options)
        if not seconds:
            return storage.acknowledge(connection, runners, [fence])
        ended = storage.Ended(
            fence,
            "done",
            seconds,
            self._result_text(),
            run_seconds=time.perf_counter() - attempt.started,
            waited_seconds=attempt.row.waited,
        )
        return storage.end(connection, runners, [ended])

    def _result_text(self) -> str | None:
        """What the block was given as result, as JSON; None without, and where the job keeps none or JSON cannot."""
        results = self._attempt.job.results
        if self._result is NO_RESULT or results is None:
            return None
        text, complaint = results.encode(self._result, max_bytes=config.current().max_payload_bytes)
        if complaint is not None:
            logger.warning(
                "job %s (%s) %s; such results are not kept, and this is not said again",
                *(self._attempt.row.id, self._attempt.row.job_type, complaint),
            )
        return text

    def _commit(self) -> None:
        if self._lent is not None:
            self._lent.is_completing = False
            self._lent.commit()
        else:
            self._end_given("commit")
        self._state = _State.COMMITTED
        self._give_back()

    def _roll_back(self) -> None:
        self._state = _State.CLOSED
        self._attempt.completion = None
        try:
            if self._lent is None:
                pool.forget_if_broken(self._given)
                # What went wrong first is what the job has to hear of.
                with contextlib.suppress(Exception):
                    self._end_given("rollback")
            else:
                self._lent.is_completing = False
                if not self._lent.closed:
                    lending.roll_back(self._lent)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if self._pool is not None and self._lent is not None:
            self._pool.give_back(self._lent)
            self._pool = None

    # --- a connection of the caller's ---------------------------------------------------------------------------------

    def _shared(self) -> Connection:
        """The psycopg2 connection behind what the job gave; a session may have another one after a rollback."""
        connection = self._lent if self._lent is not None else pool.raw_connection(self._given)
        if connection.autocommit:
            row = self._attempt.row
            raise CompletionError(
                f"job {row.id} ({row.job_type}): the connection of current_job.transaction() is in autocommit, "
                f"where every statement is committed by itself; set autocommit = False"
            )
        return connection

    def _end_given(self, how: str) -> None:
        """Commit or roll back through what the job gave, if it does such things: a session has own ideas about it."""
        end = getattr(self._block or self._given, how, None)
        if not callable(end):  # a cursor
            end = getattr(pool.raw_connection(self._given), how)
        end()


def _is_here(attempt: CompletingAttempt) -> bool:
    """Whether this is the greenlet that the function of the job was called in; outside a runner it has none."""
    return attempt.greenlet is None or gevent.getcurrent() is attempt.greenlet
