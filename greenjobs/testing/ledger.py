"""What became of the jobs that were run in the transaction of a test, so that it stays so.

A session that shares this transaction, as SQLAlchemy's with join_transaction_mode="create_savepoint", rolls back to the
savepoint where it began. If that was before the outcome of a job was written, or even before the job was claimed, this
is undone with it, though the job has run: in production it would not be, where a runner writes on connections of its
own. So it is written again, whenever greenjobs looks at the rows next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from psycopg2 import extensions

from greenjobs import storage
from greenjobs.error_record import error_record
from greenjobs.storage import ClaimedJob, Failure, Fence, Snoozed, rehearsal
from greenjobs.testing.attempts import Ran

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

_RUNNER_NAME = "greenjobs.testing"


class Ended(NamedTuple):
    """An attempt and its outcome: under which claim it was made, and in how many seconds of the database there will be
    another."""

    runner: int
    fence: Fence
    ran: Ran
    runs_in: float | None


def ended(runner: int, row: ClaimedJob, ran: Ran, *, ahead_seconds: float) -> Ended:
    """This attempt has ended, by a clock that is so much ahead of the database's."""
    runs_in = None if ran.retry_in is None else ran.retry_in + ahead_seconds
    return Ended(runner, Fence(row.id, row.attempt), ran, runs_in)


def write(connection: Connection, entry: Ended) -> bool:
    """Write the outcome as a runner does; False when the job is not held under this claim any more."""
    runners, fence, ran = [entry.runner], entry.fence, entry.ran
    if ran.outcome in ("failed", "retried") and ran.error is not None:
        failure = Failure(fence, entry.runs_in, error_record(ran.error, ran.attempt, _RUNNER_NAME))
        return bool(storage.fail(connection, runners, [failure]))
    if ran.outcome == "snoozed":
        return bool(storage.snooze(connection, runners, [Snoozed(fence, entry.runs_in or 0.0)]))
    if ran.outcome == "interrupted":
        return bool(storage.give_back(connection, runners, [fence]))
    return bool(storage.acknowledge(connection, runners, [fence]))


def write_again(connection: Connection, entries: list[Ended]) -> None:
    """Write what was undone of these outcomes, the oldest first."""
    if not entries or is_aborted(connection):
        return
    undone = rehearsal.undone(connection, [(entry.fence, entry.runner) for entry in entries])
    for entry in entries:
        if entry.fence in undone:
            rehearsal.reclaim(connection, entry.runner, entry.fence)
            write(connection, entry)


def is_aborted(connection: Connection) -> bool:
    """Whether the transaction has failed, and takes nothing but a rollback."""
    return connection.get_transaction_status() == extensions.TRANSACTION_STATUS_INERROR
