"""Connections to PostgreSQL that are safe across threads, greenlets and fork, and the rules for opening one.

A pool hands out autocommit connections, newest first, up to a bound. Its one lock guards list operations only, during
which no greenlet switch can happen: so it works the same in plain threads, under gevent, and when gevent patches the
process after this module was imported. Whoever finds all connections busy waits on an event made at that moment, which
is the patched one where patching happened.
"""

from __future__ import annotations

import _socket
import contextlib
import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import psycopg2
from psycopg2 import extensions

from greenjobs import alchemy, config, djangodb, embedded
from greenjobs.errors import DatabaseUnavailable, OptionError
from greenjobs.redaction import redact
from greenjobs.statement import PlanningConnection
from greenjobs.waits import Waits

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

MINIMUM_SERVER_VERSION = 130000

# A lost host is noticed after about 10 + 3 × 5 s of silence, and unacknowledged data after 20 s, instead of two hours.
_KEEPALIVES = {
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}

# Settings that an older server does not know are left out.
_SET = """
SELECT set_config(name, given.value, false)
FROM pg_settings
JOIN json_each_text(%(settings)s::json) AS given ON given.key = name
"""


class ConnectionPool:
    """Up to `size` autocommit connections to one database.

    `wait_seconds` bounds all of: waiting for a free connection, and opening one. Opening is lazy. A forked child starts
    with an empty pool; the parent's connections are left alone. `waits` says how long callers waited for one to come
    back; `setting` is what the settings call the size.
    """

    connection_type: type[PlanningConnection] = PlanningConnection

    def __init__(
        self,
        database_url: str,
        *,
        size: int,
        wait_seconds: float,
        application_name: str,
        session: Mapping[str, str] | None = None,
        answer_seconds: float | None = None,
        setting: str | None = None,
    ) -> None:
        self.database_url = database_url
        self.setting = setting
        self.answer_seconds = answer_seconds
        self.session = session
        self.size = size
        self.wait_seconds = wait_seconds
        self.application_name = application_name
        self._lock = threading.Lock()
        self._resets: dict[int, threading.Lock] = {}
        self._reset()

    def connection(self) -> Loan:
        """Lend a connection for a `with` block; it comes back clean, or is closed when an error left it otherwise.

        Raises DatabaseUnavailable when none is free, or none can be opened, within `wait_seconds`.
        """
        return Loan(self)

    @property
    def in_use(self) -> int:
        """How many connections are lent at this moment, or being opened."""
        return self._open - len(self._idle)

    def close(self) -> None:
        """Close the idle connections; those that are lent are closed when they come back."""
        with self._lock:
            idle = self._idle.copy()
            self._idle.clear()
            self._generation += 1
            self._open -= len(idle)
        for connection in idle:
            connection.close()

    def _reset_after_fork(self) -> None:
        """Forget the parent's connections, once, though several threads of this process may find them at a time.

        psycopg2 never closes a connection in another process than the one that opened it. The lock may have been held
        by a thread that does not exist here; so may a lock for resets, but for that of this process.
        """
        with self._resets.setdefault(os.getpid(), threading.Lock()):
            if self._process_id != os.getpid():
                self._lock = threading.Lock()
                self._reset()

    def _reset(self) -> None:
        self._generation = 0
        self._open = 0
        self._idle: list[PlanningConnection] = []
        self._waiting: deque[threading.Event] = deque()
        self._lent: dict[int, int] = {}
        self.waits = Waits(self.setting)
        # Last: who sees the number of this process may use the rest.
        self._process_id = os.getpid()

    def take(self) -> PlanningConnection:
        """Take a connection out of the pool, to be given back by `give_back`; as `connection` does."""
        if self._process_id != os.getpid():
            self._reset_after_fork()
        deadline = time.monotonic() + self.wait_seconds
        while True:
            turn: threading.Event | None = None
            connection: PlanningConnection | None = None
            with self._lock:
                generation = self._generation
                if self._idle:
                    connection = self._idle.pop()
                elif self._open < self.size:
                    self._open += 1
                else:
                    turn = threading.Event()
                    self._waiting.append(turn)
            if turn is not None:
                self._wait_for(turn, deadline)
                continue
            if connection is not None and not _is_usable(connection):
                connection.close()
                connection = None
            if connection is None:
                connection = self._open_one(deadline)
            self._lent[id(connection)] = generation
            return connection

    def _open_one(self, deadline: float) -> PlanningConnection:
        try:
            return connect(
                self.database_url,
                application_name=self.application_name,
                timeout_seconds=max(deadline - time.monotonic(), 0.1),
                session=self.session,
                answer_seconds=self.answer_seconds,
                connection_type=self.connection_type,
            )
        except BaseException:
            self._forget_one()
            raise

    def _wait_for(self, turn: threading.Event, deadline: float) -> None:
        started, in_vain = time.monotonic(), True
        try:
            self._await_turn(turn, deadline)
            in_vain = False
        finally:
            waited = time.monotonic() - started
            with self._lock:
                self.waits.add(waited, in_vain=in_vain)
            self.waits.warn(waited, self.size)

    def _await_turn(self, turn: threading.Event, deadline: float) -> None:
        try:
            if turn.wait(max(deadline - time.monotonic(), 0)):
                return
        except BaseException:
            # This greenlet has been interrupted and takes nothing; a turn that it was given already is the next one's.
            with self._lock:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._wake_next()
            raise
        with self._lock:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif turn.is_set():  # given just as the time was up
                return
        raise DatabaseUnavailable(
            f"all {self.size} connections to {redact(self.database_url)} stayed busy for "
            f"{self.wait_seconds:g} s (application {self.application_name}); allow more of them"
            f"{f' ({self.setting})' if self.setting else ''}, or hold them shorter"
        )

    def give_back(self, connection: PlanningConnection) -> None:
        """Put a connection back that was taken, if it is clean; else close it."""
        generation = self._lent.pop(id(connection), None)
        if generation is None:
            return  # borrowed before a fork, given back in the child: the parent's
        if generation == self._generation and _is_clean(connection):
            with self._lock:
                self._idle.append(connection)
                self._wake_next()
        else:
            with contextlib.suppress(psycopg2.Error):
                connection.close()
            self._forget_one()

    def _forget_one(self) -> None:
        with self._lock:
            self._open -= 1
            self._wake_next()

    def _wake_next(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()


class Loan:
    """A connection of a pool for one `with` block."""

    __slots__ = ("_connection", "_pool")

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool

    def __enter__(self) -> PlanningConnection:
        self._connection = self._pool.take()
        return self._connection

    def __exit__(self, *error: object) -> None:
        self._pool.give_back(self._connection)


def raw_connection(given: Any) -> Connection:
    """The psycopg2 connection behind what a caller passed as `connection`; in the transaction of SQLAlchemy or Django,
    if it is one of their objects. Raises OptionError.
    """
    connection = given.connection if isinstance(given, extensions.cursor) else given
    if not isinstance(connection, extensions.connection):
        connection = alchemy.driver_connection(given) or djangodb.driver_connection(given)
    if not isinstance(connection, extensions.connection):
        raise OptionError(f"connection is a {type(given).__module__}.{type(given).__qualname__}; {alchemy.ALLOWED}")
    if connection.async_:
        raise OptionError(
            "connection is a psycopg2 connection made with async_=True, on which only its owner can wait for an "
            "answer; give one without, or enqueue with independent=True"
        )
    return connection


def forget_if_broken(given: Any, error: BaseException | None = None) -> None:
    """After an error on the connection behind what a caller passed: let SQLAlchemy know, if it is its, and broken."""
    alchemy.forget_if_broken(given, by_server=isinstance(error, psycopg2.Error))


def connect(
    database_url: str,
    *,
    application_name: str,
    timeout_seconds: float,
    session: Mapping[str, str] | None = None,
    answer_seconds: float | None = None,
    connection_type: type[PlanningConnection] = PlanningConnection,
) -> PlanningConnection:
    """Open an autocommit connection; starts the embedded server where the URL names one.

    The `session` settings are made in the server's session, unless a pooler is in between, which shares it with others.
    A network that stays silent for `answer_seconds` after something was sent ends the connection; 20 if not given.
    Raises DatabaseUnavailable when the server refuses, does not answer within `timeout_seconds`, or is too old.
    """
    dsn = _libpq_dsn(database_url, application_name, timeout_seconds, answer_seconds)
    try:
        with _green_deadline(timeout_seconds):
            connection = psycopg2.connect(dsn, connection_factory=connection_type)
            try:
                _require_version(connection, database_url)
                _prepare(connection, session)
            except BaseException:
                connection.close()
                raise
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        # A line for each address that was tried, and hints on lines of their own; whoever reads them may read lines.
        why = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise DatabaseUnavailable(f"cannot connect to {redact(database_url)}: {why}") from error
    return connection


def _require_version(connection: Connection, database_url: str) -> None:
    version = connection.server_version
    if version < MINIMUM_SERVER_VERSION:
        raise DatabaseUnavailable(
            f"{redact(database_url)} is PostgreSQL {version // 10000}.{version % 10000}; "
            f"greenjobs needs {MINIMUM_SERVER_VERSION // 10000} or later"
        )


def _prepare(connection: PlanningConnection, session: Mapping[str, str] | None) -> None:
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        # A pooler gives its clients keys of its own, by which it finds out whom they want to cancel.
        connection.is_pooled = cursor.fetchone() != (connection.info.backend_pid,)
        if session and not connection.is_pooled:
            cursor.execute(_SET, {"settings": json.dumps(session)})


def parameters_of(database_url: str) -> dict[str, Any]:
    """What libpq reads from a URL or a keyword string. Raises DatabaseUnavailable where that makes no sense."""
    given: dict[str, Any] | None = None
    with contextlib.suppress(psycopg2.ProgrammingError):
        given = extensions.parse_dsn(database_url)
    if given is not None and not _is_misread(database_url, given):
        return given
    # Without libpq's own error, not even as the cause: it quotes what it could not read, which may be a password.
    raise DatabaseUnavailable(
        f"the database URL {redact(database_url)} cannot be read by libpq: it does not know an option, or a name or a "
        f"password has what means something in a URL, where @ is written %40, / is %2F, : is %3A, ? is %3F, % is %25"
    )


def _is_misread(database_url: str, given: Mapping[str, Any]) -> bool:
    """Whether it is a URL with an @ or a / in its password, so that libpq takes some of that for a host, or a port."""
    if "://" not in database_url:
        return False
    hosts = str(given.get("host", "")).split(",")
    return (
        any("@" in host[1:] for host in hosts)  # an abstract socket may begin with one
        or re.fullmatch(r"[\d,]*", str(given.get("port", ""))) is None
        or ("user" not in given and "@" in str(given.get("dbname", "")))
    )


def _libpq_dsn(database_url: str, application_name: str, timeout_seconds: float, answer_seconds: float | None) -> str:
    """The URL as libpq takes it, with our defaults for what it leaves open."""
    if embedded.is_embedded_url(database_url):
        database_url = embedded.start(database_url, project_folder=config.project_folder())
    given = parameters_of(database_url)
    defaults = {
        **_KEEPALIVES,
        "application_name": application_name,
        # JSON may hold any text; PGCLIENTENCODING is for terminals.
        "client_encoding": "UTF8",
        # Whole seconds, at least 2: libpq rounds up, and a smaller value would fail on a merely busy host.
        "connect_timeout": str(max(2, int(timeout_seconds + 0.999))),
    }
    if answer_seconds is not None:
        defaults["tcp_user_timeout"] = str(max(1000, int(answer_seconds * 1000)))
    return str(extensions.make_dsn(**{**defaults, **given}))


class bounded:
    """Make what the database says when it does not take a statement in time, or is gone, a DatabaseUnavailable.

    The statements of `shared_pool` are given up by the server after `enqueue_timeout`, and by the network soon after.
    """

    __slots__ = ("_seconds",)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        return None

    def __exit__(self, error_type: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, psycopg2.errors.QueryCanceled):
            raise DatabaseUnavailable(f"the database did not take it within {self._seconds:g} s") from error
        if isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError)):
            raise DatabaseUnavailable(f"the database did not take it: {str(error).strip()}") from error


