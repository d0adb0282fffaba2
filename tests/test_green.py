"""The green edge to psycopg2: many wait at a time, and what is interrupted is stopped on the server, too."""

from __future__ import annotations

import contextlib
import socket
import struct
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import processes
import psycopg2
import pytest
import running
from gevent.event import Event
from waiting import eventually

from greenjobs import green

PATIENCE_SECONDS = running.PATIENCE_SECONDS

_SLEEP = "SELECT pg_sleep(600)"


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    database = running.Database(database_url)
    yield database
    database.connection.close()


def _active(database: running.Database, sql: str = _SLEEP) -> int:
    active = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' AND query = %s"
    )
    return int(database.value(active, sql))


def _wait_until_active(database: running.Database, count: int, sql: str = _SLEEP) -> None:
    eventually(lambda: _active(database, sql) == count, f"there are not {count} of {sql}", seconds=PATIENCE_SECONDS)


# --- patching ---------------------------------------------------------------------------------------------------------


def test_patched_process_misses_nothing() -> None:
    assert green.missing_patches() == ()


def test_patching_again_is_harmless() -> None:
    green.patch()

    assert green.missing_patches() == ()


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("", ["socket", "ssl", "time", "select", "threading", "psycopg2"]),
        ("monkey.patch_all()", ["psycopg2"]),
        ("monkey.patch_socket(); monkey.patch_time()", ["ssl", "select", "threading", "psycopg2"]),
        ("green.patch()", []),
    ],
    ids=["nothing", "all but psycopg2", "some by hand", "by greenjobs"],
)
def test_missing_patches_are_named(tmp_path: Path, code: str, missing: list[str]) -> None:
    program = f"from gevent import monkey\nfrom greenjobs import green\n{code}\nprint(*green.missing_patches())"

    assert processes.run("python", "-c", program, folder=tmp_path).split() == missing


def test_runner_refuses_a_process_that_is_not_cooperative(tmp_path: Path, database: running.Database) -> None:
    program = textwrap.dedent(
        """
        import greenjobs
        from greenjobs.errors import NotPatched

        @greenjobs.job
        def work(): ...

        try:
            greenjobs.Runner().register(work).start()
        except NotPatched as error:
            assert "greenjobs run" in str(error) and "socket" in str(error), error
        else:
            raise AssertionError("it started")
        """
    )
    processes.run("python", "-c", program, folder=tmp_path, database_url=database.url)


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_statements_of_many_greenlets_wait_at_the_same_time(database: running.Database) -> None:
    def sleep() -> None:
        connection = psycopg2.connect(database.url)
        try:
            connection.cursor().execute(_SLEEP)
        finally:
            connection.close()

    sleepers = [gevent.spawn(sleep) for _ in range(30)]
    _wait_until_active(database, 30)
    gevent.killall(sleepers)


# --- interrupting -----------------------------------------------------------------------------------------------------


class _Mine(BaseException): ...


@contextlib.contextmanager
def _sleeper(database: running.Database, sql: str = _SLEEP) -> Iterator[tuple[Any, Any, list[BaseException]]]:
    """A greenlet that waits for a statement, its connection, and what comes out of it."""
    connection = psycopg2.connect(database.url)
    connection.autocommit = True
    raised: list[BaseException] = []

    def sleep() -> None:
        try:
            connection.cursor().execute(sql)
        except BaseException as error:
            raised.append(error)

    greenlet = gevent.spawn(sleep)
    _wait_until_active(database, 1, sql)
    yield greenlet, connection, raised
    connection.close()


@pytest.mark.parametrize(
    "error",
    [gevent.GreenletExit(), gevent.Timeout(1), _Mine("mine"), KeyboardInterrupt(), ValueError("x")],
    ids=lambda error: type(error).__name__,
)
def test_what_interrupts_a_statement_comes_out_as_itself(database: running.Database, error: BaseException) -> None:
    with _sleeper(database) as (greenlet, _, raised):
        greenlet.kill(error, timeout=PATIENCE_SECONDS)

    assert raised == [error]


def test_interrupted_statement_is_stopped_on_the_server(database: running.Database) -> None:
    with _sleeper(database) as (greenlet, _, _raised):
        greenlet.kill(timeout=PATIENCE_SECONDS)
        _wait_until_active(database, 0)


def test_connection_of_an_interrupted_statement_is_closed(database: running.Database) -> None:
    with _sleeper(database) as (greenlet, connection, _):
        greenlet.kill(timeout=PATIENCE_SECONDS)

        assert connection.closed


def test_interrupted_insert_in_autocommit_is_not_written(database: running.Database) -> None:
    database.rows("CREATE TABLE notes (text TEXT)")
    with _sleeper(database, "INSERT INTO notes SELECT 'x' FROM pg_sleep(600)") as (greenlet, _, _raised):
        greenlet.kill(timeout=PATIENCE_SECONDS)
        eventually(lambda: not database.value(_OTHER_ACTIVE), "the insert goes on")

    assert database.rows("SELECT * FROM notes") == []


_OTHER_ACTIVE = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
    " AND pid <> pg_backend_pid()"
)


def test_timeout_around_a_statement_ends_it(database: running.Database) -> None:
    connection = psycopg2.connect(database.url)

    with pytest.raises(gevent.Timeout), gevent.Timeout(1):
        connection.cursor().execute(_SLEEP)

    _wait_until_active(database, 0)


def test_error_of_the_database_is_what_it_was(database: running.Database) -> None:
    connection = psycopg2.connect(database.url)
    with pytest.raises(psycopg2.errors.DivisionByZero):
        connection.cursor().execute("SELECT 1 / 0")
    connection.rollback()

    with connection.cursor() as cursor:
        cursor.execute("SELECT 5")
        assert cursor.fetchone() == (5,)
    connection.close()


def test_interrupted_while_it_connects_to_a_mute_server(database: running.Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        connecting = gevent.spawn(psycopg2.connect, f"postgresql://ann@127.0.0.1:{mute.getsockname()[1]}/shop")
        peer, _ = mute.accept()
        connecting.kill(timeout=PATIENCE_SECONDS)
        peer.close()

        assert connecting.dead


def test_statement_on_a_server_that_has_gone_mute_can_be_interrupted() -> None:
    """To stop the statement there, too, libpq opens another connection; nobody answers on that either."""
    with _server_that_goes_mute() as url:
        connection = psycopg2.connect(url)
        sleeper = gevent.spawn(connection.cursor().execute, "SELECT 1")
        gevent.idle()
        sleeper.kill(timeout=PATIENCE_SECONDS)

        assert sleeper.dead


@contextlib.contextmanager
def _server_that_goes_mute() -> Iterator[str]:
    """Enough of a PostgreSQL server to log in at; from then on it accepts everything and says nothing."""

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("!I", len(body) + 4) + body

    def serve() -> None:
        peer, _ = listening.accept()
        with peer:
            (length,) = struct.unpack("!I", peer.recv(4))
            peer.recv(length - 4)
            peer.sendall(
                message(b"R", struct.pack("!I", 0))
                + message(b"S", b"server_version\x0017.0\0")
                + message(b"S", b"client_encoding\0UTF8\0")
                + message(b"S", b"DateStyle\0ISO, MDY\0")
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
