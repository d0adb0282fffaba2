"""Asking at an address, which may be a Unix socket: what a supervisor asks of its processes, and `greenjobs health`."""

from __future__ import annotations

import http.client

from greenjobs.address import Address, is_loopback


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: Address, timeout: float) -> None:
        host = "localhost" if address.path is not None or is_loopback(address.host_to_ask) else address.host
        super().__init__(host, timeout=timeout)
        self._address = address
        self._seconds = timeout

    def connect(self) -> None:
        """Connect there."""
        self.sock = self._address.connect(self._seconds)


def fetch(address: Address, path: str, *, timeout: float) -> tuple[int, str, bytes]:
    """GET a path: status, content type and body. Raises OSError when nobody answers in time, or not in HTTP."""
    connection = _Connection(address, timeout)
    try:
        connection.request("GET", path, headers={"Accept": "*/*"})
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type", ""), response.read()
    except http.client.HTTPException as error:
        raise OSError(f"no answer of HTTP: {error!r}") from error
    finally:
        connection.close()
