"""What is said of queues at run time. Every change notifies all runners, which read what is so then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


# In the order of names, so that two who say something of the same queues do not deadlock.
_PAUSE = """
WITH changed AS (
    INSERT INTO background_queues AS known (name, paused)
    SELECT name, true
    FROM unnest(%(names)s::text[]) AS name
    ORDER BY name
    ON CONFLICT (name) DO UPDATE
    SET
        paused = true,
        changed_at = now()
    WHERE NOT known.paused
    RETURNING name
)
SELECT name, pg_notify('greenjobs', 'queues')
FROM changed
"""


def pause_queues(connection: Connection, names: Sequence[str]) -> set[str]:
    """Let nothing of these queues start; returns the names of those that were not paused before."""
    return _change(connection, _PAUSE, names)


# A row that says nothing any more goes away. The rows that the two parts change are never the same.
_RESUME = """
WITH chosen AS (
    SELECT name
    FROM background_queues
    WHERE name = ANY(%(names)s::text[])
        AND paused
    ORDER BY name
    FOR UPDATE
), forgotten AS (
    DELETE FROM background_queues
    USING chosen
    WHERE background_queues.name = chosen.name
        AND pool IS NULL
    RETURNING background_queues.name
), resumed AS (
    UPDATE background_queues
    SET
        paused = false,
        changed_at = now()
    FROM chosen
    WHERE background_queues.name = chosen.name
        AND pool IS NOT NULL
    RETURNING background_queues.name
)
SELECT name, pg_notify('greenjobs', 'queues')
FROM (
    SELECT name FROM forgotten
    UNION ALL
    SELECT name FROM resumed
) AS changed
"""


def resume_queues(connection: Connection, names: Sequence[str]) -> set[str]:
    """Let jobs of these queues start again; returns the names of those that were paused."""
    return _change(connection, _RESUME, names)


_RESIZE = """
WITH changed AS (
    INSERT INTO background_queues AS known (name, pool)
    SELECT name, %(pool)s
    FROM unnest(%(names)s::text[]) AS name
    ORDER BY name
    ON CONFLICT (name) DO UPDATE
    SET
        pool = excluded.pool,
        changed_at = now()
    WHERE known.pool IS DISTINCT FROM excluded.pool
    RETURNING name
)
SELECT name, pg_notify('greenjobs', 'queues')
FROM changed
"""


def resize_queues(connection: Connection, names: Sequence[str], *, pool: int) -> set[str]:
    """Let so many jobs of each of these queues run at a time in every runner; returns the names of those changed."""
    return _change(connection, _RESIZE, names, pool)


_RESTORE_SIZE = """
WITH chosen AS (
    SELECT name
    FROM background_queues
    WHERE name = ANY(%(names)s::text[])
        AND pool IS NOT NULL
    ORDER BY name
    FOR UPDATE
), forgotten AS (
    DELETE FROM background_queues
    USING chosen
    WHERE background_queues.name = chosen.name
        AND NOT paused
    RETURNING background_queues.name
), restored AS (
    UPDATE background_queues
    SET
        pool = NULL,
        changed_at = now()
    FROM chosen
    WHERE background_queues.name = chosen.name
        AND paused
    RETURNING background_queues.name
)
SELECT name, pg_notify('greenjobs', 'queues')
FROM (
    SELECT name FROM forgotten
    UNION ALL
    SELECT name FROM restored
) AS changed
"""


def restore_queue_sizes(connection: Connection, names: Sequence[str]) -> set[str]:
    """Let these queues have the pools that runners were started with; returns the names of those changed."""
    return _change(connection, _RESTORE_SIZE, names)


def _change(connection: Connection, statement: str, names: Sequence[str], pool: int | None = None) -> set[str]:
    with connection.cursor() as cursor:
        cursor.execute(statement, {"names": list(names), "pool": pool})
        return {row[0] for row in cursor.fetchall()}
