"""SQLAlchemy, seen from outside: the driver's connection behind one of its connections or sessions.

Nothing here imports it: what a caller hands over can only be one of its objects where it has been loaded. 1.4 and 2.x.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from greenjobs.errors import OptionError

ALLOWED = (
    "allowed: a psycopg2 connection or cursor, or a SQLAlchemy Connection, Session or scoped_session of an engine of "
    "postgresql+psycopg2, or a connection of Django's over psycopg2"
)


def driver_connection(given: Any) -> Any:
    """The driver's connection behind a SQLAlchemy Connection, Session or scoped_session, or behind what
    `engine.raw_connection()` returns; None for anything else.

    It is in a transaction then, which is the caller's to commit, and is begun if there was none: what is executed on it
    belongs to that, and to the savepoint that is open. Nothing is flushed. Raises OptionError where the driver is not
    psycopg2, or where a transaction that is begun here could not be committed by the caller; and SQLAlchemy's own
    errors, such as PendingRollbackError.
    """
    connection = _connection_of(given)
    if connection is not None:
        return _of_connection(connection)
    pool = sys.modules.get("sqlalchemy.pool")
    return given.dbapi_connection if pool is not None and isinstance(given, pool._ConnectionFairy) else None


def is_in_two_phases(given: Any) -> bool:
    """Whether the transaction of a SQLAlchemy Connection or Session is to be prepared before it is committed."""
    connection = _connection_of(given)
    if connection is None:
        return False
    return isinstance(connection.get_transaction(), sys.modules["sqlalchemy.engine"].TwoPhaseTransaction)


def takes_statements(given: Any, bind: Any = None) -> bool:
    """Whether what is enqueued on this can be part of a transaction: not on a session in a hook such as after_commit,
    where that has ended, and the next cannot begin. A session that has to be rolled back first is to say so itself.
    """
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is not None and isinstance(given, orm.scoped_session):
        given = given()
    if orm is None or not isinstance(given, orm.Session) or given.is_active:
        return True
    failures = sys.modules["sqlalchemy.exc"]
    try:
        given.connection(bind_arguments={"bind": bind} if bind is not None else None)
    except failures.PendingRollbackError:
        return True
    except failures.InvalidRequestError:
        return False
    return True


def forget_if_broken(given: Any, *, by_server: bool) -> None:
    """After an error of ours: where the driver's connection behind this has broken, have SQLAlchemy forget it, as it
    would have done after an error of its own. Otherwise it fails to roll back there when a request ends, and the scoped
    session stays. Where it was the server, it forgets all of its pool that are as old, which will be as broken. Nothing
    for anything else; raises nothing, for the error comes first.
    """
    failures = sys.modules.get("sqlalchemy.exc")
    if failures is None:
        return
    with contextlib.suppress(failures.SQLAlchemyError):
        connection = _connection_of(given)
        if connection is None or not _driver_connection_of(connection).closed:
            return
        if by_server:
            connection.exec_driver_sql("SELECT 1")  # which finds out, and is not sent
        else:
            connection.invalidate()


def _connection_of(given: Any) -> Any:
    """SQLAlchemy's connection; that of a session is taken, if it has none yet."""
    orm, engine = sys.modules.get("sqlalchemy.orm"), sys.modules.get("sqlalchemy.engine")
    if orm is not None and isinstance(given, orm.scoped_session):
        given = given()
    if orm is not None and isinstance(given, orm.Session):
        _require_psycopg2(_bind_of(given), given)
        return given.connection()
    if engine is not None and isinstance(given, engine.Connection):
        _require_psycopg2(given, given)
        return given
    return None


def _bind_of(session: Any) -> Any:
    try:
        return session.get_bind()
    except sys.modules["sqlalchemy.exc"].UnboundExecutionError:
        raise OptionError(
            "connection is a SQLAlchemy Session without a single engine; say which one has the tables of greenjobs: "
            "connection=session.connection(bind_arguments={'bind': engine})"
        ) from None


def _require_psycopg2(bind: Any, given: Any) -> None:
    driver = f"{bind.dialect.name}+{bind.dialect.driver}"
    if driver != "postgresql+psycopg2":
        raise OptionError(f"connection is a SQLAlchemy {type(given).__name__} of {driver}; {ALLOWED}")


def _of_connection(connection: Any) -> Any:
    if not connection.in_transaction():
        if not hasattr(connection, "commit"):
            # 1.4 in its old style: each statement of SQLAlchemy's own is committed by itself, and ours would not be.
            raise OptionError(
                "connection is a SQLAlchemy Connection of the 1.x kind without a transaction; begin one, as in "
                "`with engine.begin() as connection:`"
            )
        # As the first statement of SQLAlchemy's own would; without it, connection.commit() would commit nothing.
        connection.begin()
    return _driver_connection_of(connection)


def _driver_connection_of(connection: Any) -> Any:
    lent = connection.connection
    return lent.dbapi_connection if hasattr(lent, "dbapi_connection") else lent.connection
