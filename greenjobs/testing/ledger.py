"""What became of the jobs that were run in the transaction of a test, so that it stays so.

A session that shares this transaction, as SQLAlchemy's with join_transaction_mode="create_savepoint", rolls back to the
savepoint where it began. If that was before the outcome of a job was written, or even before the job was claimed, this
is undone with it, though the job has run: in production it would not be, where a runner writes on connections of its
own. So it is written again, whenever greenjobs looks at the rows next.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from psycopg2 import extensions

from greenjobs import config, storage
from greenjobs.current import Attempt
from greenjobs.error_record import error_record
from greenjobs.job import Job
from greenjobs.keeping import NO_RESULT, keep_seconds
from greenjobs.storage import Failure, Fence, Snoozed, rehearsal
from greenjobs.testing.attempts import Ran

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

logger = logging.getLogger(__name__)

RUNNER_NAME = "greenjobs.testing"
"""As which errors name the runner, where there is none."""


class Ended(NamedTuple):
    """An attempt and its outcome: under which claim it was made, in how many seconds of the database there will be
    another, and what stays of the job if there will be none."""

    runner: int
    fence: Fence
    ran: Ran
    runs_in: float | None
    end: storage.Ended


def ended(runner: int, attempt: Attempt, ran: Ran, *, ahead_seconds: float) -> Ended:
    """This attempt has ended just now, by a clock that is so much ahead of the database's."""
    row, fence = attempt.row, Fence(attempt.row.id, attempt.row.attempt)
    runs_in = None if ran.retry_in is None else ran.retry_in + ahead_seconds
    told = ran.error is not None and ran.outcome in ("discarded", "expired")
    end = storage.Ended(
        fence,
        ran.outcome,
        keep_seconds(attempt.job.keep, row.options),
        _result_text(attempt, ran) if ran.outcome == "done" else None,
        error_record(ran.error, ran.attempt, RUNNER_NAME) if told and ran.error is not None else None,
        time.perf_counter() - attempt.started,
        row.waited,
    )
    return Ended(runner, fence, ran, runs_in, end)


def write(connection: Connection, entry: Ended) -> bool:
    """Write the outcome as a runner does; False when the job is not held under this claim any more."""
    runners, fence, ran = [entry.runner], entry.fence, entry.ran
    if ran.outcome in ("failed", "retried") and ran.error is not None:
        failure = Failure(fence, entry.runs_in, error_record(ran.error, ran.attempt, RUNNER_NAME))
        return bool(storage.fail(connection, runners, [failure]))
    if ran.outcome == "snoozed":
        return bool(storage.snooze(connection, runners, [Snoozed(fence, entry.runs_in or 0.0)]))
    if ran.outcome == "interrupted":
        return bool(storage.give_back(connection, runners, [fence], has_started=True))
    return bool(storage.end(connection, runners, [entry.end]))


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


def _result_text(attempt: Attempt, ran: Ran) -> str | None:
    """What is kept of what the job returned, or gave the block in which it completed; None without."""
    job = cast("Job[..., Any]", attempt.job)
    value = ran.value if attempt.completion is None else attempt.completion.result
    if job.results is None or value is NO_RESULT or not keep_seconds(job.keep, attempt.row.options):
        return None
    text, complaint = job.results.encode(value, max_bytes=config.current().max_payload_bytes)
    if complaint is not None:
        logger.warning(
            "job %s (%s) %s; such results are not kept, and this is not said again",
            *(attempt.row.id, attempt.row.job_type, complaint),
        )
    return text
