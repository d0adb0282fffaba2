"""Django, seen from outside: the driver's connection behind one of its database connections.

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
    base, proxies = sys.modules.get("django.db.backends.base.base"), sys.modules.get("django.utils.connection")
    if base is None:
        return None
    if proxies is not None and isinstance(given, proxies.ConnectionProxy):
        given = given._connections[given._alias]
    if not isinstance(given, base.BaseDatabaseWrapper):
        return None
    if given.vendor != "postgresql":
        raise OptionError(f"connection is Django's {given.alias!r}, which is {given.vendor}; allowed: PostgreSQL")
    given.validate_no_broken_transaction()
    given.ensure_connection()
    if not isinstance(given.connection, extensions.connection):
        driver = type(given.connection).__module__.partition(".")[0]
        raise OptionError(
            f"connection is Django's {given.alias!r}, whose driver is {driver}; allowed: psycopg2. Enqueue after the "
            f"commit instead, by transaction.on_commit"
        )
    return given.connection
