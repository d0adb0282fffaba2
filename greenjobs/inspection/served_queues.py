"""Queues, for people: what is in them, and who serves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from greenjobs.inspection.liveness import LIVES

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Counts of one queue by state, and the age in seconds of the job that has waited longest since it was due."""

    queue: str | None
    available: int
    running: int
    scheduled: int
    failed: int
    oldest_waiting_seconds: float | None


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


@dataclass(frozen=True, slots=True)
class QueueServer:
    """A live runner that serves a queue, and how many jobs of it at a time, as it was started.

    `share` is the number of slots that the queue shares with others there, None where its pool is its own.
    """

    runner: int
    hostname: str
    pid: int
    pool: int
    share: int | None


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue as it was when somebody looked: one that has rows, is served by a live runner, or was paused or resized.

    `waiting` counts jobs that could run now, `scheduled` those for later, retries included. `pool` is the one that was
    set at run time, None where every server has its own. `changed_at` is when somebody last paused or resized it.
    """

    name: str
    waiting: int
    running: int
    scheduled: int
    failed: int
    paused: bool
    pool: int | None
    changed_at: datetime | None
    servers: Sequence[QueueServer]


_QUEUES_AT_RUN_TIME = f"""
WITH counted AS (
    SELECT
        queue AS name,
        count(*) FILTER (WHERE state = 'available') AS waiting,
        count(*) FILTER (WHERE state = 'running') AS running,
        count(*) FILTER (WHERE state = 'scheduled') AS scheduled,
        count(*) FILTER (WHERE state = 'failed') AS failed
    FROM background_jobs
    WHERE queue IS NOT NULL
        AND (%(names)s::text[] IS NULL OR queue = ANY(%(names)s::text[]))
    GROUP BY queue
), served AS (
    SELECT
        queue.key AS name,
        jsonb_agg(
            jsonb_build_array(id, hostname, pid, queue.value -> 'pool', queue.value -> 'share') ORDER BY id
        ) AS servers
    FROM background_runners
    CROSS JOIN jsonb_each(queues) AS queue
    WHERE {LIVES}
        AND ended_at IS NULL
        AND (%(names)s::text[] IS NULL OR queue.key = ANY(%(names)s::text[]))
    GROUP BY queue.key
), said AS (
    SELECT name, paused, pool, changed_at
    FROM background_queues
    WHERE %(names)s::text[] IS NULL
        OR name = ANY(%(names)s::text[])
)
SELECT
    name,
    coalesce(waiting, 0),
    coalesce(running, 0),
    coalesce(scheduled, 0),
    coalesce(failed, 0),
    coalesce(paused, false),
    pool,
    changed_at,
    coalesce(servers, '[]')
FROM counted
FULL JOIN served USING (name)
FULL JOIN said USING (name)
ORDER BY name
"""


def queues(connection: Connection, names: Sequence[str] | None = None) -> list[Queue]:
    """All queues by name, or those of these names. Counts every row: for people, not for loops."""
    with connection.cursor() as cursor:
        cursor.execute(_QUEUES_AT_RUN_TIME, {"names": None if names is None else list(names)})
        rows = [(*row[:-1], [QueueServer(*server) for server in row[-1]]) for row in cursor.fetchall()]
        return [Queue(*row) for row in rows]


_KNOWN_QUEUES = f"""
SELECT asked.name
FROM unnest(%(names)s::text[]) AS asked (name)
WHERE EXISTS (SELECT FROM background_jobs WHERE queue = asked.name)
    OR EXISTS (SELECT FROM background_queues WHERE background_queues.name = asked.name)
    OR EXISTS (SELECT FROM background_runners WHERE queues ? asked.name AND ended_at IS NULL AND {LIVES})
"""


def known_queues(connection: Connection, names: Sequence[str]) -> set[str]:
    """Those of the names that `queues` would find."""
    with connection.cursor() as cursor:
        cursor.execute(_KNOWN_QUEUES, {"names": list(names)})
        return {row[0] for row in cursor.fetchall()}
