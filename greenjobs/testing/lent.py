"""What is lent to the code of jobs in a test that has a transaction: a part of that, not a connection of the pool.

A savepoint is where a connection of its own would have begun its transaction; to commit is to leave what was done since
to the transaction of the test, to roll back is to undo it. There is one connection behind it all, so that whatever else
the test's process does on it in the meantime is undone as well.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any, cast

import psycopg2
from psycopg2 import extensions, extras

from greenjobs.current import attempt_here
from greenjobs.errors import OptionError
from greenjobs.lending import refuse_to_end
from greenjobs.storage import rehearsal
from greenjobs.testing.ledger import is_aborted

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

logger = logging.getLogger(__name__)

_numbers = itertools.count(1)

_UNCLAIMED = rehearsal.Claim(0, 0)

_OF_THE_SESSION = frozenset({"autocommit", "isolation_level", "readonly", "deferrable"})


class PlainCursor(extensions.cursor):
    """Returns tuples, and JSON as Python has it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Django has the connections of its own leave jsonb as text.
        extras.register_default_jsonb(self)


def plain_rows(connection: Connection) -> Connection:
    """The connection, with cursors that return tuples, and JSON as Python has it, whatever its owner has chosen.

    It is left as it is: the threads of a live server may use it at the same time.
    """
    return cast("Connection", _PlainRows(connection))


class _PlainRows:
    __slots__ = ("__weakref__", "_connection")

    _connection: Connection

    def __init__(self, connection: Connection) -> None:
        object.__setattr__(self, "_connection", connection)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._connection)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._connection, name, value)

    def cursor(self, name: str | None = None, cursor_factory: Any = PlainCursor, **options: Any) -> Any:
        return self._connection.cursor(name, cursor_factory=cursor_factory, **options)


class SharedPool:
    """Stands for a lending.JobPool, and lends no connection but that of the test, as often as it is asked."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def take(self) -> SharedConnection:
        """Begin a part of the transaction."""
        attempt = attempt_here()
        if attempt is None or not attempt.place.runner_ids:
            return SharedConnection(self._connection, _UNCLAIMED)
        return SharedConnection(self._connection, rehearsal.Claim(attempt.row.id, attempt.place.runner_ids[0]))

    def give_back(self, connection: SharedConnection) -> None:
        """End it; what was not committed is undone."""
        connection.close()

    def close(self) -> None:
        """Nothing, for it is the test's."""


class SharedConnection:
    """What a psycopg2 connection would be that had a transaction of its own, within that of the test's connection.

    Cursors are psycopg2's, of the test's connection. Only what it is in C does not come with it: such as
    `Composed.as_string()` and `register_type()` have to be given a cursor.
    """

    __slots__ = (
        "__weakref__",
        "_claim",
        "_connection",
        "_is_closed",
        "_mark",
        "_name",
        "cursor_factory",
        "is_completing",
    )

    def __init__(self, connection: Connection, claim: rehearsal.Claim) -> None:
        self._connection = connection
        self._claim = claim
        self._name = f"greenjobs_lent_{next(_numbers)}"
        self._is_closed = False
        self.is_completing = False
        self.cursor_factory: Any = None
        self._begin()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # For those who ask whether it is a connection of psycopg2.
        return type(self._connection)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def __enter__(self) -> SharedConnection:  # noqa: PYI034  # Self is not in Python 3.10
        self._require_open()
        return self

    def __exit__(self, error_type: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.commit()
        else:
            self.rollback()

    @property
    def closed(self) -> int:
        """As psycopg2 has it: 0 while it is open."""
        return int(self._is_closed) or self._connection.closed

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_THE_SESSION:
            self.set_session(value)
        else:
            object.__setattr__(self, name, value)

    def set_session(self, *args: Any, **options: Any) -> None:
        """Refused, unless nothing is to be changed: the session is the test's, in the middle of a transaction."""
        if any(value and value != "default" for value in (*args, *options.values())):
            raise OptionError(
                "what greenjobs lends in a test that is using a connection is a part of its transaction, which has "
                "begun: it has neither autocommit nor an isolation level of its own; run this without testing.using"
            )

    set_isolation_level = set_session

    def cursor(self, name: str | None = None, cursor_factory: Any = None, **options: Any) -> Any:
        """As psycopg2's; of tuples, unless they are wanted otherwise."""
        self._require_open()
        factory = cursor_factory or self.cursor_factory or PlainCursor
        return self._connection.cursor(name, cursor_factory=factory, **options)

    def commit(self) -> None:
        """Leave what was done so far to the transaction of the test; undo it, as PostgreSQL does, if it has failed."""
        self._require_open()
        refuse_to_end(self, "commit")
        if is_aborted(self._connection):
            self._undo()
        else:
            rehearsal.drop_savepoint(plain_rows(self._connection), self._claim, self._mark, self._name)
        self._begin()

    def rollback(self) -> None:
        """Undo what was done since it was committed last, or taken."""
        self._require_open()
        refuse_to_end(self, "rollback")
        self._undo()
        self._begin()

    def close(self) -> None:
        """End it; what was not committed is undone. The test's connection stays open."""
        if self.closed:
            return
        self._is_closed = True
        try:
            self._undo()
        except psycopg2.Error as error:  # whoever ended the whole transaction is told so by drain
            logger.debug("rolling back failed: %s", error)

    def _begin(self) -> None:
        self._mark = rehearsal.set_savepoint(plain_rows(self._connection), self._claim, self._name)

    def _undo(self) -> None:
        connection = plain_rows(self._connection)
        rehearsal.back_to_savepoint(connection, self._name)
        rehearsal.forget_savepoint(connection, self._name)

    def _require_open(self) -> None:
        if self.closed:
            raise psycopg2.InterfaceError("connection already closed")
