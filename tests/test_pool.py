"""Connections: how many, which ones, who waits, what becomes of broken ones; and which servers are refused."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

import gevent
import processes
import psycopg2
import psycopg2.extras
import pytest
from gevent.event import Event
from psycopg2 import extensions
from waiting import eventually

from greenjobs.errors import DatabaseUnavailable, OptionError
from greenjobs.pool import ConnectionPool, connect, raw_connection

PATIENCE_SECONDS = 20.0


@pytest.fixture
def pool(server_url: str) -> Iterator[ConnectionPool]:
    """Of two connections; tests of connections need no tables."""
    pool = ConnectionPool(server_url, size=2, wait_seconds=PATIENCE_SECONDS, application_name="test pool")
    yield pool
    pool.close()


def _impatient(url: str, size: int = 1) -> ConnectionPool:
    return ConnectionPool(url, size=size, wait_seconds=0.2, application_name="test pool")


def _backend(pool: ConnectionPool) -> int:
    with pool.connection() as connection:
        return connection.info.backend_pid


# --- lending ----------------------------------------------------------------------------------------------------------


def test_connection_is_in_autocommit(pool: ConnectionPool) -> None:
    with pool.connection() as connection:
        assert connection.autocommit


def test_connection_is_used_again(pool: ConnectionPool) -> None:
    assert _backend(pool) == _backend(pool)


def test_nobody_shares_a_connection(pool: ConnectionPool) -> None:
    with pool.connection() as one, pool.connection() as two:
        assert one is not two


def test_no_more_connections_are_opened_than_allowed(server_url: str) -> None:
    pool = ConnectionPool(server_url, size=3, wait_seconds=PATIENCE_SECONDS, application_name="three")
    seen = set()

    def use() -> None:
        with pool.connection() as connection:
            seen.add(connection.info.backend_pid)
            connection.cursor().execute("SELECT pg_sleep(0.01)")

    gevent.joinall([gevent.spawn(use) for _ in range(30)], raise_error=True)
    pool.close()

    assert len(seen) == 3


def test_who_waits_gets_the_connection_that_comes_back(server_url: str) -> None:
    pool = ConnectionPool(server_url, size=1, wait_seconds=PATIENCE_SECONDS, application_name="one")
    with pool.connection() as connection:
        waiting = gevent.spawn(_backend, pool)
        gevent.idle()
        lent = connection.info.backend_pid

    assert waiting.get(timeout=PATIENCE_SECONDS) == lent
    pool.close()


def test_who_waits_in_vain_is_told_what_is_busy(server_url: str) -> None:
    pool = _impatient(server_url)
    with pool.connection(), pytest.raises(DatabaseUnavailable, match=r"all 1 connections .* 0\.2 s .*test pool"):
        pool.connection().__enter__()
    pool.close()


def test_who_waited_in_vain_takes_no_turn_from_others(server_url: str) -> None:
    pool = _impatient(server_url)
    with pool.connection(), pytest.raises(DatabaseUnavailable):
        pool.connection().__enter__()

    assert _backend(pool) == _backend(pool)
    pool.close()


def test_greenlet_killed_while_it_waits_takes_no_turn_from_others(server_url: str) -> None:
    """Such as a job that reached its own timeout inside of .delay."""
    pool = ConnectionPool(server_url, size=1, wait_seconds=PATIENCE_SECONDS, application_name="one")
    with pool.connection():
        first = gevent.spawn(_backend, pool)
        gevent.idle()
        second = gevent.spawn(_backend, pool)
        gevent.idle()
        first.kill()

    assert second.get(timeout=PATIENCE_SECONDS / 2)
    pool.close()


def test_greenlet_killed_when_its_turn_has_come_passes_it_on(server_url: str) -> None:
    pool = ConnectionPool(server_url, size=1, wait_seconds=PATIENCE_SECONDS, application_name="one")
    with pool.connection():
        first = gevent.spawn(_backend, pool)
        gevent.idle()
        second = gevent.spawn(_backend, pool)
        gevent.idle()
        first.kill(block=False)  # arrives when the connection is back, and before the first could take it

    assert second.get(timeout=PATIENCE_SECONDS / 2)
    pool.close()


# --- what comes back --------------------------------------------------------------------------------------------------


def test_connection_left_in_a_transaction_is_not_lent_again(pool: ConnectionPool) -> None:
    with pool.connection() as connection:
        left = connection.info.backend_pid
        connection.cursor().execute("BEGIN; CREATE TEMPORARY TABLE x ()")

    assert connection.closed
    assert _backend(pool) != left


def test_connection_is_lent_again_after_an_error_in_autocommit(pool: ConnectionPool) -> None:
    with contextlib.suppress(psycopg2.errors.DivisionByZero), pool.connection() as connection:
        connection.cursor().execute("SELECT 1 / 0")

    assert not connection.closed
    assert _backend(pool) == connection.info.backend_pid


def test_connection_closed_by_its_borrower_gives_its_place_back(pool: ConnectionPool) -> None:
    for _ in range(5):
        with pool.connection() as connection:
            connection.close()

    assert _backend(pool)


def test_error_of_the_borrower_comes_out_as_it_is(pool: ConnectionPool) -> None:
    with pytest.raises(LookupError, match="mine"), pool.connection():
        raise LookupError("mine")


def test_connection_that_the_server_closed_is_replaced(pool: ConnectionPool, server_url: str) -> None:
    dead = _backend(pool)
    _terminate(server_url, dead)

    assert _backend(pool) not in (dead, 0)


def test_connection_whose_socket_is_quiet_for_long_is_used(pool: ConnectionPool) -> None:
    """The look for what the server said must not swallow any of it."""
    with pool.connection() as connection:
        for number in range(100):
            with connection.cursor() as cursor:
                cursor.execute("SELECT %s", (number,))
                assert cursor.fetchone() == (number,)
    for _ in range(100):
        with pool.connection() as again:
            assert again is connection


def test_interrupted_statement_gives_its_place_back(server_url: str) -> None:
    pool = _impatient(server_url)

    def sleep() -> None:
        with pool.connection() as connection:
            connection.cursor().execute("SELECT pg_sleep(60)")

    for _ in range(3):
        sleeper = gevent.spawn(sleep)
        eventually(lambda: _statements(server_url, "SELECT pg_sleep(60)"), "it does not sleep")
        sleeper.kill()

    assert _backend(pool)
    pool.close()


def test_pool_closed_while_a_connection_is_lent_closes_it_when_it_comes_back(pool: ConnectionPool) -> None:
    with pool.connection() as connection:
        pool.close()
        assert not connection.closed

    assert connection.closed
    assert _backend(pool)


def test_why_it_could_not_connect_is_on_one_line() -> None:
    """Also where several hosts were tried: it is part of a line of a log, or of a terminal."""
    one, two = processes.free_port(), processes.free_port()
    pool = _impatient(f"postgresql://127.0.0.1:{one},127.0.0.1:{two}/shop")
    with pytest.raises(DatabaseUnavailable, match=rf"cannot connect to .*; .*port {two}") as raised:
        _backend(pool)

    assert len(str(raised.value).splitlines()) == 1


def test_pool_that_could_not_connect_does_when_it_can(server_url: str) -> None:
    pool = _impatient(f"postgresql://127.0.0.1:{processes.free_port()}/shop")
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable, match="cannot connect"):
            _backend(pool)
    pool.database_url = server_url

    assert _backend(pool)
    pool.close()


def _terminate(url: str, backend: int) -> None:
    administrator = psycopg2.connect(url)
    administrator.autocommit = True
    with administrator.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", (backend,))

        def is_gone() -> bool:
            cursor.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (backend,))
            return not cursor.rowcount

        eventually(is_gone, f"session {backend} did not end")
    administrator.close()


def _statements(url: str, sql: str) -> int:
    administrator = psycopg2.connect(url)
    with administrator.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE query = %s AND state = 'active'", (sql,))
        (count,) = cursor.fetchone() or (0,)
    administrator.close()
    return int(count)


# --- opening ----------------------------------------------------------------------------------------------------------


def test_connection_says_who_it_is(server_url: str) -> None:
    connection = connect(server_url, application_name="somebody", timeout_seconds=5)
    with connection.cursor() as cursor:
        cursor.execute("SHOW application_name")
        assert cursor.fetchone() == ("somebody",)
    connection.close()


def test_application_name_in_the_url_wins(server_url: str) -> None:
    connection = connect(
        extensions.make_dsn(server_url, application_name="given"), application_name="ours", timeout_seconds=5
    )
    with connection.cursor() as cursor:
        cursor.execute("SHOW application_name")
        assert cursor.fetchone() == ("given",)
    connection.close()


def test_several_hosts_are_tried_in_turn(server_url: str) -> None:
    """As a cluster's URL names them, of which the first is down."""
    given = extensions.parse_dsn(server_url)
    hosts = f"127.0.0.1,{given.get('host', '')}"
    ports = f"{processes.free_port()},{given.get('port', '5432')}"
    url = extensions.make_dsn(server_url, host=hosts, port=ports, target_session_attrs="read-write")

    connection = connect(url, application_name="test", timeout_seconds=10)

    assert connection.info.status == extensions.STATUS_SETUP or not connection.closed
    connection.close()


