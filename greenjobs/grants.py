"""Who may do what: the least that a web server, a runner and a dashboard need of the tables, as rights of their roles.

A right is given to a role of the database that is there already. Rights are given anew as a whole: what a role had of
the tables before, and is not given again, is taken from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg2 import errors, sql

from greenjobs.errors import ConfigError, SchemaError

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor

_ALL = "SELECT, INSERT, UPDATE, DELETE"

# What an enqueue looks at beside what it inserts: whether a unique key is taken, and by whom. Neither arguments nor
# errors, progress or log of anybody's job are among it.
_SEEN = (
    "SELECT (id, job_type, queue, priority, state, run_at, unique_key, unique_until_finished, expires_at,"
    " exclusive_key, cancel_asked_at)"
)
_INSERTED = (
    "INSERT (id, job_type, data, queue, priority, run_at, state, options, unique_key, unique_until_finished,"
    " expires_at, exclusive_key)"
)
_REPLACED = (
    "SELECT (data), UPDATE (data, queue, priority, options, exclusive_key, retries, run_at, state, expires_at,"
    " unique_key)"
)

# Rights by table. To lock a row takes the right to update it.
RIGHTS: dict[str, dict[str, str]] = {
    "enqueue": {
        "background_jobs": f"{_SEEN}, {_INSERTED}",
        "background_unique_windows": _ALL,
        "background_waiting": "SELECT, UPDATE, DELETE",
    },
    "replace": {"background_jobs": _REPLACED},
    "run": {
        "background_jobs": _ALL,
        "background_history": _ALL,
        "background_runners": _ALL,
        "background_waiting": _ALL,
        "background_schedules": _ALL,
        "background_unique_windows": _ALL,
        "background_counts": _ALL,
        "background_queues": _ALL,
        "background_migrations": "SELECT",
    },
    "read": {
        "background_jobs": "SELECT",
        "background_history": "SELECT",
        "background_runners": "SELECT",
        "background_waiting": "SELECT",
        "background_schedules": "SELECT",
        "background_unique_windows": "SELECT",
        "background_counts": "SELECT",
        "background_queues": "SELECT",
        "background_migrations": "SELECT",
    },
}

# Whose numbers they draw.
_NUMBERED = {"enqueue": ("background_jobs",), "run": ("background_jobs", "background_runners")}

_FORM = "RIGHT=ROLE, where the right is one of " + ", ".join(RIGHTS)

_PLACE = """
SELECT
    current_schema(),
    to_regrole(%(role)s) IS NOT NULL,
    EXISTS (SELECT FROM pg_class WHERE oid = to_regclass('background_jobs') AND relowner = to_regrole(%(role)s))
"""

_SEQUENCE = """
SELECT pg_get_serial_sequence(%(table)s, 'id')
"""


class Grant(NamedTuple):
    """One right of one role."""

    right: str
    role: str


def parse(texts: Iterable[str]) -> list[Grant]:
    """What `--grant` was given, such as "enqueue=web". Raises ConfigError."""
    grants = []
    for text in texts:
        right, equals, role = text.partition("=")
        if not equals or right not in RIGHTS or not role.strip() or "\0" in role:
            raise ConfigError(f"--grant is {text!r}; the form is {_FORM}")
        grants.append(Grant(right, role.strip()))
    return grants


def give(cursor: Cursor, grants: Sequence[Grant]) -> None:
    """Give these rights, and no others, to the roles that they name; all of them or none.

    Raises SchemaError for a role that is not there, for the owner of the tables, and when whoever asks may not give the
    rights.
    """
    cursor.execute("BEGIN")
    try:
        for role in dict.fromkeys(grant.role for grant in grants):
            rights = [grant.right for grant in grants if grant.role == role]
            for statement in _statements(cursor, role, rights):
                cursor.execute(statement)
        cursor.execute("COMMIT")
    except errors.InsufficientPrivilege as error:
        cursor.execute("ROLLBACK")
        raise SchemaError(
            f"no rights were given, for that is up to the owner of the tables: {str(error).strip()}"
        ) from error
    except BaseException:
        if not cursor.connection.closed:
            cursor.execute("ROLLBACK")
        raise


def _statements(cursor: Cursor, role: str, rights: Sequence[str]) -> Iterable[sql.Composed]:
    # to_regrole reads its argument as an identifier is written.
    cursor.execute(_PLACE, {"role": sql.Identifier(role).as_string(cursor)})
    schema, is_there, is_owner = cursor.fetchone() or (None, False, False)
    if is_owner:
        # To give it the least would take the rest from it, even what migrations need.
        raise SchemaError(
            f"{role!r} owns the tables, and so may do everything with them; rights are given to other roles: make one, "
            f"as in CREATE ROLE … LOGIN, and let the application use that"
        )
    if not is_there:
        raise SchemaError(f"there is no role {role!r} in this database; make it first, as in CREATE ROLE … LOGIN")
    to: dict[str, Any] = {"role": sql.Identifier(role), "schema": sql.Identifier(schema)}
    yield sql.SQL("GRANT USAGE ON SCHEMA {schema} TO {role}").format(**to)
    for table in RIGHTS["read"]:
        yield sql.SQL("REVOKE ALL ON {table} FROM {role}").format(table=sql.Identifier(table), **to)
    for table in ("background_jobs", "background_runners"):
        yield _sequence(cursor, "REVOKE ALL ON SEQUENCE {sequence} FROM {role}", table, to)
    for right in rights:
        for table, given in RIGHTS[right].items():
            statement = f"GRANT {given} ON {{table}} TO {{role}}"  # of constants of this module
            yield sql.SQL(statement).format(table=sql.Identifier(table), **to)
        for table in _NUMBERED.get(right, ()):
            yield _sequence(cursor, "GRANT USAGE ON SEQUENCE {sequence} TO {role}", table, to)


def _sequence(cursor: Cursor, statement: str, table: str, to: dict[str, Any]) -> sql.Composed:
    # In an adopted table it may be called otherwise. The answer is quoted already.
    cursor.execute(_SEQUENCE, {"table": table})
    (name,) = cursor.fetchone() or (None,)
    return sql.SQL(statement).format(sequence=sql.SQL(name), **to)
