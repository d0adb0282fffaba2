"""Which runners live, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from greenjobs.statement import Statement

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


# A runner is alive exactly while its session holds the lock, or while its lease lasts, where it has one instead.
LIVES = """
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
DEAD = f"""
SELECT id
FROM background_runners
WHERE NOT {LIVES}
    AND (
        started_at > pg_postmaster_start_time()
        OR pg_postmaster_start_time() < now() - interval '5 seconds'
    )
"""


_DEAD_RUNNERS = Statement("dead_runners", DEAD)


def dead_runners(connection: Connection) -> list[int]:
    """The ids in the register of those that live no more; those that ended in good order, some time ago, among them."""
    with connection.cursor() as cursor:
        _DEAD_RUNNERS.run(cursor)
        return [row[0] for row in cursor.fetchall()]


_HELD = """
SELECT id, attempt
FROM background_jobs
WHERE state = 'running'
    AND claimed_by = ANY(%(runners)s)
    AND claimed_at < now() - make_interval(secs => %(age)s)
"""


def held_jobs(connection: Connection, runners: Sequence[int], *, age_seconds: float) -> list[tuple[int, int]]:
    """Id and attempt of the jobs that these runners have held for that long, according to the database."""
    with connection.cursor() as cursor:
        cursor.execute(_HELD, {"runners": list(runners), "age": age_seconds})
        return [(id, attempt) for id, attempt in cursor.fetchall()]


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


_RUNNERS = f"""
SELECT id, hostname, pid, version, queues, job_types, started_at
FROM background_runners
WHERE {LIVES}
    AND ended_at IS NULL
ORDER BY id
"""


def live_runners(connection: Connection) -> list[RunnerStatus]:
    """The runners that live, oldest first."""
    with connection.cursor() as cursor:
        cursor.execute(_RUNNERS)
        return [RunnerStatus(*row) for row in cursor.fetchall()]
