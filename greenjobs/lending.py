"""Connections for the code of jobs: a pool of their own for each database, in psycopg2's ordinary transaction mode.

They have nothing to do with the runner's own connections, nor with those for enqueuing: jobs that keep all of them busy
hold up other jobs that want one, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import psycopg2
from psycopg2 import errors, extensions

from greenjobs import config
from greenjobs.errors import CompletionError, GreenjobsError
from greenjobs.pool import ConnectionPool
from greenjobs.statement import PlanningConnection

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

logger = logging.getLogger(__name__)


class JobConnection(PlanningConnection):
    """A connection that is lent to a job. While `is_completing`, only the end of the block ends the transaction."""

    is_completing = False

    def commit(self) -> None:
        """Commit; refused in a block that does it at its end."""
        refuse_to_end(self, "commit")
        super().commit()

    def rollback(self) -> None:
        """Roll back; refused in a block that does it at its end."""
        refuse_to_end(self, "rollback")
        super().rollback()

    def reset(self) -> None:
        """As psycopg2 has it, which rolls back; refused where that is."""
        refuse_to_end(self, "reset")
        super().reset()

    def set_isolation_level(self, level: int | None) -> None:
        """As psycopg2 has it, which rolls back a transaction that has begun; refused where that is."""
        if self.get_transaction_status() != extensions.TRANSACTION_STATUS_IDLE:
            refuse_to_end(self, "set_isolation_level")
        super().set_isolation_level(level)


class Completing(Protocol):
    """What may be lent to a block of `current_job.transaction()`, and then is_completing."""

    is_completing: bool


def refuse_to_end(connection: Completing, what: str) -> None:
    """Raise CompletionError while it is for the block alone to commit and roll back."""
    if connection.is_completing:
        raise CompletionError(
            f"{what}() in a block of current_job.transaction(): what the block does and the end of the job are one "
            f"transaction, which ends with the block; raise an error to roll it back, use SAVEPOINT for a part of "
            f"it, and greenjobs.connection() for what is not to be in it"
        )


def was_ended_by_statement(connection: Connection) -> bool:
    """Whether a COMMIT or ROLLBACK has been sent as a statement: the server is in no transaction, psycopg2 is in one.

    Whatever was sent after it has been committed by itself.
    """
    is_idle = connection.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE
    return is_idle and connection.status == extensions.STATUS_BEGIN


class JobPool(ConnectionPool):
    """Lends connections with autocommit off, as psycopg2 makes them, and takes them back as they were."""

    connection_type = JobConnection

    def take(self) -> JobConnection:
        """As in any pool; but with autocommit off."""
        connection = super().take()
        assert isinstance(connection, JobConnection)
        if connection.autocommit:  # fresh
            connection.autocommit = False
        return connection

    def give_back(self, connection: PlanningConnection) -> None:
        """As in any pool; what the borrower set on it is undone."""
        if not connection.closed and connection.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE:
            try:
                _restore(connection)
            except psycopg2.Error:  # it is broken, then, and the pool closes it
                connection.close()
        super().give_back(connection)


def _restore(connection: PlanningConnection) -> None:
    # In autocommit this says so to the server as well; otherwise it costs no round trip.
    connection.set_session(isolation_level="default", readonly="default", deferrable="default", autocommit=False)
    connection.cursor_factory = None  # type: ignore[assignment]  # what it is on a fresh connection
    connection.notices.clear()


class Lent:
    """A connection for one `with` block at a time, which ends with a commit, or after an error with a rollback."""

    __slots__ = ("_connection", "_is_in_use", "_pool")

    def __init__(self, pool: JobPool) -> None:
        self._pool = pool
        self._is_in_use = False

    def __enter__(self) -> PlanningConnection:
        if self._is_in_use:
            # As of one that is kept in a module: two jobs would end each other's transactions.
            raise GreenjobsError(
                "what greenjobs.connection() returned is in use in another block; call it anew for each: "
                "`with greenjobs.connection() as connection:`"
            )
        self._is_in_use = True
        try:
            self._connection = self._pool.take()
        except BaseException:
            self._is_in_use = False
            raise
        return self._connection

    def __exit__(self, error_type: object, error: BaseException | None, trace: object) -> None:
        connection = self._connection
        self._is_in_use = False
        try:
            if error is None:
                connection.commit()
            elif not connection.closed:
                roll_back(connection)
        finally:
            if isinstance(error, errors.ReadOnlySqlTransaction):
                # The server may have become a standby: connections opened from now on go to the new primary.
                self._pool.close()
            self._pool.give_back(connection)


def roll_back(connection: PlanningConnection) -> None:
    """Roll back because of an error, which is what its caller has to hear of; a failure to do so closes the connection.

    The server rolls back then, too.
    """
    try:
        connection.rollback()
    except psycopg2.Error as error:
        logger.debug("rolling back failed: %s", error)
        connection.close()


_job_pools: dict[str, JobPool] = {}


def job_pools() -> list[JobPool]:
    """Those of this process that have been made."""
    return list(_job_pools.values())


def job_pool(settings: config.Settings, database_url: str | None = None) -> JobPool:
    """The pool of this process for the code of jobs, one for each database; made at its first use."""
    url = database_url or settings.require_database_url()
    pool = _job_pools.get(url)
    if pool is None:
        pool = JobPool(
            url,
            size=settings.job_connections,
            setting="job_connections",
            wait_seconds=settings.job_connection_timeout,
            application_name="greenjobs job",
        )
        # Of two that race here, both use the one that was stored first.
        pool = _job_pools.setdefault(url, pool)
    return pool


class LendingPlace(Protocol):
    """What is needed to know of where a job runs."""

    @property
    def pool(self) -> ConnectionPool:
        """A pool of the database that has the jobs."""

    @property
    def lends(self) -> Callable[[], JobPool] | None:
        """What lends connections instead, as in a test."""


def pool_at(place: LendingPlace) -> JobPool:
    """What lends connections to the code of a job that runs there."""
    return job_pool(config.current(), place.pool.database_url) if place.lends is None else place.lends()
