"""Runs what waits in the database of a test, in the calling thread, one job after the other.

Rows are claimed, acknowledged, failed and put off by the statements that a runner has for it. On the connection of
`using` all that happens in the transaction of the test, beside what the jobs do in it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from psycopg2 import errors

from greenjobs import config, current, pool, storage
from greenjobs.errors import GreenjobsError, JobLost, OptionError
from greenjobs.job import Job, check_queue_name, registered_jobs
from greenjobs.statement import PlanningConnection
from greenjobs.storage import ClaimedJob, Fence, rehearsal
from greenjobs.testing import ledger
from greenjobs.testing.attempts import Ran, make, new_attempt
from greenjobs.testing.ledger import is_aborted
from greenjobs.testing.lent import plain_rows
from greenjobs.testing.modes import ahead, joined, memory, travel
from greenjobs.testing.tables import tables_needed
from greenjobs.version import __version__

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

# A lease of whom nobody sees until the transaction ends, or whom a pooler allows no session.
_LEASE_SECONDS = 60 * 60.0


class DrainError(GreenjobsError):
    """`drain` cannot go on: nothing is stored in this mode, there is no end of jobs, or a job ended the transaction."""


def drain(
    *,
    queue: str | None = None,
    with_scheduled: bool = False,
    raise_errors: bool = True,
    context: Any = None,
    limit: int = 1000,
) -> list[Ran]:
    """Run the jobs that are due, in this thread, and those that they enqueue; returns the attempts that were made.

    Of all jobs that are declared in this process, or those in `queue` only; by priority, then by id, over all queues.
    What is due is a matter of the clock of `travel`. Retries are due when their backoff is over, so usually not now;
    with_scheduled=True lets time pass until nothing is left, retries included.

    The outcome of each attempt is written, as a runner does it. Then a failure is raised (see Ran.raise_error), and
    what is left waits for the next drain; with raise_errors=False it goes on. `context` is that of the runner. Raises
    DrainError after `limit` attempts, and where nothing is stored; DatabaseUnavailable; and SchemaError.
    """
    __tracebackhide__ = True
    if queue is not None:
        queue = check_queue_name(queue, "drain: queue", OptionError)
    if type(limit) is not int or limit < 1:
        raise OptionError(f"drain: limit is {limit!r}; allowed: 1 and more")
    with _connection() as connection, _registered(connection) as runner, travel() as clock:
        rehearsed = _Rehearsal(connection, runner, queue=queue, context=context)
        ran: list[Ran] = []
        while True:
            row = rehearsed.claim()
            if row is None and with_scheduled:
                seconds = rehearsed.ripen_next()
                if seconds is None:
                    return ran
                clock.move(timedelta(seconds=max(seconds - _ahead_seconds(), 0.0)))
                continue
            if row is None:
                return ran
            if len(ran) == limit:
                rehearsed.give_back(row)
                raise DrainError(
                    f"drain ran {limit} jobs, and there are more, such as job {row.id} ({row.job_type}); "
                    f"do jobs enqueue or retry themselves for ever? If not, raise limit=…"
                )
            ran.append(rehearsed.run(row))
            if raise_errors:
                ran[-1].raise_error()


class _Rehearsal:
    """What is a worker and an acknowledger in a runner."""

    def __init__(self, connection: Connection, runner: int, *, queue: str | None, context: Any) -> None:
        self._connection = connection
        self._runner = runner
        self._queue = queue
        self._context = context
        self._joined = joined()
        self._jobs: Mapping[str, Job[Any, Any]] = {
            name: job for job in registered_jobs().values() for name in (job.name, *job.aliases)
        }
        self._job_types = sorted(self._jobs)
        self._claimed_from = ""

    def claim(self) -> ClaimedJob | None:
        """Take the first job that is due; None when there is none, or somebody else was faster."""
        connection = plain_rows(self._connection)
        storage.route(connection, {name: job.queue for name, job in self._jobs.items()})
        rehearsal.ripen(connection, ahead_seconds=_ahead_seconds())
        first = rehearsal.first_available(connection, queue=self._queue, job_types=self._job_types)
        if first is None:
            return None
        self._claimed_from, is_suspect, exclusive_key = first
        place: dict[str, Any] = {"queue": self._claimed_from, "job_types": self._job_types, "limit": 1}
        if exclusive_key is None or is_suspect:
            rows = storage.claim(connection, runner=self._runner, suspects=is_suspect, **place)
        else:
            rows = storage.claim_exclusive(connection, runner=self._runner, keys=[exclusive_key], **place)
        return rows[0] if rows else None

    def ripen_next(self) -> float | None:
        """Make the next job for later available, and say in how many seconds from now it is due."""
        connection = plain_rows(self._connection)
        return rehearsal.ripen_next(connection, queue=self._queue, job_types=self._job_types)

    def run(self, row: ClaimedJob) -> Ran:
        """Make this attempt, and write its outcome."""
        try:
            with self._shared(row):
                job, ids = self._jobs[row.job_type], [self._runner]
                attempt = new_attempt(job, row, self._claimed_from, self._context, runner_ids=ids)
                ran = make(attempt)
        except BaseException:
            if not self._connection.closed and not is_aborted(self._connection):
                self.give_back(row)
            raise
        if self._joined is not None and isinstance(ran.error, JobLost):
            raise DrainError(
                f"job {row.id} ({row.job_type}) was not to be found where it completes: it gave "
                f"current_job.transaction() another connection than the test is using, or has rolled a session back "
                f"to a savepoint from before it was claimed; give it no connection, or this one, or a session on it, "
                f"or drain without testing.using"
            ) from ran.error
        entry = ledger.ended(self._runner, attempt, ran, ahead_seconds=_ahead_seconds())
        connection = plain_rows(self._connection)
        is_held = ledger.write(connection, entry)
        if self._joined is not None:
            self._joined.ended.append(entry)
            if not is_held:
                ledger.write_again(connection, self._joined.ended)
        return ran

    def give_back(self, row: ClaimedJob) -> None:
        """Let the job wait again, as if it had not been claimed."""
        storage.give_back(plain_rows(self._connection), [self._runner], [Fence(row.id, row.attempt)])

    @contextlib.contextmanager
    def _shared(self, row: ClaimedJob) -> Iterator[None]:
        """Keep the transaction of the test whole, in which the job may work, too."""
        if self._joined is None:
            yield
            return
        connection, claim = plain_rows(self._connection), rehearsal.Claim(row.id, self._runner)
        before = storage.transaction_id(connection)
        mark = rehearsal.set_savepoint(connection, claim)
        yield
        if connection.closed:
            raise DrainError(f"job {row.id} ({row.job_type}) closed the connection that the test is using")
        # A job that fails in the database and does not roll back has undone what it did, wherever it runs.
        if is_aborted(connection):
            try:
                rehearsal.back_to_savepoint(connection)
            except errors.InvalidSavepointSpecification:
                connection.rollback()
        if storage.transaction_id(connection) != before:
            raise DrainError(
                f"job {row.id} ({row.job_type}) committed or rolled back the transaction that the test is using, "
                f"so that nothing is left to roll back at the end; give the job a session that joins the "
                f'transaction with savepoints, such as SQLAlchemy\'s join_transaction_mode="create_savepoint", or '
                f"drain without testing.using"
            )
        rehearsal.drop_savepoint(connection, claim, mark)


def _ahead_seconds() -> float:
    """By how much the clock of the test is ahead of now()."""
    test = joined()
    return ahead(current.stage).total_seconds() + (0.0 if test is None else test.elapsed_seconds())


@contextlib.contextmanager
def _connection() -> Iterator[Connection]:
    """The connection that the test is using, or one of the drain's own."""
    mode = memory()
    if mode is not None:
        raise DrainError(
            f"drain has nothing to run: in the mode {type(mode).__name__.lower()} no job is stored; "
            f"drain outside of it, or with testing.using(connection) inside of it"
        )
    test = joined()
    if test is not None:
        ledger.write_again(plain_rows(test.connection), test.ended)
        yield test.connection
        return
    settings = config.current()
    connection = pool.connect(
        settings.session_url or settings.require_database_url(),
        application_name="greenjobs testing",
        timeout_seconds=settings.enqueue_timeout,
    )
    with contextlib.closing(connection):
        yield connection


@contextlib.contextmanager
def _registered(connection: Connection) -> Iterator[int]:
    """Be a runner for the time of a drain, whose jobs others take back should the process die."""
    has_session = isinstance(connection, PlanningConnection) and connection.autocommit and not connection.is_pooled
    with tables_needed():
        runner = storage.register_runner(
            plain_rows(connection),
            hostname=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            queues={},
            job_types=sorted(registered_jobs()),
            lease_seconds=None if has_session else _LEASE_SECONDS,
        )
    try:
        yield runner
    finally:
        if not connection.closed and not is_aborted(connection):
            storage.end_runners(plain_rows(connection), [runner])
