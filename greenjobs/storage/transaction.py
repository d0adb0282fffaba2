"""Transactions, and notifications, of connections that commit each statement by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


CHANNEL = "greenjobs"


@contextlib.contextmanager
def atomic(connection: Connection) -> Iterator[None]:
    """Make what is done on an autocommit connection inside one transaction."""
    connection.autocommit = False
    try:
        with connection:
            yield
    finally:
        if not connection.closed:
            connection.autocommit = True