def test_database_that_does_not_exist_is_named(server_url: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="no_such_database"):
        connect(extensions.make_dsn(server_url, dbname="no_such_database"), application_name="x", timeout_seconds=5)


def test_host_that_does_not_exist_is_named_without_the_password() -> None:
    with pytest.raises(DatabaseUnavailable, match="no-such-host.invalid") as caught:
        connect("postgresql://ann:hunter2@no-such-host.invalid/x", application_name="x", timeout_seconds=5)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:hunter2@h/x?no_such_option=1",
        "host=h password=hunter2 no_such_option=1",
        "postgresql://ann:hunter2@h:port/x",
        "postgresql://ann:hunter2@[::1/x",
        "postgresql://ann:hunter2%zz@h/x",
        "host=h password='hunter2",
    ],
)
def test_url_that_libpq_does_not_understand_is_refused_without_the_password(url: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="cannot") as caught:
        connect(url, application_name="x", timeout_seconds=5)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("version", "said"), [("12.22", r"PostgreSQL 12\.22;"), ("9.6.24", r"PostgreSQL 9\.6")])
def test_server_older_than_13_is_refused_by_name(version: str, said: str) -> None:
    with _server_of_version(version) as url, pytest.raises(DatabaseUnavailable, match=f"{said}.*13 or later"):
        connect(url, application_name="x", timeout_seconds=5)


