"""The server that is measured on, and a database on it for each side of a case.

The embedded server is started as an application would have it: fsync and synchronous_commit are on. A server that was
named may have them off; then nothing is compared with the targets.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import errors, extensions

from greenjobs import embedded
from greenjobs.migrate import migrate

_DURABLE = {"fsync": "on", "synchronous_commit": "on"}

_SHOWN_SETTINGS = (*_DURABLE, "full_page_writes", "shared_buffers", "max_wal_size", "autovacuum")

_SETTINGS = """
SELECT name, current_setting(name)
FROM pg_settings
WHERE name = ANY(%(names)s)
"""

_CONNECTIONS = """
SELECT count(*)
FROM pg_stat_activity
WHERE datname = %(name)s
"""

_TRANSACTIONS = """
SELECT xact_commit + xact_rollback
FROM pg_stat_database
WHERE datname = %(name)s
"""

# So that every statement of a transaction sees what the first one saw, and vacuum keeps all that for it.
_HOLD_SNAPSHOT = """
SELECT pg_current_xact_id(), count(*)
FROM {table}
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A PostgreSQL server, by the URL of a database on it whose account may create others."""

    url: str

    def version(self) -> str:
        """As the server says it, such as 18.6."""
        return str(self._value("SHOW server_version")).split()[0]

    def settings(self) -> Mapping[str, str]:
        """The settings that the figures depend on."""
        with connected(self.url) as cursor:
            cursor.execute(_SETTINGS, {"names": list(_SHOWN_SETTINGS)})
            return dict(cursor.fetchall())

    def is_durable(self) -> bool:
        """Whether a committed job survives a crash of the machine."""
        settings = self.settings()
        return all(settings[name] == value for name, value in _DURABLE.items())

    @contextlib.contextmanager
    def database(self, *, migrated: bool = True) -> Iterator[Database]:
        """A new database, dropped at the end."""
        name = f"greenjobs_bench_{uuid.uuid4().hex[:12]}"
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
        try:
            database = Database(self, name, str(extensions.make_dsn(self.url, dbname=name)))
            if migrated:
                migrate(database.url)
            yield database
        finally:
            self.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def execute(self, statement: str) -> None:
        """Run a statement on the database that the URL names."""
        with connected(self.url) as cursor:
            cursor.execute(statement)

    def connections_to(self, name: str) -> int:
        """How many sessions the database has."""
        return int(self._value(_CONNECTIONS, {"name": name}))

    def transactions_in(self, name: str) -> int:
        """How many transactions the database has seen. Sessions report theirs up to a second late."""
        return int(self._value(_TRANSACTIONS, {"name": name}))

    def _value(self, statement: str, parameters: Mapping[str, Any] | None = None) -> Any:
        with connected(self.url) as cursor:
            cursor.execute(statement, parameters)
            row = cursor.fetchone()
            assert row is not None
            return row[0]


@dataclass(frozen=True, slots=True)
class Database:
    """A database of one side's own."""

    server: Server
    name: str
    url: str

    def execute(self, statement: str, parameters: Mapping[str, Any] | None = None) -> None:
        """Run a statement, committed."""
        with connected(self.url) as cursor:
            cursor.execute(statement, parameters)

    def count(self, table: str) -> int:
        """How many rows the table has."""
        with connected(self.url) as cursor:
            cursor.execute(f"SELECT count(*) FROM {table}")
            row = cursor.fetchone()
            assert row is not None
            return int(row[0])

    def has_table(self, table: str) -> bool:
        """Whether there is such a table."""
        with connected(self.url) as cursor:
            cursor.execute("SELECT to_regclass(%(table)s)", {"table": table})
            return cursor.fetchone() != (None,)

    def settle(self, table: str) -> None:
        """Have what the server would do later be done before the measurement: statistics, hint bits, dirty pages."""
        with connected(self.url) as cursor:
            cursor.execute(f"VACUUM (ANALYZE) {table}")
            # A named server may not let us; then a checkpoint may fall into any side's time.
            with contextlib.suppress(errors.InsufficientPrivilege):
                cursor.execute("CHECKPOINT")

    @contextlib.contextmanager
    def held_snapshot(self, table: str) -> Iterator[None]:
        """A transaction in another session that keeps vacuum from removing what is deleted meanwhile."""
        connection = psycopg2.connect(self.url)
        try:
            connection.set_session(isolation_level="REPEATABLE READ")
            with connection.cursor() as cursor:
                cursor.execute(_HOLD_SNAPSHOT.format(table=table))
            yield
        finally:
            connection.close()


@contextlib.contextmanager
def server(database_url: str | None) -> Iterator[Server]:
    """The named server, or an embedded one in a folder of its own for as long as this lasts."""
    if database_url is not None:
        yield Server(database_url)
        return
    folder = Path(tempfile.mkdtemp(prefix="greenjobs-bench-"))
    # Started by root, the server runs as another account, which must be able to enter.
    folder.chmod(0o711)
    try:
        yield Server(embedded.start(f"embedded://{folder}/pg", project_folder=folder))
    finally:
        embedded.release()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def connected(url: str) -> Iterator[extensions.cursor]:
    """A cursor on an autocommit connection of its own."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()
