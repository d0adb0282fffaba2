"""Windows: unique keys that are taken for a time, whether or not the job that opened them is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


# Goes with the statements by which people delete jobs, in their query `removed`, before these were done: what was not
# done may be asked for anew.
# An array in place of a join, so that the index is used, however wrong the planner's statistics are.
END_WINDOWS_OF_REMOVED = """
closed AS (
    DELETE FROM background_unique_windows
    WHERE job_id = ANY(ARRAY(
        SELECT id
        FROM {removed}
    ))
)
"""

# What somebody is taking over just now is left to them.
_PRUNE_WINDOWS = """
DELETE FROM background_unique_windows
WHERE unique_key = ANY(ARRAY(
    SELECT unique_key
    FROM background_unique_windows
    WHERE ends_at <= now()
    ORDER BY ends_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
"""


def prune_windows(connection: Connection, *, limit: int) -> int:
    """Delete up to `limit` windows that are over, the oldest first; returns how many."""
    with connection.cursor() as cursor:
        cursor.execute(_PRUNE_WINDOWS, {"limit": limit})
        return cursor.rowcount