@contextlib.contextmanager
def _server_of_version(version: str) -> Iterator[str]:
    """Enough of a PostgreSQL server to log in at: it says that all is well, and which version it is."""

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("!I", len(body) + 4) + body

    def serve() -> None:
        peer, _ = listening.accept()
        with peer:
            while True:
                (length,) = struct.unpack("!I", peer.recv(4))
                if peer.recv(length - 4)[:4] == struct.pack("!I", 80877103) or length == 8:
                    peer.sendall(b"N")  # neither TLS nor GSSAPI
                    continue
                break
            peer.sendall(
                message(b"R", struct.pack("!I", 0))
                + message(b"S", b"server_version\0" + version.encode() + b"\0")
                + message(b"S", b"client_encoding\0UTF8\0")
                + message(b"S", b"DateStyle\0ISO, MDY\0")
                + message(b"S", b"standard_conforming_strings\0on\0")
                + message(b"K", struct.pack("!II", 1, 1))
                + message(b"Z", b"I")
            )
            closed.wait(PATIENCE_SECONDS)

    closed = Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = gevent.spawn(serve)
        try:
            yield f"postgresql://ann@127.0.0.1:{listening.getsockname()[1]}/shop?sslmode=disable&gssencmode=disable"
        finally:
            closed.set()
            server.join()


# --- what callers hand over -------------------------------------------------------------------------------------------


def test_raw_connection_of_a_connection_is_itself(server_url: str) -> None:
    connection = psycopg2.connect(server_url)
    assert raw_connection(connection) is connection
    connection.close()


def test_raw_connection_of_a_cursor_is_its_connection(server_url: str) -> None:
    connection = psycopg2.connect(server_url, cursor_factory=psycopg2.extras.RealDictCursor)
    assert raw_connection(connection.cursor()) is connection
    connection.close()


@pytest.mark.parametrize("given", [None, "postgresql://h/x", 5, object(), psycopg2.connect], ids=repr)
def test_raw_connection_of_anything_else_is_refused(given: Any) -> None:
    with pytest.raises(OptionError, match="allowed: a psycopg2 connection or cursor"):
        raw_connection(given)
