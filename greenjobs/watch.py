"""Waiting for the end of a job, in whichever process it runs.

A call that waits has a connection of its own, beside the pool that enqueues: it LISTENs there, marks the row, and is
notified by the statement that ends the job. It waits in select, which is cooperative where gevent has patched the
process. What no notification tells, such as a row that somebody deleted by hand, a look every few seconds does.
"""

from __future__ import annotations

import contextlib
import logging
import math
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS

from greenjobs import config, current, history, storage
from greenjobs.current import lender
from greenjobs.errors import DatabaseUnavailable, JobNotCommitted, JobNotEnded
from greenjobs.history import Look, Status
from greenjobs.pool import bounded, connect
from greenjobs.refusals import explained

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from greenjobs.statement import PlanningConnection

logger = logging.getLogger(__name__)

# For ends that nobody tells of; and where a pooler allows no LISTEN, which leaves nothing but looks.
_LOOK_SECONDS = 5.0
_LOOK_WITHOUT_LISTEN_SECONDS = 0.5

# A notification leaves the server right after the commit that a look may have seen already.
_NOTIFICATION_SECONDS = 1.0

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0

# Nobody ends a session for being quiet, and nobody who holds the row makes a statement wait for ever.
_SESSION = {"idle_session_timeout": "0", "statement_timeout": "5000"}

# A bad day of the database, after which it goes on.
_PASSING = (psycopg2.OperationalError, psycopg2.InterfaceError, psycopg2.InternalError, DatabaseUnavailable)

# The connection in whose transaction a job was enqueued, if it was, and as long as that is there.
Inside = Callable[[], "Connection | None"]


def look(id: int, inside: Inside | None = None) -> Look:
    """How a job is doing, on a connection of the pool; one that only the transaction sees that enqueued it, there.

    Raises DatabaseUnavailable; SchemaError where the tables are missing; AccessDenied.
    """
    seen = _look_outside(id)
    if seen.status == "gone" and inside is not None:
        return _look_inside(id, inside) or seen
    return seen


def wait(id: int, *, timeout: float | None, inside: Inside | None = None) -> Look:
    """Block until a job has ended, `timeout` seconds at most.

    Raises JobNotEnded after that; JobNotCommitted where it could not end, for the transaction that enqueued it is still
    open; AccessDenied; DatabaseUnavailable when the database does not answer at first. Later it may be away a while.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    seen = _look_outside(id)
    if seen.status == "gone" and inside is not None and _look_inside(id, inside) is not None:
        raise JobNotCommitted(
            f"job {id} cannot end while you wait: it was enqueued in a transaction that is still open, and no runner "
            f"sees it before that is committed; commit, and wait then",
            id=id,
        )
    if not seen.has_ended and current.stage is not None and current.stage.is_unseen:
        raise JobNotEnded(
            f"job {id} ({seen.job_type}) is {seen.status}, in the transaction of the test, where no runner sees it; "
            f"testing.drain() runs it",
            id=id,
            status=seen.status,
        )
    if not seen.has_ended and deadline > time.monotonic():
        with explained():
            seen = _watch(id, seen, deadline)
    if not seen.has_ended:
        raise JobNotEnded(
            f"job {id} ({seen.job_type}) has not ended within {timeout:g} s; it is {seen.status}",
            id=id,
            status=seen.status,
        )
    return seen


def _watch(id: int, seen: Look, deadline: float) -> Look:
    """What is to be seen of the job when it has ended, or when the time is up."""
    settings = config.current()
    url = settings.session_url or lender(settings).database_url
    pause = _FIRST_PAUSE_SECONDS
    while not seen.has_ended and time.monotonic() < deadline:
        try:
            with contextlib.closing(_connect(url, settings, deadline)) as connection:
                if not connection.is_pooled:
                    return _listen(connection, id, deadline)
                pause = _LOOK_WITHOUT_LISTEN_SECONDS
        except _PASSING as error:
            log = logger.warning if pause == _FIRST_PAUSE_SECONDS else logger.debug
            log("cannot listen for the end of job %s: %s; trying again", id, str(error).strip(), extra={"job_id": id})
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        else:
            return _look_now_and_then(id, seen, deadline)
        time.sleep(max(min(pause, deadline - time.monotonic()), 0))
        with contextlib.suppress(*_PASSING):
            seen = _look_outside(id)
    return seen


def _connect(url: str, settings: config.Settings, deadline: float) -> PlanningConnection:
    patience = min(settings.enqueue_timeout, max(deadline - time.monotonic(), 0.1))
    return connect(url, application_name="greenjobs wait", timeout_seconds=patience, session=_SESSION)


def _listen(connection: Connection, id: int, deadline: float) -> Look:
    storage.listen_for_end(connection, id)
    is_told = False
    while True:
        # Marked anew each time: a failed job that is retried was not, and the mark may be on a row that came later.
        is_told = storage.watch(connection, id) or is_told
        seen = history.look(connection, id)
        if seen.status == "gone" and is_told:
            return seen._replace(status=_hear(connection, time.monotonic() + _NOTIFICATION_SECONDS) or "gone")
        if seen.has_ended or time.monotonic() >= deadline:
            return seen
        outcome = _hear(connection, min(deadline, time.monotonic() + _LOOK_SECONDS))
        if outcome is not None:
            return history.look(connection, id)._replace(status=outcome)


def _hear(connection: Connection, until: float) -> Status | None:
    """The outcome that this connection is notified of; None when the time is up."""
    while True:
        # What arrived together with the answer to a statement is not going to make the socket readable.
        while connection.notifies:
            outcome = connection.notifies.pop(0).payload
            if outcome == "failed" or outcome in history.KEPT_OUTCOMES:
                return cast(Status, outcome)
        # Also when the time is up, which it may be because nobody let this thread go on: what has arrived counts.
        if not _is_readable(connection, max(until - time.monotonic(), 0)):
            return None
        connection.poll()


def _is_readable(connection: Connection, seconds: float) -> bool:
    # Looked up now, when gevent may have replaced it; and not select.select, which takes no descriptor from 1024 on.
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return bool(waiting.poll(math.ceil(seconds * 1000)))


def _look_now_and_then(id: int, seen: Look, deadline: float) -> Look:
    while not seen.has_ended and time.monotonic() < deadline:
        time.sleep(max(min(_LOOK_WITHOUT_LISTEN_SECONDS, deadline - time.monotonic()), 0))
        with contextlib.suppress(*_PASSING):
            seen = _look_outside(id)
    return seen


def _look_outside(id: int) -> Look:
    settings = config.current()
    with explained(), lender(settings).connection() as connection, bounded(settings.enqueue_timeout):
        return history.look(connection, id)


def _look_inside(id: int, inside: Inside) -> Look | None:
    """What the transaction sees that enqueued a job; None if it is over, or sees nothing either."""
    connection = inside()
    if connection is None or connection.closed:
        return None
    if connection.get_transaction_status() != TRANSACTION_STATUS_INTRANS:
        return None
    seen = history.look(connection, id)
    return None if seen.status == "gone" else seen
