"""The runner's session: one dedicated connection that proves the runner alive and on which it is woken.

The connection holds the runner's advisory lock and LISTENs. When it is lost, so is the lock, and every other runner may
take the jobs over: the listener says so at once, and goes on trying to register again, under a new id.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import gevent
import psycopg2
from gevent.socket import wait_read

from greenjobs import storage
from greenjobs.errors import DatabaseUnavailable
from greenjobs.pool import connect

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0

# The first try comes at once: until it succeeds, others may take over what runs here. Further ones spare the server.
_IMMEDIATE_SECONDS = 0.05
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0

# The server notices a lost runner as the runner notices a lost server, and never ends the session for being quiet.
_SESSION = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "20000",
    "idle_session_timeout": "0",
}

_LISTEN = f"LISTEN {storage.CHANNEL}"


class SessionOwner(Protocol):
    """What the listener tells the runner."""

    def session_began(self, runner: int) -> None:
        """The runner is registered under this id."""

    def session_ended(self) -> None:
        """The session is lost, and with it the right to everything that was claimed under it."""

    def notified(self, queue: str | None) -> None:
        """There may be work in this queue; None: a job is due soon."""

    def cancel(self, job_id: int) -> None:
        """Somebody wants this job to end, wherever it runs."""

    def queues_changed(self) -> None:
        """Somebody paused, resumed or resized a queue."""


class Listener:
    """Keeps a session open from `start` until `stop`."""

    def __init__(self, database_url: str, register: Callable[[Connection], int], owner: SessionOwner) -> None:
        self._database_url = database_url
        self._register = register
        self._owner = owner
        self._connection: Connection | None = None
        self._runner = 0
        self._greenlet: gevent.Greenlet[..., None] | None = None

    def start(self) -> None:
        """Open the session and register; the errors of this first time are the caller's."""
        self._open()
        self._greenlet = gevent.spawn(self._stay_open)

    def restart(self) -> None:
        """Give the session up for another; returns at once."""
        if self._greenlet is not None:
            self._greenlet.kill(block=False)
            self._greenlet = gevent.spawn(self._start_over)

    def stop(self) -> None:
        """Close the session; the runner counts as dead from here on."""
        if self._greenlet is not None:
            self._greenlet.kill()
        if self._connection is not None:
            self._connection.close()

    def _open(self) -> None:
        connection = connect(
            self._database_url,
            application_name="greenjobs session",
            timeout_seconds=_CONNECT_SECONDS,
            session=_SESSION,
        )
        try:
            with connection.cursor() as cursor:
                cursor.execute(_LISTEN)
            self._runner = self._register(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._owner.session_began(self._runner)

    def _start_over(self) -> None:
        self._note_loss("its server takes no writes any more")
        self._reopen()
        self._stay_open()

    def _stay_open(self) -> None:
        while True:
            try:
                self._listen()
            except (psycopg2.Error, OSError) as error:
                self._note_loss(str(error).strip())
            self._reopen()

    def _note_loss(self, why: str) -> None:
        self._owner.session_ended()
        logger.warning(
            "runner %s lost its session (%s); claiming nothing until it has another",
            *(self._runner, why),
            extra={"runner_id": self._runner},
        )

    def _listen(self) -> None:
        connection = self._connection
        assert connection is not None
        while True:
            # What arrived together with the answer to an earlier statement is not going to make the socket readable.
            while connection.notifies:
                self._dispatch(connection.notifies.pop(0).payload)
            wait_read(connection.fileno())
            connection.poll()

    def _dispatch(self, payload: str) -> None:
        if payload == "due":
            self._owner.notified(None)
            return
        if payload == "queues":
            self._owner.queues_changed()
            return
        runner, _, queue = payload.partition(":")
        if runner == "cancel" and queue.isdecimal():
            self._owner.cancel(int(queue))
            return
        if runner in ("*", str(self._runner)):
            self._owner.notified(queue)

    def _reopen(self) -> None:
        pause = _IMMEDIATE_SECONDS
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        while True:
            gevent.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(max(pause * 2, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            try:
                self._open()
            except (psycopg2.Error, DatabaseUnavailable) as error:
                logger.debug("no new session yet: %s", str(error).strip())
            else:
                logger.warning("the session is back; this is runner %s now", self._runner)
                return
