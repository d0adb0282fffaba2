"""A small HTTP server for looking, not for touching: GET and HEAD of a handful of paths, which change nothing.

It is what a runner and a supervisor answer probes with. In a process that gevent has patched its threads are greenlets;
in a supervisor, which is light, they are threads. It holds a bounded number of connections: whoever comes when there
are as many takes the place of the one that has been there longest, so that clients that dawdle keep nobody out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from greenjobs.address import Address, bound_address, is_loopback

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 32

# How long a client may take to send the next part of its request, or to take the next part of the answer.
_CLIENT_SECONDS = 5.0

# When no connection can be taken, as when all file descriptors are in use.
_PAUSE_SECONDS = 0.1

_MOST_UNWANTED_BYTES = 65_536

NOT_FROM_AFAR = (
    "/jobs shows stacks, and is for this machine alone: ask there, at a Unix socket, or through `kubectl port-forward` "
    "or `ssh -L`"
)

# Who speaks for others says so, in one of these.
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent: a status of HTTP, and a body."""

    status: int
    body: bytes
    content_type: str = "application/json"

    @classmethod
    def of(cls, document: Any, status: int = HTTPStatus.OK) -> Answer:
        """One of JSON."""
        return cls(status, json.dumps(document, indent=2).encode() + b"\n")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. `is_from_here` says that somebody on this machine asks, for himself and no one else."""

    path: str
    is_from_here: bool


Route = Callable[[Request], Answer]


class Server:
    """Answers at an address, from its making on until it is closed. Raises ConfigError when it cannot listen there."""

    def __init__(self, address: Address, routes: Mapping[str, Route]) -> None:
        self._routes = routes
        self._listener = address.listen()
        self.address = bound_address(self._listener)
        """Where it listens, with the port that it got."""
        self._identity = self._identity_of_path()
        # The oldest first; those that are being served.
        self._connections: dict[socket.socket, None] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        threading.Thread(target=self._accept_for_ever, name="greenjobs http", daemon=True).start()

    def close(self) -> None:
        """Listen no more, and hang up on whoever is being served; a socket's path is removed."""
        self._is_closed = True
        # Before the path is gone: another process may take it over from then on.
        if self.address.path is not None and self._identity_of_path() == self._identity:
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in accept
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            _hang_up(connection)

    def answer(self, request: Request) -> Answer:
        """The answer to what is asked."""
        route = self._routes.get(request.path)
        if route is None:
            return Answer.of({"error": f"there is no {request.path}", "paths": list(self._routes)}, 404)
        try:
            return route(request)
        except Exception:
            logger.exception("cannot answer %s", request.path)
            return Answer.of({"error": "that went wrong; the log of the process says how"}, 500)

    def _identity_of_path(self) -> tuple[int, int] | None:
        if self.address.path is None:
            return None
        with contextlib.suppress(OSError):
            status = os.stat(self.address.path)
            return status.st_dev, status.st_ino
        return None

    def _accept_for_ever(self) -> None:
        while not self._is_closed:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                if not self._is_closed:
                    time.sleep(_PAUSE_SECONDS)
                continue
            self._make_room()
            with self._lock:
                self._connections[connection] = None
            serving = threading.Thread(target=self._serve, args=(connection, peer), name="greenjobs http", daemon=True)
            try:
                serving.start()
            except RuntimeError:  # the system allows no more threads
                self._forget(connection)

    def _make_room(self) -> None:
        with self._lock:
            if len(self._connections) < MOST_CONNECTIONS:
                return
            oldest = next(iter(self._connections))
            del self._connections[oldest]
        _hang_up(oldest)

    def _serve(self, connection: socket.socket, peer: Any) -> None:
        try:
            with contextlib.suppress(OSError):  # the client is gone, or too slow
                _Handler(connection, peer, self)  # type: ignore[arg-type]  # what it wants of a server it has here
        finally:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.pop(connection, None)
        connection.close()


def warn_of_openness(address: Address) -> None:
    """Say that others can reach it."""
    logger.warning(
        "http is %s: whoever reaches that reads how this runner is, and its metrics; /jobs, with stacks, is answered "
        "to this machine only",
        address,
    )


class _Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0: the connection ends with the answer, which nobody has to be counted for any longer."""

    timeout = _CLIENT_SECONDS
    error_message_format = "%(message)s\n"
    error_content_type = "text/plain; charset=utf-8"
    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        """Answer with a body."""
        self._send(self._answer(), with_body=True)

    def do_HEAD(self) -> None:
        """Answer without one."""
        self._send(self._answer(), with_body=False)

    def __getattr__(self, name: str) -> Any:
        # What the class under this looks for when it has read a method that is not one of the two above.
        if name.startswith("do_"):
            return self._refuse
        raise AttributeError(name)

    def _answer(self) -> Answer:
        try:
            path = urlsplit(self.path).path
        except ValueError as error:
            return Answer.of({"error": f"that is no URL: {error}"}, HTTPStatus.BAD_REQUEST)
        return self.server.answer(Request(path.rstrip("/") or "/", self._is_from_here()))

    def _refuse(self) -> None:
        # What has been sent is read, lest the end of the connection overtakes the answer.
        length = self.headers.get("Content-Length", "0")
        if length.isdecimal():
            self.rfile.read(min(int(length), _MOST_UNWANTED_BYTES))
        self._send(Answer.of({"error": "only GET and HEAD: nothing can be changed here"}, 405), with_body=True)

    def _is_from_here(self) -> bool:
        """Whether the other end is on this machine, and no door for others: a proxy, or a browser that was led here by
        a foreign page, whose name the request bears then."""
        if self.server.address.path is not None:
            return True
        host = self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname if host else ""
        except ValueError:
            return False
        return (
            is_loopback(self.client_address[0])
            and (not name or is_loopback(name))
            and not any(header in self.headers for header in _PROXY_HEADERS)
        )

    def _send(self, answer: Answer, *, with_body: bool) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if with_body:
            self.wfile.write(answer.body)

    def version_string(self) -> str:
        """Who answers; not which Python."""
        return "greenjobs"

    def address_string(self) -> str:
        """Who asks, for the log."""
        return str(self.client_address[0]) if self.client_address else "unix"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Probes come every few seconds: nobody wants to read of them."""
        logger.debug("http: %s: %s", self.address_string(), format % arguments)


def _hang_up(connection: socket.socket) -> None:
    """End a connection under the hands of whoever serves it, who closes it then."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
