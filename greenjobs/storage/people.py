"""Jobs that people, or time, change: retried, discarded, pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from greenjobs.storage.fence import Fence, int_array
from greenjobs.storage.history import removal
from greenjobs.storage.windows import END_WINDOWS_OF_REMOVED

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


# Locked in one order, so that two who change the same jobs wait for each other, and never in a circle. Whoever had to
# wait looks at the row anew: one that is claimed, retried or failed again by then is no longer the one that was chosen.
_CHOSEN = """
WITH chosen AS (
    SELECT job.id
    FROM unnest(%(ids)s::bigint[], %(attempts)s::int[]) AS fence (id, attempt)
    JOIN background_jobs AS job ON job.id = fence.id
    WHERE job.attempt = fence.attempt
        AND job.state = ANY(%(states)s)
    ORDER BY job.id
    FOR UPDATE OF job
)
"""

# Whose runner died stays a suspect, which is claimed alone; but one death is not the last yet.
_RETRY = f"""
{_CHOSEN}
UPDATE background_jobs AS job
SET
    state = 'available',
    run_at = now(),
    cancel_asked_at = NULL,
    expires_at = CASE WHEN job.state <> 'failed' THEN job.expires_at END,
    retries = CASE job.state WHEN 'failed' THEN 0 ELSE job.retries END,
    crashes = CASE job.state WHEN 'failed' THEN least(job.crashes, 1) ELSE job.crashes END
FROM chosen
WHERE job.id = chosen.id
RETURNING job.id, job.queue
"""


def retry(connection: Connection, chosen: Sequence[Fence], *, states: Sequence[str]) -> dict[int, str | None]:
    """Make jobs in these states available, with all their retries before them; returns their queues by id.

    Those that have moved on since they were chosen are left alone. Raises UniqueViolation, and has changed nothing,
    when another job has the unique key of one of them.
    """
    with connection.cursor() as cursor:
        cursor.execute(_RETRY, {**_chosen(chosen), "states": list(states)})
        return dict(cursor.fetchall())


_REMOVE = {
    outcome: removal(
        outcome,
        """
    USING chosen
    WHERE job.id = chosen.id
    """,
        after=f"{_CHOSEN},",
    )
    for outcome in ("discarded", "cancelled")
}


_DELETE = f"""
{_CHOSEN}
DELETE FROM background_jobs AS job
USING chosen
WHERE job.id = chosen.id
RETURNING job.id
"""


def discard(
    connection: Connection,
    chosen: Sequence[Fence],
    *,
    states: Sequence[str],
    outcome: Literal["discarded", "cancelled"] | None = "discarded",
) -> set[int]:
    """End jobs in these states, of which running must not be one; returns the ids of those that were.

    Those that are to be kept go to the history with this outcome; with None not even they do. Those that have moved on
    since they were chosen are left alone.
    """
    with connection.cursor() as cursor:
        statement = _DELETE if outcome is None else _REMOVE[outcome]
        cursor.execute(statement, {**_chosen(chosen), "states": list(states)})
        return {row[0] for row in cursor.fetchall()}


def _chosen(chosen: Sequence[Fence]) -> dict[str, Any]:
    return {
        "ids": int_array(fence.id for fence in chosen),
        "attempts": int_array(fence.attempt for fence in chosen),
    }


# A row that was inserted as failed, or made so by hand, may say that it was last tried in 1970.
_PRUNE = f"""
WITH removed AS (
    DELETE FROM background_jobs
    WHERE id = ANY(ARRAY(
        SELECT id
        FROM background_jobs
        WHERE state = 'failed'
            AND last_retry < now() - make_interval(secs => %(age)s)
            AND created_at < now() - make_interval(secs => %(age)s)
        ORDER BY last_retry
        LIMIT %(limit)s
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING id
),
{END_WINDOWS_OF_REMOVED.format(removed="removed")}
SELECT id
FROM removed
"""


def prune(connection: Connection, *, age_seconds: float, limit: int) -> int:
    """Delete up to `limit` jobs that failed that long ago, the oldest first; returns how many."""
    with connection.cursor() as cursor:
        cursor.execute(_PRUNE, {"age": age_seconds, "limit": limit})
        return cursor.rowcount
