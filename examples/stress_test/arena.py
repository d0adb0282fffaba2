"""A schema of the stress test's own, in whichever database: made at the start, dropped at the end.

What else lives in the database is never touched, and no other program sees these jobs: names of tables are unqualified
everywhere in greenjobs, so that `search_path` decides where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from psycopg2 import extensions

from greenjobs import config, embedded, pool
from greenjobs.errors import GreenjobsError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

SCHEMA = "greenjobs_stress"

# By this comment a schema is known as ours, left behind by a stress test that was killed.
_COMMENT = "made by the stress test of greenjobs, and dropped by the next one"

_CONNECT_SECONDS = 10.0


class ArenaTaken(GreenjobsError):
    """The schema is in use by another stress test, or was made by somebody else."""


@contextmanager
def arena(database_url: str) -> Iterator[str]:
    """Yields a database URL that leads into an empty schema, which is there until the end of the block.

    Raises ArenaTaken, or what connecting raises.
    """
    if embedded.is_embedded_url(database_url):
        database_url = embedded.start(database_url, project_folder=config.project_folder())
    connection = pool.connect(database_url, application_name="greenjobs stress test", timeout_seconds=_CONNECT_SECONDS)
    try:
        _make_schema(connection)
        try:
            yield _into_schema(database_url)
        finally:
            _drop_schema(connection)
    finally:
        connection.close()


def _into_schema(database_url: str) -> str:
    given = extensions.parse_dsn(database_url)
    options = f"{given.pop('options', '')} -c search_path={SCHEMA}".strip()
    return str(extensions.make_dsn(**given, options=options))


_LOCK = "SELECT pg_try_advisory_lock(hashtext(%(schema)s))"

_FIND_SCHEMA = """
SELECT obj_description(oid, 'pg_namespace')
FROM pg_namespace
WHERE nspname = %(schema)s
"""

_DROP_SCHEMA = f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE"

_MAKE_SCHEMA = f"""
CREATE SCHEMA {SCHEMA};
COMMENT ON SCHEMA {SCHEMA} IS '{_COMMENT}';
"""


def _make_schema(connection: Connection) -> None:
    """Make the schema anew. The lock, which ends with the connection, tells a schema in use from one left behind."""
    with connection.cursor() as cursor:
        cursor.execute(_LOCK, {"schema": SCHEMA})
        if cursor.fetchone() != (True,):
            raise ArenaTaken("another stress test is running in this database: wait for it, or name another database")
        cursor.execute(_FIND_SCHEMA, {"schema": SCHEMA})
        found = cursor.fetchone()
        if found is not None and found != (_COMMENT,):
            raise ArenaTaken(
                f"the database has a schema {SCHEMA} that the stress test did not make: rename it, or name another "
                f"database"
            )
        cursor.execute(_DROP_SCHEMA)
        cursor.execute(_MAKE_SCHEMA)


def _drop_schema(connection: Connection) -> None:
    with connection.cursor() as cursor:
        cursor.execute(_DROP_SCHEMA)
