"""Transactions, and notifications, of connections that commit each statement by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from psycopg2.extensions import cursor as TupleCursor  # whatever kind a caller's connection makes by itself

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


_TRANSACTION_ID = """
SELECT txid_current()
"""


def transaction_id(connection: Connection) -> int:
    """The number of the transaction of a caller's connection, which begins one if there is none."""
    with connection.cursor(cursor_factory=TupleCursor) as cursor:
        cursor.execute(_TRANSACTION_ID)
        (number,) = cursor.fetchone() or (0,)
    return int(number)
