"""The runner's session where there can be none: a lease on its place in the register, renewed now and then.

Behind a pooler that gives every transaction another session of the server, no lock can be held and nothing listened to.
A native thread renews the lease, so that a job which holds the event loop does not cost the runner its life. Nobody
is woken: runners find work by polling alone.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import gevent
import psycopg2

from greenjobs import pool, storage
from greenjobs.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from greenjobs.listener import SessionOwner

logger = logging.getLogger(__name__)

# A dead runner's jobs wait as long as a lease lasts; it survives three renewals that fail in a row.
LEASE_SECONDS = 20.0
_RENEW_SECONDS = 5.0
_CONNECT_SECONDS = 4.0

# The runner counts its lease as lost a little before the others do.
_MARGIN_SECONDS = 2.0
_WATCH_SECONDS = 0.5

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0


class Lease:
    """Keeps a lease from `start` until `stop`; tells the runner what a Listener would."""

    def __init__(self, database_url: str, register: Callable[[Connection], int], owner: SessionOwner) -> None:
        self._database_url = database_url
        self._register = register
        self._owner = owner
        self._runner: int | None = None
        self._lasts_until = 0.0
        self._is_stopping = False
        self._watcher: gevent.Greenlet[..., None] | None = None

    def start(self) -> None:
        """Register with a lease; the errors of this first time are the caller's."""
        self._begin()
        gevent.get_hub().threadpool.spawn(self._renew_for_ever)
        self._watcher = gevent.spawn(self._watch)

    def restart(self) -> None:
        """A lease is no session: the next renewal reaches whichever server takes writes."""

    def stop(self) -> None:
        """Let the lease run out."""
        self._is_stopping = True
        if self._watcher is not None:
            self._watcher.kill()

    def _begin(self) -> None:
        asked_at = time.monotonic()
        connection = self._connect()
        try:
            runner = self._register(connection)
        finally:
            connection.close()
        # Counted from before the server did, so that it never seems to last longer here than there.
        self._lasts_until = asked_at + LEASE_SECONDS
        self._runner = runner
        self._owner.session_began(runner)

    def _connect(self) -> Connection:
        return pool.connect(
            self._database_url, application_name="greenjobs lease", timeout_seconds=_CONNECT_SECONDS, session={}
        )

    def _renew_for_ever(self) -> None:
        """In a native thread: whatever the event loop does, the lease is renewed."""
        while not self._is_stopping:
            time.sleep(_WATCH_SECONDS)
            runner = self._runner
            if runner is None or self._lasts_until - time.monotonic() > LEASE_SECONDS - _RENEW_SECONDS:
                continue
            asked_at = time.monotonic()
            try:
                connection = self._connect()
                try:
                    is_renewed = storage.renew_lease(connection, runner, lease_seconds=LEASE_SECONDS)
                finally:
                    connection.close()
            except (psycopg2.Error, DatabaseUnavailable) as error:
                logger.debug("the lease of runner %s was not renewed: %s", runner, str(error).strip())
            else:
                if runner == self._runner:
                    self._lasts_until = asked_at + LEASE_SECONDS if is_renewed else 0.0

    def _watch(self) -> None:
        while True:
            gevent.sleep(_WATCH_SECONDS)
            if time.monotonic() > self._lasts_until - _MARGIN_SECONDS:
                lost, self._runner = self._runner, None
                self._owner.session_ended()
                logger.warning("runner %s lost its lease; claiming nothing until it has another", lost)
                self._begin_again()

    def _begin_again(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                self._begin()
            except (psycopg2.Error, DatabaseUnavailable) as error:
                logger.debug("no new lease yet: %s", str(error).strip())
                gevent.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            else:
                logger.warning("there is a new lease; this is runner %s now", self._runner)
                return
