"""Statements that ask whether a database and its server are fit for jobs. None changes anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from psycopg2 import sql

from greenjobs.grants import RIGHTS

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

# "grjd" in ASCII: beside the locks of runners and of migrations.
_LOCK_CLASS = 0x67726A64

TABLES = RIGHTS["run"]
"""The tables, and what runners have to be allowed to do with them."""

_NUMBERED = ("background_jobs", "background_runners")


class Server(NamedTuple):
    """Where a connection has ended up. `encoding` is that of the database; `is_local`: there is no network between."""

    version: str
    database: str
    user: str
    encoding: str
    in_recovery: bool
    is_local: bool


_SERVER = """
SELECT
    current_setting('server_version'),
    current_database(),
    current_user,
    current_setting('server_encoding'),
    pg_is_in_recovery(),
    inet_server_addr() IS NULL
"""


def server(connection: Connection) -> Server:
    """What the connection leads to."""
    with connection.cursor() as cursor:
        cursor.execute(_SERVER)
        return Server._make(cursor.fetchone() or ())


# What a session begins with: the server's settings with those of the database and the role on top.
_BEGINNINGS = """
SELECT name, reset_val
FROM pg_settings
WHERE name = ANY(%(names)s)
"""

_SETTINGS = """
SELECT name, setting
FROM pg_settings
WHERE name = ANY(%(names)s)
"""


def settings(connection: Connection, *names: str, of_session: bool = False) -> dict[str, str]:
    """Settings as a session begins with them, or as this one has them; without those that the server does not know."""
    with connection.cursor() as cursor:
        cursor.execute(_SETTINGS if of_session else _BEGINNINGS, {"names": list(names)})
        return dict(cursor.fetchall())


def backend(connection: Connection) -> int:
    """The process of the server that answers on this connection, at this moment."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone() or (0,)
        return int(pid)


def nap(connection: Connection, seconds: float) -> None:
    """Have the server wait for so long."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%(seconds)s)", {"seconds": seconds})


@contextmanager
def held_transaction(connection: Connection) -> Iterator[int]:
    """A transaction that does nothing; gives the process of the server that has it."""
    with connection.cursor() as cursor:
        cursor.execute("BEGIN READ ONLY")
        try:
            yield backend(connection)
        finally:
            cursor.execute("ROLLBACK")


_TRY_LOCK = """
SELECT pg_try_advisory_lock(%(class)s, pg_backend_pid()), pg_backend_pid()
"""

# Some session of this very database has it, and that is its own key.
_SEES_LOCK = """
SELECT EXISTS (
    SELECT
    FROM pg_locks
    WHERE locktype = 'advisory'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND classid = %(class)s
        AND objid = %(number)s
        AND objsubid = 2
        AND pid = %(number)s
        AND granted
)
"""

_UNLOCK = """
SELECT pg_advisory_unlock(%(class)s, %(number)s)
"""


def lock_is_seen(holder: Connection, observer: Connection) -> bool:
    """Whether a lock that one connection takes is there for the other in a later statement; it is let go of again."""
    with holder.cursor() as cursor, observer.cursor() as observing:
        cursor.execute(_TRY_LOCK, {"class": _LOCK_CLASS})
        has_lock, number = cursor.fetchone() or (False, 0)
        key = {"class": _LOCK_CLASS, "number": number}
        observing.execute(_SEES_LOCK, key)
        (is_seen,) = observing.fetchone() or (False,)
        cursor.execute(_UNLOCK, key)
        return bool(has_lock and is_seen)


def listen(connection: Connection, channel: str) -> None:
    """Hear what is notified on this channel."""
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))


def unlisten(connection: Connection, channel: str) -> None:
    """Hear no more of it."""
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL("UNLISTEN {}").format(sql.Identifier(channel)))


def notify(connection: Connection, channel: str, payload: str) -> None:
    """Tell all who listen on this channel."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_notify(%(channel)s, %(payload)s)", {"channel": channel, "payload": payload})


