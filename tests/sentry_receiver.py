"""A server that takes what Sentry's SDK sends, over HTTP, and shows it to a test."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any

from gevent.pywsgi import WSGIServer
from waiting import eventually

PATIENCE_SECONDS = 60.0


class Receiver:
    """What has arrived: the items of all envelopes, each with its type, in order."""

    def __init__(self) -> None:
        self.items: list[tuple[str, dict[str, Any]]] = []
        self.dsn = ""

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """The payloads of all items of this type, such as event, transaction or check_in."""
        return [payload for type, payload in self.items if type == kind]

    def errors(self, **tags: str) -> list[dict[str, Any]]:
        """The events of errors and messages that have these tags."""
        return [event for event in self.of_type("event") if tags.items() <= dict(event.get("tags") or {}).items()]

    def transactions(self, name: str) -> list[dict[str, Any]]:
        return [each for each in self.of_type("transaction") if each["transaction"] == name]

    def wait_for(self, count: int, look: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Block until at least so many are seen; returns them."""
        eventually(
            lambda: len(look()) >= count, f"{count} items have not arrived: {self.types()}", seconds=PATIENCE_SECONDS
        )
        return look()

    def types(self) -> list[str]:
        return [kind for kind, _ in self.items]

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"].read()
        if environ.get("HTTP_CONTENT_ENCODING") == "gzip":
            body = gzip.decompress(body)
        self.items += _items(body)
        start_response("200 OK", [("Content-Type", "application/json")])
        return [b"{}"]


def _items(envelope: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """See https://develop.sentry.dev/sdk/envelopes/"""
    _, _, rest = envelope.partition(b"\n")
    while rest:
        line, _, rest = rest.partition(b"\n")
        header = json.loads(line)
        length = header.get("length")
        if length is None:
            payload, _, rest = rest.partition(b"\n")
        else:
            payload, rest = rest[:length], rest[length:].lstrip(b"\n")
        yield header["type"], json.loads(payload)


@contextlib.contextmanager
def receiver() -> Iterator[Receiver]:
    """One that listens until the end of the block; it answers while the test waits."""
    taken = Receiver()
    server = WSGIServer(("127.0.0.1", 0), taken, log=None)
    server.start()
    taken.dsn = f"http://key@127.0.0.1:{server.server_port}/1"
    try:
        yield taken
    finally:
        server.stop()
