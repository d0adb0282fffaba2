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
    """Make what is done on an autocommit connection inside one transaction; join the one that another has."""
    if not connection.autocommit:
        yield
        return
    connection.autocommit = False
    try:
        yield
    except BaseException:
        # What interrupts a statement closes the connection, which undoes the transaction. It has to come out as itself:
        # psycopg2's own `with connection:` would complain of the closed connection, and the end of a greenlet be taken
        # for a bad day of the database.
        if not connection.closed:
            connection.rollback()
        raise
    else:
        connection.commit()
    finally:
        if not connection.closed:
            connection.autocommit = True


# People wait longer for a look at a million rows than a view may wait for an enqueue.
_PATIENCE = "SET LOCAL statement_timeout = '120s'"


@contextlib.contextmanager
def patiently(connection: Connection) -> Iterator[None]:
    """A transaction, as of `atomic`, in which statements may take their time."""
    with atomic(connection):
        with connection.cursor() as cursor:
            cursor.execute(_PATIENCE)
        yield


@contextlib.contextmanager
def undone_alone(connection: Connection) -> Iterator[None]:
    """Have an error inside undo no more than the statement that it came from, in a transaction, too."""
    if connection.autocommit:
        yield
        return
    with connection.cursor() as cursor:
        cursor.execute("SAVEPOINT greenjobs_statement")
        try:
            yield
        except BaseException:
            if not connection.closed:  # as above
                cursor.execute("ROLLBACK TO SAVEPOINT greenjobs_statement")
            raise
        finally:
            if not connection.closed:
                cursor.execute("RELEASE SAVEPOINT greenjobs_statement")


_TRANSACTION_ID = """
SELECT txid_current()
"""


def transaction_id(connection: Connection) -> int:
    """The number of the transaction of a caller's connection, which begins one if there is none."""
    with connection.cursor(cursor_factory=TupleCursor) as cursor:
        cursor.execute(_TRANSACTION_ID)
        (number,) = cursor.fetchone() or (0,)
    return int(number)
