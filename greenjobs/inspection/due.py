"""What waits, and what is due when, for the loops of a runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from greenjobs.statement import Statement

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class Work(NamedTuple):
    """What waits in a queue: jobs to claim together, jobs to claim one at a time because their runner died, and jobs
    of which some exclude others."""

    has_innocents: bool
    has_suspects: bool
    has_exclusive: bool


_LOOK = Statement(
    "look",
    """
SELECT
    queue,
    EXISTS (
        SELECT
        FROM background_jobs AS job
        WHERE job.queue = asked.queue
            AND job.state = 'available'
            AND job.crashes = 0
            AND job.exclusive_key IS NULL
            AND job.job_type = ANY(%(job_types)s)
    ),
    EXISTS (
        SELECT
        FROM background_jobs AS job
        WHERE job.queue = asked.queue
            AND job.state = 'available'
            AND job.crashes > 0
            AND job.job_type = ANY(%(job_types)s)
    ),
    EXISTS (
        SELECT
        FROM background_jobs AS job
        WHERE job.queue = asked.queue
            AND job.state = 'available'
            AND job.crashes = 0
            AND job.exclusive_key IS NOT NULL
            AND job.job_type = ANY(%(job_types)s)
    )
FROM unnest(%(queues)s::text[]) AS asked (queue)
""",
    queues="text[]",
    job_types="text[]",
)


def look(connection: Connection, *, queues: Sequence[str], job_types: Sequence[str]) -> dict[str, Work]:
    """Which of these queues have available jobs of these types."""
    with connection.cursor() as cursor:
        _LOOK.run(cursor, {"queues": list(queues), "job_types": list(job_types)})
        return {queue: Work(*what) for queue, *what in cursor.fetchall()}


_NEXT_DUE = Statement(
    "next_due",
    """
SELECT extract(epoch FROM min(run_at) - clock_timestamp())::float8
FROM background_jobs
WHERE state = 'scheduled'
""",
)


def seconds_until_due(connection: Connection) -> float | None:
    """Seconds until the next scheduled job is due, negative when it is overdue; None when there is none."""
    with connection.cursor() as cursor:
        _NEXT_DUE.run(cursor)
        row = cursor.fetchone()
        return None if row is None else row[0]
