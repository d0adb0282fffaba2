"""Runners take jobs, in the order of priority and age."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg2 import errors

from greenjobs.statement import Statement
from greenjobs.storage.contest import CONTEST_ROUNDS

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class ClaimedJob(NamedTuple):
    """A row as the claim returns it.

    `data` and `options` are JSON texts, `created_at` is in seconds since 1970, `waited` in seconds. A job whose
    `start_by` (by time.monotonic()) has passed when it is to start has expired; None when it does not. Of the jobs with
    one `exclusive_key` no other runs meanwhile.
    """

    id: int
    job_type: str
    data: str
    attempt: int
    retries: int
    priority: int
    crashes: int
    created_at: float
    waited: float
    options: str | None
    start_by: float | None
    exclusive_key: str | None


class ClaimCursor(NamedTuple):
    """A place in the order in which jobs are claimed."""

    negative_priority: int
    id: int


# A null is a null here as well, and what is infinite stays so.
CLAIMED = """
    id,
    job_type,
    data::text,
    attempt,
    retries,
    priority,
    crashes,
    date_part('epoch', created_at),
    date_part('epoch', now() - greatest(run_at, created_at)),
    options::text,
    date_part('epoch', expires_at) - date_part('epoch', now()),
    exclusive_key
"""
_START_BY = ClaimedJob._fields.index("start_by")

# An array in place of a join: the planner always reads it through the primary key, however wrong its statistics are.
_CLAIM = f"""
UPDATE background_jobs
SET
    state = 'running',
    attempt = attempt + 1,
    claimed_by = %(runner)s,
    claimed_at = now()
WHERE id = ANY(ARRAY(
    SELECT id
    FROM background_jobs
    WHERE queue = %(queue)s
        AND state = 'available'
        AND {{which}}
        AND job_type = ANY(%(job_types)s)
        {{behind}}
    ORDER BY (-priority), id
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
RETURNING {CLAIMED}
"""

_CLAIM_TYPES = {"runner": "int", "queue": "text", "job_types": "text[]", "limit": "int"}

_INNOCENT = """crashes = 0
        AND exclusive_key IS NULL"""

# Those with an exclusive key are in line with the others of it, see exclusive.py.
_SUSPECT = """crashes > 0
        AND (
            SELECT rival.id
            FROM background_jobs AS rival
            WHERE rival.exclusive_key = background_jobs.exclusive_key
                AND rival.exclusive_key IS NOT NULL
                AND rival.claimed_by IS NOT NULL
        ) IS NULL"""

_CLAIM_FROM_TOP = Statement("claim_from_top", _CLAIM.format(which=_INNOCENT, behind=""), **_CLAIM_TYPES)
_CLAIM_SUSPECT = Statement("claim_suspect", _CLAIM.format(which=_SUSPECT, behind=""), **_CLAIM_TYPES)

# The entries before the cursor are mostly dead: jobs that are done, which no vacuum has removed yet, perhaps cannot
# while some transaction goes on. A row comparison lets the scan begin behind them.
_CLAIM_BEHIND = Statement(
    "claim_behind",
    _CLAIM.format(which=_INNOCENT, behind="AND ((-priority), id) > (%(negative_priority)s, %(id)s)"),
    **_CLAIM_TYPES,
    negative_priority="smallint",
    id="bigint",
)


def claim(
    connection: Connection,
    *,
    runner: int,
    queue: str,
    job_types: Sequence[str],
    limit: int,
    suspects: bool = False,
    after: ClaimCursor | None = None,
) -> list[ClaimedJob]:
    """Take up to `limit` available jobs of these types, highest priority first, then oldest.

    With `suspects`, only jobs whose runner died are taken; without, only others that have no exclusive key. `after`
    begins behind that place.
    """
    parameters: dict[str, Any] = {"runner": runner, "queue": queue, "job_types": job_types, "limit": limit}
    if after is None:
        statement = _CLAIM_SUSPECT if suspects else _CLAIM_FROM_TOP
    else:
        statement = _CLAIM_BEHIND
        parameters.update(after._asdict())
    return take(connection, statement, parameters)


def take(connection: Connection, statement: Statement, parameters: Mapping[str, Any]) -> list[ClaimedJob]:
    """Run a claim, and again where another took a job with the same exclusive key; returns the rows in their order."""
    for _ in range(CONTEST_ROUNDS):
        with connection.cursor() as cursor:
            asked_at = time.monotonic()
            try:
                statement.run(cursor, parameters)
            except (errors.UniqueViolation, errors.DeadlockDetected):
                # Another who began before this one had ended. The next look sees that the key is taken.
                continue
            claimed = [
                ClaimedJob._make(row if row[_START_BY] is None else _by_our_clock(row, asked_at))
                for row in cursor.fetchall()
            ]
        claimed.sort(key=claim_order)
        return claimed
    return []  # contested without end; there will be another look


def _by_our_clock(row: tuple[Any, ...], asked_at: float) -> tuple[Any, ...]:
    """The row with `start_by` counted from before it was asked for: rather too early than too late."""
    return (*row[:_START_BY], asked_at + row[_START_BY], *row[_START_BY + 1 :])


def claim_order(job: ClaimedJob) -> ClaimCursor:
    """The key of the order in which jobs are claimed."""
    return ClaimCursor(-job.priority, job.id)
