"""What a probe asks of the database: one round trip, which shows that it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from psycopg2 import errors

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class DatabaseState(NamedTuple):
    """Whether the server takes writes, which migrations have been applied, by number, and which of them a release
    must know to work with them."""

    is_standby: bool
    versions: frozenset[int]
    needs: int


_STATE = """
SELECT pg_is_in_recovery(), coalesce(array_agg(version), '{}'), coalesce(max(needs), 1)
FROM background_migrations
"""


def database_state(connection: Connection) -> DatabaseState:
    """How the database is; one without our tables has no migrations."""
    with connection.cursor() as cursor:
        try:
            cursor.execute(_STATE)
        except errors.UndefinedTable:
            return DatabaseState(False, frozenset(), 1)
        is_standby, versions, needs = cursor.fetchone() or (False, [], 1)
        return DatabaseState(is_standby, frozenset(versions), needs)
