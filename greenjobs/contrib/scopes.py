"""Whose settings and whose transaction count where a job is enqueued, when several applications share a process.

An application that is active says so by itself: Flask in its context, a WSGI application in its request. The one that
is closest to the code is asked first, and one that has nothing to say leaves it to the next.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from greenjobs import config, current

# From the inside outwards: a context of Flask's is pushed in a request, and Django is there all the time.
FLASK, WSGI, DJANGO = range(3)


@dataclass(frozen=True, order=True)
class Scope:
    """What applications of one kind answer: their settings, and what to enqueue on, as `current.ambient` does."""

    place: int
    settings: Callable[[], config.Settings | None] = field(compare=False)
    connection: Callable[[str, str], Any] = field(compare=False)


_scopes: list[Scope] = []


def install(scope: Scope) -> None:
    """Have it asked from now on; again is harmless."""
    if scope not in _scopes:
        bisect.insort(_scopes, scope)
    # The only one is asked without a detour.
    only = scope if _scopes == [scope] else None
    config.scoped = only.settings if only else _settings
    current.ambient = only.connection if only else _connection


def remove(scope: Scope) -> None:
    """Ask it no more."""
    if scope in _scopes:
        _scopes.remove(scope)
    config.scoped = _settings if _scopes else None
    current.ambient = _connection if _scopes else None


def _settings() -> config.Settings | None:
    return next((found for scope in _scopes if (found := scope.settings()) is not None), None)


def _connection(database_url: str, job: str) -> Any:
    for scope in _scopes:
        connection = scope.connection(database_url, job)
        if connection is not None:
            return connection
    return None
