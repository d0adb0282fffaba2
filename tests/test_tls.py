"""TLS between greenjobs and its database: what the URL asks of libpq holds for every connection, cancels included.

The private server of these tests has no TLS, so a proxy ends it: to libpq it is a server that has a certificate.
"""

from __future__ import annotations

import contextlib
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gevent
import pytest
import running
import trustme
from gevent import socket
from gevent.server import StreamServer
from psycopg2 import extensions
from waiting import eventually

import greenjobs
from greenjobs import job
from greenjobs.errors import DatabaseUnavailable, JobHardTimeout
from greenjobs.runner import Runner

# The codes of the first message of a connection (pqcomm.h).
_SSL_REQUEST = 80877103
_CANCEL_REQUEST = 80877102


class TlsServer:
    """Ends TLS, and passes on what comes. `cancels` and `in_clear` count connections of these kinds."""

    def __init__(self, target: tuple[Any, ...], certificate: trustme.LeafCert) -> None:
        self._family, self._address = target
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self._context)
        self.encrypted = self.cancels = self.in_clear = 0
        self._server = StreamServer(("127.0.0.1", 0), self._serve)
        self._server.start()
        self.port: int = self._server.server_port

    def stop(self) -> None:
        self._server.stop(timeout=0)

    def _serve(self, client: socket.socket, _: Any) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(client)
            first = _read(client, 8)
            if struct.unpack("!ii", first)[1] != _SSL_REQUEST:
                self.in_clear += 1
                return
            client.sendall(b"S")
            tls = stack.enter_context(self._context.wrap_socket(client, server_side=True))
            first = _read(tls, 8)
            self.encrypted += 1
            self.cancels += struct.unpack("!ii", first)[1] == _CANCEL_REQUEST
            server = stack.enter_context(socket.socket(self._family))
            server.connect(self._address)
            server.sendall(first)
            _join(tls, server)


def _read(source: Any, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = source.recv(count - len(data))
        if not more:
            raise OSError("closed")
        data += more
    return data


def _join(one: Any, other: Any) -> None:
    def pass_on(source: Any, target: Any) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.close()

    gevent.joinall([gevent.spawn(pass_on, one, other), gevent.spawn(pass_on, other, one)])


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(database_url: str, authority: trustme.CA) -> Iterator[TlsServer]:
    given = extensions.parse_dsn(database_url)
    host, port = given.get("host", "localhost"), given.get("port", "5432")
    target = (
        (socket.AF_UNIX, f"{host}/.s.PGSQL.{port}") if host.startswith("/") else (socket.AF_INET, (host, int(port)))
    )
    server = TlsServer(target, authority.issue_cert("localhost"))
    yield server
    server.stop()


def url_through(tls: TlsServer, database_url: str, **options: str) -> str:
    given = extensions.parse_dsn(database_url)
    login = given["user"] + (f":{quote(given['password'])}" if "password" in given else "")
    query = "&".join(f"{name}={quote(value)}" for name, value in options.items())
    return f"postgresql://{login}@localhost:{tls.port}/{given['dbname']}?hostaddr=127.0.0.1&{query}"


@pytest.fixture
def root_certificate(authority: trustme.CA, tmp_path: Path) -> str:
    file = tmp_path / "root.pem"
    authority.cert_pem.write_to_path(str(file))
    return str(file)


def test_everything_goes_over_tls_where_the_url_says_so_cancels_too(
    tls: TlsServer, database_url: str, root_certificate: str
) -> None:
    url = url_through(tls, database_url, sslmode="verify-full", sslrootcert=root_certificate)
    interrupted = []

    with running.application(url, max_retries=0) as database:

        @job
        def stuck() -> None:
            try:
                with greenjobs.connection() as connection, connection.cursor() as cursor:
                    cursor.execute("SELECT pg_sleep(600)")
            except BaseException as error:
                interrupted.append(error)
                raise

        stuck.delay()
        sleeps = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND state = 'active' AND query LIKE 'SELECT pg_sleep(600)%'"
        )
        with running.started(Runner().register(stuck)) as handle:
            eventually(lambda: database.value(sleeps) == 1, "it does not come to it")
            handle.workers["default"].interrupt_all(lambda: JobHardTimeout("its time is up"))
            database.wait_for("state = 'failed'")
        assert interrupted
        eventually(lambda: database.value(sleeps) == 0, "the statement goes on")
    assert tls.encrypted >= 5  # session, service, enqueue, the job's own, and the one that cancels
    assert tls.in_clear == 0
    if extensions.libpq_version() >= 170000:
        assert tls.cancels == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sslmode": "verify-full", "sslrootcert": "another"}, "certificate verify failed"),
        (
            {"sslmode": "verify-full", "sslrootcert": "ours", "hostaddr": "127.0.0.1", "host": "elsewhere"},
            "does not match",
        ),
        ({"sslmode": "verify-full", "sslrootcert": "/nowhere.pem"}, "does not exist"),
    ],
)
def test_server_that_is_not_who_it_should_be_is_not_talked_to(
    options: dict[str, str],
    complaint: str,
    tls: TlsServer,
    database_url: str,
    root_certificate: str,
    tmp_path: Path,
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    files = {"another": str(other), "ours": root_certificate}
    options = {name: files.get(value, value) for name, value in options.items()}
    url = url_through(tls, database_url, **options)
    if "host" in options:
        url = url.replace("@localhost:", "@elsewhere:").replace("&host=elsewhere", "")
    with running_configured(url), pytest.raises(DatabaseUnavailable, match=complaint):
        never.delay()


def test_server_without_tls_is_not_talked_to_where_the_url_wants_it(database_url: str) -> None:
    def refuse(client: socket.socket, _: Any) -> None:
        _read(client, 8)
        client.sendall(b"N")
        client.recv(1)
        client.close()

    server = StreamServer(("127.0.0.1", 0), refuse)
    server.start()
    url = f"postgresql://postgres@127.0.0.1:{server.server_port}/shop?sslmode=require"
    with running_configured(url), pytest.raises(DatabaseUnavailable, match="does not support SSL"):
        never.delay()
    server.stop(timeout=0)


@job(name="tls_never")
def never() -> None: ...


@contextlib.contextmanager
def running_configured(url: str) -> Iterator[None]:
    greenjobs.configure(database_url=url, enqueue_timeout=60)
    try:
        yield
    finally:
        greenjobs.configure()
