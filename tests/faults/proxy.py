"""A network between runner and server that can fail: a TCP proxy that falls silent, as a cable does.

Nobody is told. A connection through it stays open on both sides; what is sent arrives nowhere, and whoever connects
waits. `forget_clients` is what a server does that has given its silent clients up.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

_BYTES_AT_ONCE = 65536

# Linger for no time: closing resets the connection (SO_LINGER in socket(7)).
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Made by `opened`; leads to a port of this machine."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._flows = threading.Event()
        self._flows.set()
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._start(self._accept)

    def cut(self) -> None:
        """Let nothing through from now on, in neither direction."""
        self._flows.clear()

    def forget_clients(self) -> int:
        """End the connections on the server's side, of which the clients hear nothing; returns how many there were."""
        with self._lock:
            for _, server in self._pairs:
                _reset(server)
            return len(self._pairs)

    def mend(self) -> None:
        """Let everything through again, what was held up, too; whom the server has forgotten is told so."""
        self._flows.set()

    def close(self) -> None:
        self._listener.close()
        with self._lock:
            for pair in self._pairs:
                for end in pair:
                    _reset(end)
        self._flows.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        self._flows.wait()
        try:
            server = socket.create_connection(self._target)
        except OSError:
            _reset(client)
            return
        with self._lock:
            self._pairs.append((client, server))
        self._start(self._pump, client, server)
        self._pump(server, client)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_BYTES_AT_ONCE):
                self._flows.wait()
                sink.sendall(data)
        # That one side has gone does not get through a cut either.
        self._flows.wait()
        with self._lock:
            self._pairs = [pair for pair in self._pairs if source not in pair]
        _reset(source)
        _reset(sink)

    def _start(self, work: object, *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()  # type: ignore[arg-type]


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextlib.contextmanager
def opened(target_port: int) -> Iterator[Proxy]:
    """A proxy to a port of this machine."""
    proxy = Proxy(target_port)
    try:
        yield proxy
    finally:
        proxy.close()
