"""What a probe asks of the database: one round trip, which shows that it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from psycopg2 import errors

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class DatabaseState(NamedTuple):
    """Whether the server takes writes, and which migrations have been applied, by number."""

    is_standby: bool
    versions: frozenset[int]


_STATE = """
SELECT pg_is_in_recovery(), coalesce(array_agg(version), '{}')
FROM background_migrations
"""


def database_state(connection: Connection) -> DatabaseState:
    """How the database is; one without our tables has no migrations."""
    with connection.cursor() as cursor:
        try:
            cursor.execute(_STATE)
        except errors.UndefinedTable:
            return DatabaseState(False, frozenset())
        is_standby, versions = cursor.fetchone() or (False, [])
        return DatabaseState(is_standby, frozenset(versions))
