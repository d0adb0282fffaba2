"""A pooler such as PgBouncer, as far as psycopg2 can tell: in transaction mode, or one that keeps sessions.

It speaks the wire protocol of PostgreSQL, of which psycopg2 uses the simple queries alone. Every client gets a key of
the pooler's own; in transaction mode it has the session of the server that came back last, until its transaction ends.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import gevent
from gevent.server import StreamServer
from psycopg2 import extensions

_REFUSED_REQUESTS = (80877103, 80877104)  # TLS, and GSSAPI
_CANCEL_REQUEST = 80877102
_DONE_AUTHENTICATIONS = (0, 12)


@contextlib.contextmanager
def in_front_of(database_url: str, *, keeps_sessions: bool = False) -> Iterator[str]:
    """The URL by which the database is reached through the pooler."""
    given = dict(extensions.parse_dsn(database_url))
    pooler = _Pooler(given, keeps_sessions=keeps_sessions)
    server = StreamServer(("127.0.0.1", 0), pooler.serve)
    server.start()
    try:
        way = {"host": "127.0.0.1", "port": str(server.server_port), "sslmode": "disable"}
        yield str(extensions.make_dsn(**{**given, **way}))
    finally:
        server.stop()
        pooler.close()


class _Pooler:
    def __init__(self, given: dict[str, str], *, keeps_sessions: bool) -> None:
        self._given = given
        self._keeps_sessions = keeps_sessions
        self._opened: list[socket.socket] = []
        self._idle: list[socket.socket] = []
        self._clients = 0

    def close(self) -> None:
        for backend in self._opened:
            backend.close()

    def serve(self, client: socket.socket, address: object) -> None:
        with contextlib.suppress(OSError, EOFError):
            startup = _read_startup(client)
            if startup:
                self._greet(client, startup)

    def _greet(self, client: socket.socket, startup: bytes) -> None:
        backend = self._open()
        backend.sendall(startup)
        self._clients += 1
        while True:
            kind, body = _read_message(backend)
            if kind == b"K":  # the key by which a statement is cancelled
                body = struct.pack("!I", self._clients) + body[4:]
            _send(client, kind, body)
            if kind == b"R" and struct.unpack("!I", body[:4])[0] not in _DONE_AUTHENTICATIONS:
                _send(backend, *_read_message(client))
            if kind == b"Z":
                break
        if self._keeps_sessions:
            gevent.joinall([gevent.spawn(_copy, client, backend), gevent.spawn(_copy, backend, client)], count=1)
        else:
            self._idle.append(backend)
            self._share(client)

    def _share(self, client: socket.socket) -> None:
        held: socket.socket | None = None
        while True:
            kind, body = _read_message(client)
            if kind == b"X":
                return
            backend = held or self._idle.pop()
            _send(backend, kind, body)
            kind = b""
            while kind != b"Z":
                kind, body = _read_message(backend)
                _send(client, kind, body)
            held = None if body == b"I" else backend
            if held is None:
                self._idle.append(backend)

    def _open(self) -> socket.socket:
        host, port = self._given.get("host", "localhost"), self._given.get("port", "5432")
        if host.startswith("/"):
            backend = socket.socket(socket.AF_UNIX)
            backend.connect(f"{host}/.s.PGSQL.{port}")
        else:
            backend = socket.create_connection((host, int(port)))
        self._opened.append(backend)
        return backend


def _read_startup(client: socket.socket) -> bytes:
    """The first message of a client that wants a session; empty for one that only wants to cancel something."""
    while True:
        length = _read(client, 4)
        body = _read(client, struct.unpack("!I", length)[0] - 4)
        (code,) = struct.unpack("!I", body[:4])
        if code == _CANCEL_REQUEST:
            return b""
        if code not in _REFUSED_REQUESTS:
            return length + body
        client.sendall(b"N")


def _read_message(source: socket.socket) -> tuple[bytes, bytes]:
    header = _read(source, 5)
    return header[:1], _read(source, struct.unpack("!I", header[1:])[0] - 4)


def _send(target: socket.socket, kind: bytes, body: bytes) -> None:
    target.sendall(kind + struct.pack("!I", len(body) + 4) + body)


def _read(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = source.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