@contextlib.contextmanager
def _green_deadline(seconds: float) -> Iterator[None]:
    """Bound what runs inside; libpq ignores connect_timeout when it waits through a callback."""
    if extensions.get_wait_callback() is None or "gevent" not in sys.modules:
        yield
        return
    import gevent  # loaded already: only a process that uses gevent has a wait callback

    timeout = gevent.Timeout.start_new(seconds)
    try:
        yield
    except gevent.Timeout as raised:
        if raised is not timeout:
            raise
        raise psycopg2.OperationalError(f"no answer within {seconds:.3g} s") from None
    finally:
        timeout.close()


def _is_clean(connection: Connection) -> bool:
    if connection.closed:
        return False
    return connection.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE


def _is_usable(connection: Connection) -> bool:
    """Whether the server still holds its end. Nothing was sent yet, so opening another connection is always safe."""
    # One in a transaction has been used after it was given back: what was begun then is nobody else's to commit.
    if not _is_clean(connection):
        return False
    # A quiet socket is a healthy one: the end of the stream, or a farewell message, would be readable. The C class
    # under socket.socket, which gevent does not replace, looks in 5 µs: cheap enough to do it every time.
    peer = _socket.socket(fileno=connection.fileno())
    try:
        peer.settimeout(0)  # libpq's own sockets never block either, and the two share that flag
        peer.recv(1, _socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return True
    except OSError:
        return False
    finally:
        peer.detach()
    return False


_shared_pools: dict[str, ConnectionPool] = {}


def shared_pools() -> list[ConnectionPool]:
    """Those of this process that have been made."""
    return list(_shared_pools.values())


def shared_pool(settings: config.Settings, database_url: str | None = None) -> ConnectionPool:
    """The pool of this process for enqueuing and looking, one for each database; made at its first use."""
    url = database_url or settings.require_database_url()
    pool = _shared_pools.get(url)
    if pool is None:
        pool = ConnectionPool(
            url,
            size=settings.enqueue_connections,
            setting="enqueue_connections",
            wait_seconds=settings.enqueue_timeout,
            application_name="greenjobs",
            answer_seconds=settings.enqueue_timeout,
            session={
                "plan_cache_mode": "force_generic_plan",
                "statement_timeout": str(int(settings.enqueue_timeout * 1000)),
            },
        )
        # Of two that race here, both use the one that was stored first.
        pool = _shared_pools.setdefault(url, pool)
    return pool
