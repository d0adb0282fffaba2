"""Addresses to listen on and to ask at: of TCP, of IPv6 in brackets, and paths of Unix sockets.

    127.0.0.1:9600   [::1]:9600   9600, which is 127.0.0.1:9600   unix:/run/greenjobs/http.sock

Nothing here knows of HTTP, and nothing is imported that a supervisor has no use for.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
from dataclasses import dataclass

from greenjobs.errors import ConfigError

LOOPBACK = "127.0.0.1"

# sun_path has 108 bytes on Linux and 104 elsewhere, with the zero at its end.
LONGEST_PATH = 103

ALLOWED = (
    '"HOST:PORT", "[IPv6]:PORT", a port alone, which is one of 127.0.0.1, or "unix:" and an absolute path, not '
    f"longer than {LONGEST_PATH} bytes; ports are from 0, which is any free one, to 65535"
)

_HOST_AND_PORT = re.compile(
    r"(?:(?:\[(?P<v6>[\w:.%]+)\]|(?P<host>[^\s:/\[\]]+))?:)?(?P<port>\d{1,5})",
    re.ASCII,
)

# Whoever wants to be served finds room here while earlier ones are.
_BACKLOG = 64


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen or to ask: a host and a port, or the path of a Unix socket."""

    host: str = LOOPBACK
    port: int = 0
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that a text names; raises ValueError when it names none, see ALLOWED."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not os.path.isabs(path) or path.endswith("/") or not path.isprintable():
                raise ValueError
            if len(os.fsencode(path)) > LONGEST_PATH:
                raise ValueError
            return cls(path=path)
        match = _HOST_AND_PORT.fullmatch(text)
        if match is None or int(match["port"]) > 65_535:
            raise ValueError
        if match["v6"]:
            ipaddress.IPv6Address(match["v6"])
        return cls(match["v6"] or match["host"] or LOOPBACK, int(match["port"]))

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it: a Unix socket, or a name or number of the loopback."""
        return self.path is not None or is_loopback(self.host)

    @property
    def host_to_ask(self) -> str:
        """The host by which it is found from here: who listens everywhere listens here, too."""
        return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)

    def listen(self) -> socket.socket:
        """A socket that listens here; raises ConfigError when that cannot be."""
        try:
            return self._listen_at_path(self.path) if self.path is not None else self._listen_at_port()
        except OSError as error:
            why = str(error.strerror or error).partition(" (while ")[0]  # which repeats the address
            message = f"http is {self}: cannot listen there: {why}{_way_out(error)}"
        raise ConfigError(message)

    def connect(self, timeout: float) -> socket.socket:
        """A connection to whoever listens here; waits `timeout` seconds at most, and raises OSError."""
        if self.path is None:
            return socket.create_connection((self.host_to_ask, self.port), timeout)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _listen_at_port(self) -> socket.socket:
        family, _, _, _, place = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        # Whoever says "everywhere" does not mean to leave out the older half.
        both = self.host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(place[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=both)

    def _listen_at_path(self, path: str) -> socket.socket:
        self._remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            # Before it listens: nobody gets in in between. The folder decides about the rest.
            os.chmod(path, 0o660)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    def _remove_stale(self, path: str) -> None:
        """Remove a socket on which nobody listens any more, which would be in the way."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.EEXIST, "there is something else than a socket")
            try:
                self.connect(1.0).close()
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def is_loopback(host: str) -> bool:
    """Whether a name or a number is of this machine alone."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def bound_address(listener: socket.socket) -> Address:
    """Where a listening socket is found, with the port that it got."""
    if listener.family == socket.AF_UNIX:
        return Address(path=str(listener.getsockname()))
    host, port, *_ = listener.getsockname()
    return Address(host, port)


def _way_out(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "; another process does, perhaps another `greenjobs run`: end it, or give this one another address"
    if error.errno == errno.EACCES:
        return "; ports below 1024 and folders of others need rights that this process does not have"
    return ""
