"""What a runner and its job processes say to one another: JSON objects, each after its length. No pickles."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

_LENGTH_BYTES = 8


def pack(message: Mapping[str, Any]) -> bytes:
    """The bytes of a message."""
    data = json.dumps(message).encode()  # all ASCII, whatever the texts have in them
    return len(data).to_bytes(_LENGTH_BYTES, "big") + data


def unpack(read: Callable[[int], bytes]) -> dict[str, Any] | None:
    """The next message, read by `read(at_most)`; None when the other side is gone, in the middle of one, too."""
    head = _exactly(_LENGTH_BYTES, read)
    data = head and _exactly(int.from_bytes(head, "big"), read)
    return None if data is None else dict(json.loads(data))


def _exactly(count: int, read: Callable[[int], bytes]) -> bytes | None:
    parts: list[bytes] = []
    while count:
        try:
            part = read(min(count, 2**20))
        except OSError:
            return None
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
