"""The tables: plain SQL files, run forward and in order, each in a transaction, under a lock that dies with its holder.

The files are those of the top-level folder migrations/, named 0001_what_it_does.sql and shipped as the package
greenjobs.migrations. What has been applied is written in background_migrations, with a checksum: a file that was edited
afterwards is noticed. Names are unqualified everywhere, so `search_path` decides the schema.

A file that says `-- greenjobs: no-transaction` in a line of its own is run statement by statement instead, split at the
lines that are `-- statement`; CREATE INDEX CONCURRENTLY needs that.

While a release is rolled out, runners of the former one are started on tables that have been migrated already. They
may be, unless a migration takes away what they use. One that does says so: `-- greenjobs: needs 0012`, in a line of its
own, names the oldest migration that a release must know to work with the tables as it leaves them. That is recorded
with it, for the former releases do not have the file.
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
_NEEDS = re.compile(r"^-- greenjobs: needs (\d{4})$", re.MULTILINE)
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
    needs INTEGER NOT NULL DEFAULT 1,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT now()
)
"""

_HAS_REGISTER = "SELECT to_regclass(quote_ident(current_schema()) || '.background_migrations') IS NOT NULL"

_REGISTER = """
INSERT INTO background_migrations (version, name, checksum, needs)
VALUES (%(version)s, %(name)s, %(checksum)s, %(needs)s)
"""

_APPLIED = """
SELECT version, name, checksum, needs
FROM background_migrations
ORDER BY version
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

    @property
    def needs(self) -> int:
        """The oldest migration that a release must know to work with the tables as this one leaves them."""
        said = _NEEDS.search(self.sql.replace("\r\n", "\n"))
        return int(said[1]) if said else 1


@dataclass(frozen=True, slots=True)
class Standing:
    """How a database stands to this release.

    `missing` is what `migrate` would apply; `later` are the labels of what a later release has applied already, and
    with which this one works all the same.
    """

    missing: Sequence[Migration]
    later: Sequence[str] = ()


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

    Any number of processes may do this at once. There is nothing to do where a later release has been, with which this
    one works. Raises SchemaError when it does not, or when an applied file was edited; DatabaseUnavailable; and
    psycopg2.Error when a statement fails, in which case its file was rolled back.
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
        for migration in _compare(cursor, migrations).missing:
            _apply(cursor, migration)
            ran.append(migration.label)
        if grants:
            give(cursor, grants)
    return ran


def standing(database_url: str) -> Standing:
    """How the database stands to this release; changes nothing. Raises as `migrate`."""
    with _connected(database_url) as connection, connection.cursor() as cursor:
        return _standing(cursor)


def pending(database_url: str) -> Sequence[Migration]:
    """The migrations that `migrate` would apply; changes nothing. Raises as `migrate`."""
    return standing(database_url).missing


def as_sql() -> str:
    """All migrations as one script for psql, which leaves the same tables and the same record as `migrate`."""
    script = [_CREATE_REGISTER.strip() + ";\n"]
    for migration in load():
        transactional = not _WITHOUT_TRANSACTION.search(migration.sql)
        record = f"VALUES ({migration.version}, '{migration.name}', '{migration.checksum}', {migration.needs})"
        script += [
            f"\n-- {migration.label}\n",
            "BEGIN;\n" if transactional else "",
            migration.sql,
            f"INSERT INTO background_migrations (version, name, checksum, needs)\n{record};\n",
            "COMMIT;\n" if transactional else "",
        ]
    return "".join(script)


def require_current(connection: Connection) -> Sequence[str]:
    """Raise SchemaError, saying what to type, unless this release works with the tables.

    Returns the labels of what a later release has added to them.
    """
    with connection.cursor() as cursor:
        found = _standing(cursor)
    if found.missing:
        raise SchemaError(
            f"the database lacks {', '.join(migration.label for migration in found.missing)}; "
            f"type `greenjobs migrate`, or start with `greenjobs run --migrate`"
        )
    return found.later


def unfit(needs: int, known: int) -> str | None:
    """Why a release whose last migration is `known` does not work with tables that need one to know `needs`, if so."""
    if needs <= known:
        return None
    return (
        f"the database was migrated by a later release of greenjobs, and works only with those that know migration "
        f"{needs:04}, and the last one that this one knows is {known:04}; install that release, or a later one"
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


def _standing(cursor: Cursor) -> Standing:
    try:
        return _compare(cursor, load())
    except errors.UndefinedTable:
        return Standing(load())


def _compare(cursor: Cursor, migrations: list[Migration]) -> Standing:
    try:
        cursor.execute(_APPLIED)
    except errors.UndefinedColumn as error:
        raise SchemaError(
            f"background_migrations is not as greenjobs makes it: {str(error).splitlines()[0]}; if it is of "
            f"greenjobs, from before its first release: ALTER TABLE background_migrations "
            f"ADD needs INTEGER NOT NULL DEFAULT 1"
        ) from None
    known = {migration.version: migration for migration in migrations}
    applied, later, needed = set[int](), list[str](), 1
    for version, name, checksum, needs in cursor.fetchall():
        if version not in known:
            later.append(f"{version:04}_{name}")
        elif checksum != known[version].checksum:
            raise SchemaError(
                f"{known[version].label}.sql was changed after it was applied; put the file back as it was, "
                f"and make the change in a new one"
            )
        applied.add(version)
        needed = max(needed, needs)
    if reason := unfit(needed, max(known)):
        raise SchemaError(reason)
    missing = [migration for migration in migrations if migration.version not in applied]
    if missing and later:
        raise SchemaError(
            f"the database lacks {', '.join(migration.label for migration in missing)}, but a later release has been "
            f"here already ({', '.join(later)}); migrate with that one"
        )
    return Standing(missing, later)


def _apply(cursor: Cursor, migration: Migration) -> None:
    registration = {
        "version": migration.version,
        "name": migration.name,
        "checksum": migration.checksum,
        "needs": migration.needs,
    }
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
