"""Every statement that only reads: what waits, what runs, who lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from greenjobs.statement import Statement

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class Work(NamedTuple):
    """What waits in a queue: jobs to claim together, and jobs to claim one at a time because their runner died."""

    has_innocents: bool
    has_suspects: bool


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
            AND job.job_type = ANY(%(job_types)s)
    ),
    EXISTS (
        SELECT
        FROM background_jobs AS job
        WHERE job.queue = asked.queue
            AND job.state = 'available'
            AND job.crashes > 0
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
        return {queue: Work(innocents, suspects) for queue, innocents, suspects in cursor.fetchall()}


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


# A runner is alive exactly while its session holds the lock, or while its lease lasts, where it has one instead.
_LIVES = """
CASE
    WHEN leased_until IS NOT NULL THEN leased_until > now()
    ELSE EXISTS (
        SELECT
        FROM pg_locks
        WHERE locktype = 'advisory'
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND classid = 'background_runners'::regclass
            AND objid = background_runners.id
            AND objsubid = 2
            AND granted
    )
END
"""

# When the server was restarted all sessions ended at once. Their runners live, most likely, and get a few seconds to
# come back before anybody takes their jobs over.
_DEAD_RUNNERS = Statement(
    "dead_runners",
    f"""
SELECT id
FROM background_runners
WHERE NOT {_LIVES}
    AND (
        started_at > pg_postmaster_start_time()
        OR pg_postmaster_start_time() < now() - interval '5 seconds'
    )
""",
)


def dead_runners(connection: Connection) -> list[int]:
    """The ids in the register of those that live no more; those that ended in good order, some time ago, among them."""
    with connection.cursor() as cursor:
        _DEAD_RUNNERS.run(cursor)
        return [row[0] for row in cursor.fetchall()]


_HELD = """
SELECT id, attempt
FROM background_jobs
WHERE state = 'running'
    AND claimed_by = %(runner)s
    AND claimed_at < now() - make_interval(secs => %(age)s)
"""


def held_jobs(connection: Connection, runner: int, *, age_seconds: float) -> list[tuple[int, int]]:
    """Id and attempt of the jobs that this runner has held for that long, according to the database."""
    with connection.cursor() as cursor:
        cursor.execute(_HELD, {"runner": runner, "age": age_seconds})
        return [(id, attempt) for id, attempt in cursor.fetchall()]


_FAILED_COUNT = """
SELECT count(*)
FROM background_jobs
WHERE retries > 0
    OR state = 'failed'
"""


def failed_count(connection: Connection) -> int:
    """How many jobs failed at least once and are still there, waiting for another attempt or for somebody."""
    with connection.cursor() as cursor:
        cursor.execute(_FAILED_COUNT)
        row = cursor.fetchone()
        return 0 if row is None else int(row[0])


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Counts of one queue by state, and the age in seconds of the job that has waited longest since it was due."""

    queue: str | None
    available: int
    running: int
    scheduled: int
    failed: int
    oldest_waiting_seconds: float | None


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """A live runner as it registered."""

    id: int
    hostname: str
    pid: int
    version: str
    queues: Mapping[str, Any]
    job_types: Sequence[str]
    started_at: datetime


_QUEUES = """
SELECT
    queue,
    count(*) FILTER (WHERE state = 'available'),
    count(*) FILTER (WHERE state = 'running'),
    count(*) FILTER (WHERE state = 'scheduled'),
    count(*) FILTER (WHERE state = 'failed'),
    extract(epoch FROM now() - min(greatest(run_at, created_at)) FILTER (WHERE state = 'available'))::float8
FROM background_jobs
GROUP BY queue
ORDER BY queue
"""


def queue_statuses(connection: Connection) -> list[QueueStatus]:
    """The queues that have rows, by name. Counts every row: for people, not for loops."""
    with connection.cursor() as cursor:
        cursor.execute(_QUEUES)
        return [QueueStatus(*row) for row in cursor.fetchall()]


_RUNNERS = f"""
SELECT id, hostname, pid, version, queues, job_types, started_at
FROM background_runners
WHERE {_LIVES}
    AND ended_at IS NULL
ORDER BY id
"""


def live_runners(connection: Connection) -> list[RunnerStatus]:
    """The runners that live, oldest first."""
    with connection.cursor() as cursor:
        cursor.execute(_RUNNERS)
        return [RunnerStatus(*row) for row in cursor.fetchall()]