class Room(NamedTuple):
    """How many connections the server, the database and the role allow (None: as many as the server), how many of the
    server's are reserved for others, and how many clients that are not of greenjobs are connected."""

    server: int
    reserved: int
    database: int | None
    role: int | None
    others: int


# What runners and their jobs have open is counted by what they may open.
_ROOM = """
SELECT
    current_setting('max_connections')::int,
    current_setting('superuser_reserved_connections')::int
        + coalesce(current_setting('reserved_connections', true), '0')::int,
    (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()),
    (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),
    (
        SELECT count(*)
        FROM pg_stat_activity
        WHERE datid IS NOT NULL
            AND application_name NOT LIKE 'greenjobs%%'
    )
"""


def room(connection: Connection) -> Room:
    """How many connections there may be."""
    with connection.cursor() as cursor:
        cursor.execute(_ROOM, {})
        return Room._make(cursor.fetchone() or ())


class Table(NamedTuple):
    """A table of ours: whether it is logged, the rights on it that are missing, its options, and what vacuum does."""

    name: str
    is_logged: bool
    missing_rights: Sequence[str]
    options: Mapping[str, str]
    live_rows: int
    dead_rows: int
    vacuumed_seconds_ago: float | None


_TABLES = """
SELECT
    named.name,
    class.relpersistence = 'p',
    ARRAY(
        SELECT privilege
        FROM unnest(string_to_array(named.rights, ', ')) AS privilege
        WHERE NOT has_table_privilege(class.oid, privilege)
    ),
    ARRAY(SELECT option_name FROM pg_options_to_table(class.reloptions)),
    ARRAY(SELECT option_value FROM pg_options_to_table(class.reloptions)),
    coalesce(statistics.n_live_tup, 0),
    coalesce(statistics.n_dead_tup, 0),
    extract(epoch FROM now() - greatest(statistics.last_autovacuum, statistics.last_vacuum))::float8
FROM unnest(%(names)s::text[], %(rights)s::text[]) AS named (name, rights)
JOIN pg_class AS class ON class.oid = to_regclass(named.name)
LEFT JOIN pg_stat_all_tables AS statistics ON statistics.relid = class.oid
ORDER BY named.name
"""


def tables(connection: Connection) -> dict[str, Table]:
    """Those of our tables that are there, by name."""
    with connection.cursor() as cursor:
        cursor.execute(_TABLES, {"names": list(TABLES), "rights": list(TABLES.values())})
        return {
            name: Table(name, is_logged, missing, dict(zip(names, values, strict=True)), *statistics)
            for name, is_logged, missing, names, values, *statistics in cursor.fetchall()
        }


# In an adopted table they may be called otherwise.
_UNUSABLE_SEQUENCES = """
SELECT sequence
FROM (
    SELECT pg_get_serial_sequence(name, 'id') AS sequence
    FROM unnest(%(names)s::text[]) AS name
    WHERE to_regclass(name) IS NOT NULL
) AS drawn
WHERE NOT has_sequence_privilege(sequence, 'USAGE')
"""


def unusable_sequences(connection: Connection) -> list[str]:
    """The sequences that number the rows of our tables, and that this role may not use."""
    with connection.cursor() as cursor:
        cursor.execute(_UNUSABLE_SEQUENCES, {"names": list(_NUMBERED)})
        return [row[0] for row in cursor.fetchall()]


_INDEXES = """
SELECT class.relname, index.indisvalid AND index.indisready
FROM pg_index AS index
JOIN pg_class AS class ON class.oid = index.indexrelid
WHERE index.indrelid IN (SELECT to_regclass(name) FROM unnest(%(names)s::text[]) AS name)
"""


def indexes(connection: Connection) -> dict[str, bool]:
    """The indexes of our tables by name, and whether each can be used."""
    with connection.cursor() as cursor:
        cursor.execute(_INDEXES, {"names": list(TABLES)})
        return dict(cursor.fetchall())


