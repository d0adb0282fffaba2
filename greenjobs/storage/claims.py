"""Runners take jobs, in the order of priority and age."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from greenjobs.statement import Statement

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class ClaimedJob(NamedTuple):
    """A row as the claim returns it.

    `data` and `options` are JSON texts, `created_at` is in seconds since 1970, `waited` in seconds.
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


class ClaimCursor(NamedTuple):
    """A place in the order in which jobs are claimed."""

    negative_priority: int
    id: int


# An array in place of a join: the planner always reads it through the primary key, however wrong its statistics are.
_CLAIM = """
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
        AND {which}
        AND job_type = ANY(%(job_types)s)
        {behind}
    ORDER BY (-priority), id
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
RETURNING
    id,
    job_type,
    data::text,
    attempt,
    retries,
    priority,
    crashes,
    date_part('epoch', created_at),
    date_part('epoch', now() - greatest(run_at, created_at)),
    options::text
"""

_CLAIM_TYPES = {"runner": "int", "queue": "text", "job_types": "text[]", "limit": "int"}

_CLAIM_FROM_TOP = Statement("claim_from_top", _CLAIM.format(which="crashes = 0", behind=""), **_CLAIM_TYPES)
_CLAIM_SUSPECT = Statement("claim_suspect", _CLAIM.format(which="crashes > 0", behind=""), **_CLAIM_TYPES)

# The entries before the cursor are mostly dead: jobs that are done, which no vacuum has removed yet, perhaps cannot
# while some transaction goes on. A row comparison lets the scan begin behind them.
_CLAIM_BEHIND = Statement(
    "claim_behind",
    _CLAIM.format(which="crashes = 0", behind="AND ((-priority), id) > (%(negative_priority)s, %(id)s)"),
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

    With `suspects`, only jobs whose runner died are taken; without, only others. `after` begins behind that place.
    """
    parameters: dict[str, Any] = {"runner": runner, "queue": queue, "job_types": job_types, "limit": limit}
    if after is None:
        statement = _CLAIM_SUSPECT if suspects else _CLAIM_FROM_TOP
    else:
        statement = _CLAIM_BEHIND
        parameters.update(after._asdict())
    with connection.cursor() as cursor:
        statement.run(cursor, parameters)
        claimed = [ClaimedJob._make(row) for row in cursor.fetchall()]
    claimed.sort(key=claim_order)
    return claimed


def claim_order(job: ClaimedJob) -> ClaimCursor:
    """The key of the order in which jobs are claimed."""
    return ClaimCursor(-job.priority, job.id)
