"""The tables: plain SQL files, run forward and in order, each in a transaction, under a lock that dies with its holder.

The files are those of the top-level folder migrations/, named 0001_what_it_does.sql and shipped as the package
greenjobs.migrations. What has been applied is written in background_migrations, with a checksum: a file that was edited
afterwards is noticed. Names are unqualified everywhere, so `search_path` decides the schema.

A file that says `-- greenjobs: no-transaction` in a line of its own is run statement by statement instead, split at the
lines that are `-- statement`; CREATE INDEX CONCURRENTLY needs that.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from psycopg2 import errors

from greenjobs import pool
from greenjobs.errors import SchemaError
from greenjobs.grants import Grant, give
from greenjobs.redaction import redact
from greenjobs.statement import PlanningConnection

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import cursor as Cursor

_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_WITHOUT_TRANSACTION = re.compile(r"^-- greenjobs: no-transaction$", re.MULTILINE)
_STATEMENT = re.compile(r"^-- statement$", re.MULTILINE)
_COMMENT = re.compile(r"--[^\n]*")

_CONNECT_SECONDS = 10.0
_LOCK_PAUSE_SECONDS = 0.1

# The class of the lock says greenjobs ("grjb" in ASCII), its number which schema.
_LOCK_CLASS = 0x67726A62

_LOCK = "SELECT pg_try_advisory_lock(%(class)s, hashtext(current_schema()))"

_CREATE_REGISTER = """
CREATE TABLE IF NOT EXISTS background_migrations (
    version INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    checksum TEXT NOT NULL,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT now()
)
"""

_HAS_REGISTER = "SELECT to_regclass(quote_ident(current_schema()) || '.background_migrations') IS NOT NULL"

_REGISTER = """
INSERT INTO background_migrations (version, name, checksum)
VALUES (%(version)s, %(name)s, %(checksum)s)
"""

_APPLIED = """
SELECT version, checksum
FROM background_migrations
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: `version` is its number, `name` the rest of its name."""

    version: int
    name: str
    sql: str

    @property
    def label(self) -> str:
        """What it is called, as in 0001_background_jobs."""
        return f"{self.version:04}_{self.name}"

    @property
    def checksum(self) -> str:
        """The same for every checkout, whatever line ends it uses."""
        return hashlib.sha256(self.sql.replace("\r\n", "\n").encode()).hexdigest()


def load() -> list[Migration]:
    """The migrations that this release brings, in order. Raises SchemaError when they are not where they belong."""
    migrations = []
    for name, sql in _files():
        match = _NAME.fullmatch(name)
        if match:
            migrations.append(Migration(int(match[1]), match[2], sql))
    migrations.sort(key=lambda migration: migration.version)
    versions = [migration.version for migration in migrations]
    if not versions or versions != list(range(1, len(versions) + 1)):
        raise SchemaError(f"the migrations of this installation are not complete: {versions}; install greenjobs again")
    return migrations


def migrate(database_url: str, *, grants: Sequence[Grant] = ()) -> list[str]:
    """Bring the tables up to date; returns the labels of what was applied, none when they were. Then give the `grants`.

    Any number of processes may do this at once. Raises SchemaError when an applied file was edited, or when the
    database has been migrated by a later release; DatabaseUnavailable; and psycopg2.Error when a statement fails, in
    which case its file was rolled back.
    """
    migrations = load()
    ran = []
    with _connected(database_url) as connection, connection.cursor() as cursor:
        if connection.is_pooled:
            raise SchemaError(
                f"{redact(database_url)} leads through a pooler, where the lock that keeps two migrations apart "
                f"cannot be held; name the direct way with --session-url or GREENJOBS_SESSION_URL"
            )
        _take_lock(cursor)
        # Whoever may not create tables may ask all the same whether there is anything to do.
        cursor.execute(_HAS_REGISTER)
        if cursor.fetchone() == (False,):
            cursor.execute(_CREATE_REGISTER)
        for migration in _missing(cursor, migrations):
            _apply(cursor, migration)
            ran.append(migration.label)
        if grants:
            give(cursor, grants)
    return ran


def pending(database_url: str) -> list[Migration]:
    """The migrations that `migrate` would apply; changes nothing. Raises as `migrate`."""
    with _connected(database_url) as connection, connection.cursor() as cursor:
        return _pending(cursor)


def as_sql() -> str:
    """All migrations as one script for psql, which leaves the same tables and the same record as `migrate`."""
    script = [_CREATE_REGISTER.strip() + ";\n"]
    for migration in load():
        transactional = not _WITHOUT_TRANSACTION.search(migration.sql)
        record = f"VALUES ({migration.version}, '{migration.name}', '{migration.checksum}')"
        script += [
            f"\n-- {migration.label}\n",
            "BEGIN;\n" if transactional else "",
            migration.sql,
            f"INSERT INTO background_migrations (version, name, checksum)\n{record};\n",
            "COMMIT;\n" if transactional else "",
        ]
    return "".join(script)


def require_current(connection: Connection) -> None:
    """Raise SchemaError, saying what to type, unless the tables are those of this release."""
    with connection.cursor() as cursor:
        missing = _pending(cursor)
    if missing:
        raise SchemaError(
            f"the database lacks {', '.join(migration.label for migration in missing)}; "
            f"type `greenjobs migrate`, or start with `greenjobs run --migrate`"
        )


def _files() -> list[tuple[str, str]]:
    """Name and text of every file among the migrations."""
    with contextlib.suppress(ModuleNotFoundError):
        return [(file.name, file.read_text("utf-8")) for file in resources.files("greenjobs.migrations").iterdir()]
    # An editable installation has the package's folder as it lies in the source tree, and the SQL one level up.
    folder = Path(__file__).parent.parent / "migrations"
    if not folder.is_dir():
        raise SchemaError(f"the SQL files of greenjobs are not at {folder}; install greenjobs again")
    return [(file.name, file.read_text("utf-8")) for file in folder.iterdir() if file.is_file()]


@contextlib.contextmanager
def _connected(database_url: str) -> Iterator[PlanningConnection]:
    connection = pool.connect(database_url, application_name="greenjobs migrate", timeout_seconds=_CONNECT_SECONDS)
    try:
        yield connection
    finally:
        connection.close()


def _take_lock(cursor: Cursor) -> None:
    """Wait for the lock by polling. A session that waits inside pg_advisory_lock holds a snapshot, for which CREATE
    INDEX CONCURRENTLY of the lock's holder would wait in turn."""
    while True:
        cursor.execute(_LOCK, {"class": _LOCK_CLASS})
        (has_lock,) = cursor.fetchone() or (None,)
        if has_lock:
            return
        if has_lock is None:  # there is no current_schema() to lock
            raise SchemaError(
                "no schema of the search_path exists in this database; create one, or correct the search_path"
            )
        time.sleep(_LOCK_PAUSE_SECONDS)


