"""Waiting for facts that come about in another process, where there is no event to wait on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.01


def eventually(condition: Callable[[], T], message: str, *, seconds: float = 60.0) -> T:
    """Return the first true value of the condition; fail with the message and its last value after the deadline.

    The deadline only bounds a failing test, and a machine that others use may stand still for long: a passing test does
    not pay for it.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{message} (not so after {seconds:g} s; last seen: {value!r})"
        time.sleep(_POLL_SECONDS)
    return value
