"""Jobs that are not wanted any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from greenjobs.storage.history import removal

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


_REMOVE_WAITING = removal(
    "cancelled",
    """
    WHERE job.id = ANY(%(ids)s)
        AND job.state IN ('scheduled', 'available')
    """,
)

_ASK_CANCEL = """
WITH asked AS (
    UPDATE background_jobs
    SET cancel_asked_at = now()
    WHERE id = ANY(%(ids)s)
        AND state = 'running'
    RETURNING id
)
SELECT id, pg_notify('greenjobs', 'cancel:' || id)
FROM asked
"""

# Between the two looks of one round a job may start, or go back to waiting; it is met in the next round, then.
_CANCEL_ROUNDS = 3


def cancel(connection: Connection, ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Remove those of these jobs that wait, and ask for the end of those that run; returns both, by id.

    Jobs that are done, failed or unknown are in neither.
    """
    removed: set[int] = set()
    asked: set[int] = set()
    for _ in range(_CANCEL_ROUNDS):
        pending = [id for id in ids if id not in removed and id not in asked]
        if not pending:
            break
        with connection.cursor() as cursor:
            cursor.execute(_REMOVE_WAITING, {"ids": pending})
            removed.update(row[0] for row in cursor.fetchall())
            cursor.execute(_ASK_CANCEL, {"ids": pending})
            asked.update(row[0] for row in cursor.fetchall())
    return sorted(removed), sorted(asked)


# A job whose end was asked for may have come back from a dead runner, or from one that stopped, instead of ending.
_REMOVE_CANCELLED = removal(
    "cancelled",
    """
    WHERE job.cancel_asked_at IS NOT NULL
        AND job.state IN ('scheduled', 'available')
    """,
)


def remove_cancelled(connection: Connection) -> int:
    """Remove jobs that were cancelled while they ran and wait again since; returns how many."""
    with connection.cursor() as cursor:
        cursor.execute(_REMOVE_CANCELLED)
        return cursor.rowcount