def _pending(cursor: Cursor) -> list[Migration]:
    try:
        return _missing(cursor, load())
    except errors.UndefinedTable:
        return load()


def _missing(cursor: Cursor, migrations: list[Migration]) -> list[Migration]:
    cursor.execute(_APPLIED)
    applied = dict(cursor.fetchall())
    known = {migration.version: migration for migration in migrations}
    for version, checksum in sorted(applied.items()):
        if version not in known:
            raise SchemaError(
                f"the database has migration {version:04}, which this release of greenjobs does not know; "
                f"install the release that made it, or a later one"
            )
        if checksum != known[version].checksum:
            raise SchemaError(
                f"{known[version].label}.sql was changed after it was applied; put the file back as it was, "
                f"and make the change in a new one"
            )
    return [migration for migration in migrations if migration.version not in applied]


def _apply(cursor: Cursor, migration: Migration) -> None:
    registration = {"version": migration.version, "name": migration.name, "checksum": migration.checksum}
    if _WITHOUT_TRANSACTION.search(migration.sql):
        for statement in _STATEMENT.split(migration.sql):
            if _COMMENT.sub("", statement).strip():
                cursor.execute(statement)
        cursor.execute(_REGISTER, registration)
        return
    cursor.execute("BEGIN")
    try:
        cursor.execute(migration.sql)  # the server splits the statements
        cursor.execute(_REGISTER, registration)
        cursor.execute("COMMIT")
    except BaseException:
        if not cursor.connection.closed:
            cursor.execute("ROLLBACK")
        raise
