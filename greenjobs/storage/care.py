"""What runners do for all jobs: promote, route, rescue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from psycopg2 import errors

from greenjobs.statement import Statement
from greenjobs.storage.contest import CONTEST_ROUNDS, DROP_CONTESTED_KEYS
from greenjobs.storage.history import tell_watchers

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class Rescued(NamedTuple):
    """One job that was taken from a dead runner: whether it waits again, or failed because too many of them died."""

    id: int
    job_type: str
    queue: str
    crashes: int
    has_failed: bool
    exclusive_key: str | None


_PROMOTE = Statement(
    "promote",
    """
WITH promoted AS (
    UPDATE background_jobs
    SET state = 'available'
    WHERE id = ANY(ARRAY(
        SELECT id
        FROM background_jobs
        WHERE state = 'scheduled'
            AND run_at <= now()
        ORDER BY run_at
        LIMIT %(limit)s
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING queue
)
SELECT queue, count(*)
FROM promoted
GROUP BY queue
""",
    limit="int",
)


def promote(connection: Connection, *, limit: int) -> dict[str | None, int]:
    """Make up to `limit` jobs available whose time has come; returns how many in which queue."""
    with connection.cursor() as cursor:
        _PROMOTE.run(cursor, {"limit": limit})
        return dict(cursor.fetchall())


_ROUTE = Statement(
    "route",
    """
WITH routed AS (
    UPDATE background_jobs AS job
    SET queue = home.queue
    FROM unnest(%(job_types)s::text[], %(queues)s::text[]) AS home (job_type, queue)
    WHERE job.queue IS NULL
        AND job.job_type = home.job_type
    RETURNING job.queue
)
SELECT DISTINCT queue
FROM routed
""",
    job_types="text[]",
    queues="text[]",
)


def route(connection: Connection, home_queues: Mapping[str, str]) -> list[str]:
    """Put jobs without a queue, as the crate or plain SQL inserts them, where their type is at home; returns where."""
    with connection.cursor() as cursor:
        _ROUTE.run(cursor, {"job_types": list(home_queues), "queues": list(home_queues.values())})
        return [row[0] for row in cursor.fetchall()]


# The runner is blamed for at the moment it is found dead. What turns up later under its name is a claim that was still
# on its way to the server then, and never started.
_RESCUE = f"""
WITH dead AS (
    SELECT id, hostname, pid, memory_bytes, ended_at IS NULL AS is_news
    FROM background_runners
    WHERE id = ANY(%(runners)s)
),
held AS (
    SELECT
        job.id,
        dead.hostname,
        dead.pid,
        dead.memory_bytes,
        (
            dead.is_news
            AND (
                job.crashes > 0
                OR NOT EXISTS (
                    SELECT
                    FROM background_jobs AS suspect
                    WHERE suspect.state = 'running'
                        AND suspect.claimed_by = dead.id
                        AND suspect.crashes > 0
                )
            )
        )::int AS blame
    FROM dead
    JOIN background_jobs AS job ON job.state = 'running' AND job.claimed_by = dead.id
),
ended AS (
    UPDATE background_runners
    SET ended_at = now()
    WHERE id IN (SELECT id FROM dead WHERE is_news)
),
silenced AS (
    DELETE FROM background_waiting
    WHERE runner = ANY(%(runners)s)
)
UPDATE background_jobs AS job
SET
    state = CASE WHEN job.crashes + held.blame >= %(most_crashes)s THEN 'failed' ELSE 'available' END,
    crashes = job.crashes + held.blame,
    last_retry = now(),
    claimed_by = NULL,
    claimed_at = NULL,
    expires_at = NULL,  -- it may have started
    errors = CASE
        WHEN job.crashes + held.blame < %(most_crashes)s THEN job.errors
        ELSE coalesce(job.errors, '[]') || jsonb_build_object(
            'at', now(),
            'attempt', job.attempt,
            'error', 'RunnerDied',
            'message', format('its runner died %%s times', job.crashes + held.blame),
            'runner', held.hostname || ':' || held.pid,
            'memory_bytes', held.memory_bytes
        )
    END
FROM held
WHERE job.id = held.id
    AND job.state = 'running'
    AND job.claimed_by = ANY(%(runners)s)
RETURNING
    job.id,
    job.job_type,
    job.queue,
    job.crashes,
    job.state = 'failed',
    job.exclusive_key,
    CASE WHEN job.state = 'failed' THEN {tell_watchers("job", "'failed'")} END
"""

_HELD_BY = """
SELECT id
FROM background_jobs
WHERE state = 'running'
    AND claimed_by = ANY(%(runners)s)
"""


def rescue(connection: Connection, dead_runners: Sequence[int], *, most_crashes: int) -> list[Rescued]:
    """Take the jobs of dead runners back; those whose runner died `most_crashes` times are failed.

    Ids of runners are never used again, so whoever was dead is dead still. Any number of rescuers may work at once.
    """
    parameters = {"runners": list(dead_runners), "most_crashes": most_crashes}
    for _ in range(CONTEST_ROUNDS):
        with connection.cursor() as cursor:
            try:
                cursor.execute(_RESCUE, parameters)
                return [Rescued._make(row[:-1]) for row in cursor.fetchall()]
            except errors.UniqueViolation:
                cursor.execute(_HELD_BY, parameters)
                cursor.execute(DROP_CONTESTED_KEYS, {"ids": [row[0] for row in cursor.fetchall()]})
    return []  # contested without end; the next look, seconds from now, tries again
