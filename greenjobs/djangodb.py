"""Django, seen from outside: the driver's connection behind one of its database connections, and its transactions.

Nothing here imports it: what a caller hands over can only be one of its objects where it has been loaded.
"""

from __future__ import annotations

import sys
from typing import Any

from psycopg2 import extensions

from greenjobs.errors import OptionError


def driver_connection(given: Any) -> Any:
    """The driver's connection behind `django.db.connection` or one of `connections`; None for anything else.

    It is opened if it is not open, and in the transaction that is open, be it of `atomic()`. Raises OptionError where
    the driver is not psycopg2, and Django's own errors, as where that transaction has failed.
    """
    wrapper = _wrapper(given)
    if wrapper is None:
        return None
    if wrapper.vendor != "postgresql":
        raise OptionError(f"connection is Django's {wrapper.alias!r}, which is {wrapper.vendor}; allowed: PostgreSQL")
    wrapper.validate_no_broken_transaction()
    wrapper.ensure_connection()
    if not isinstance(wrapper.connection, extensions.connection):
        driver = type(wrapper.connection).__module__.partition(".")[0]
        raise OptionError(
            f"connection is Django's {wrapper.alias!r}, whose driver is {driver}; allowed: psycopg2. Enqueue after the "
            f"commit instead, by transaction.on_commit"
        )
    return wrapper.connection


def begin(given: Any) -> AtomicBlock | None:
    """Begin a block of `atomic()` on a connection of Django's; None for anything else. Raises as driver_connection, and
    RuntimeError inside another such block, which alone could commit.
    """
    wrapper = _wrapper(given)
    if wrapper is None:
        return None
    driver_connection(wrapper)
    return AtomicBlock(wrapper)


class AtomicBlock:
    """A transaction of Django's that is open. It ends once, whatever is said to it later."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._block = sys.modules["django.db.transaction"].Atomic(wrapper.alias, savepoint=True, durable=True)
        self._block.__enter__()

    def commit(self) -> None:
        """Commit, and call what waits for that."""
        self._end()

    def rollback(self) -> None:
        """Roll back."""
        if self._block is not None:
            self._wrapper.set_rollback(True)
            self._end()

    def _end(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)


def _wrapper(given: Any) -> Any:
    base, proxies = sys.modules.get("django.db.backends.base.base"), sys.modules.get("django.utils.connection")
    if base is None:
        return None
    if proxies is not None and isinstance(given, proxies.ConnectionProxy):
        given = given._connections[given._alias]
    return given if isinstance(given, base.BaseDatabaseWrapper) else None
