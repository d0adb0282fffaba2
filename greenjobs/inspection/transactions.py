"""What is so in a transaction, perhaps of the caller's."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from psycopg2.extensions import cursor as TupleCursor  # whatever kind a caller's connection makes by itself

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


_UNFINISHED = """
SELECT EXISTS (
    SELECT
    FROM background_jobs
    WHERE id = %(id)s
        AND state IN ('scheduled', 'available', 'running')
)
"""


def is_unfinished(connection: Connection, id: int) -> bool:
    """Whether a job waits, for another attempt perhaps, or runs."""
    with connection.cursor() as cursor:
        cursor.execute(_UNFINISHED, {"id": id})
        row = cursor.fetchone()
        return row is not None and bool(row[0])


def now(connection: Connection) -> datetime:
    """What time it is, by the clock that decides it; also on a connection of the caller's, in its transaction."""
    with connection.cursor(cursor_factory=TupleCursor) as cursor:
        cursor.execute("SELECT clock_timestamp()")
        (instant,) = cursor.fetchone() or (None,)
        assert isinstance(instant, datetime)
        return instant


_HAS_WRITTEN = """
SELECT pg_current_xact_id_if_assigned() IS NOT NULL
"""


def has_written(connection: Connection) -> bool:
    """Whether the open transaction of this connection has changed anything so far."""
    with connection.cursor(cursor_factory=TupleCursor) as cursor:
        cursor.execute(_HAS_WRITTEN)
        (has_written,) = cursor.fetchone() or (False,)
        return bool(has_written)