class Holder(NamedTuple):
    """Who keeps vacuum from removing rows: a session, a prepared transaction, a replication slot or a standby.

    `seconds` is the age of the transaction, None where that is not known or not shown to this role; `transactions` how
    many have begun since its snapshot.
    """

    kind: str
    name: str
    seconds: float | None
    transactions: int


# Whatever holds a snapshot of this database, or of all. Nothing of what is executed there.
_HOLDERS = """
SELECT
    'session',
    format('pid %%s of %%s%%s', pid, usename, ' (' || nullif(application_name, '') || ')'),
    extract(epoch FROM now() - xact_start)::float8,
    age(backend_xmin)
FROM pg_stat_activity
WHERE backend_xmin IS NOT NULL
    AND pid <> pg_backend_pid()
    AND (datname = current_database() OR datname IS NULL)
    AND coalesce(backend_type, '') NOT IN ('autovacuum worker', 'walsender')
UNION ALL
SELECT
    'prepared transaction',
    gid,
    extract(epoch FROM now() - prepared)::float8,
    age(transaction)
FROM pg_prepared_xacts
WHERE database = current_database()
UNION ALL
SELECT
    CASE WHEN active THEN 'replication slot' ELSE 'unused replication slot' END,
    slot_name,
    NULL,
    age(xmin)
FROM pg_replication_slots
WHERE xmin IS NOT NULL
UNION ALL
SELECT
    'standby',
    coalesce(nullif(application_name, ''), 'pid ' || pid),
    NULL,
    age(backend_xmin)
FROM pg_stat_replication
WHERE backend_xmin IS NOT NULL
ORDER BY 4 DESC
LIMIT 100
"""


def snapshot_holders(connection: Connection) -> list[Holder]:
    """Who holds snapshots, the oldest first."""
    with connection.cursor() as cursor:
        cursor.execute(_HOLDERS, {})
        return [Holder._make(row) for row in cursor.fetchall()]


_WAITING_TYPES = """
SELECT job_type, count(*)
FROM background_jobs
WHERE state IN ('available', 'scheduled')
GROUP BY job_type
ORDER BY job_type
"""


def waiting_types(connection: Connection) -> dict[str, int]:
    """How many jobs of each type wait, for now or for later."""
    with connection.cursor() as cursor:
        cursor.execute(_WAITING_TYPES)
        return dict(cursor.fetchall())


# A payload may have a megabyte: what is sent over is bounded, too.
_PAYLOADS = """
SELECT id, data
FROM (
    SELECT id, data, sum(octet_length(data)) OVER (ORDER BY id) AS bytes
    FROM (
        SELECT id, data::text AS data
        FROM background_jobs
        WHERE job_type = %(job_type)s
            AND state IN ('available', 'scheduled')
        ORDER BY id
        LIMIT %(limit)s
    ) AS oldest
) AS measured
WHERE bytes <= %(bytes)s
ORDER BY id
"""


def waiting_payloads(connection: Connection, job_type: str, *, limit: int, max_bytes: int) -> list[tuple[int, str]]:
    """Id and payload of the oldest jobs of a type that wait."""
    with connection.cursor() as cursor:
        cursor.execute(_PAYLOADS, {"job_type": job_type, "limit": limit, "bytes": max_bytes})
        return cursor.fetchall()


_OVERDUE = """
SELECT name
FROM background_schedules
WHERE NOT paused
    AND next_tick_at < now() - make_interval(secs => %(age)s)
ORDER BY name
"""


def overdue_schedules(connection: Connection, *, age_seconds: float) -> list[str]:
    """Schedules with a tick that nobody has looked at for so long."""
    with connection.cursor() as cursor:
        cursor.execute(_OVERDUE, {"age": age_seconds})
        return [row[0] for row in cursor.fetchall()]
