"""The runner's own connections, and the will to use them until it works.

A runner does everything on a fixed handful of connections, whatever the size of its pools. When the database does not
answer, or refuses, what was to be written is written later: each call is tried again with backoff. The first failure is
logged, and that it works again; not every try in between, and not every job that waits for it.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import gevent
import psycopg2
from psycopg2 import errors

from greenjobs.errors import DatabaseUnavailable
from greenjobs.pool import ConnectionPool

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# Claim, acknowledge, maintenance and one to spare. With the session's own that makes five for a runner.
SERVICE_CONNECTIONS = 4

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 10.0
_CONNECT_SECONDS = 10.0

# Every statement here has one right plan, through an index and in its order. It is made once, perhaps when the table
# was still empty or its statistics old, so the planner is kept from all others.
_SESSION = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_sort": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}

# What the database may say on a bad day; all of it is tried again. Anything else is a defect of ours and is raised.
_PASSING = (psycopg2.OperationalError, psycopg2.InterfaceError, psycopg2.InternalError, DatabaseUnavailable)


Spawn = Callable[[Callable[[], None]], "gevent.Greenlet[..., None]"]
"""Begins a loop of the runner's, the error of which, should it ever end with one, ends the runner."""


class Service:
    """Runs statements on the runner's connections, again and again until they succeed.

    `on_standby` is called when the server turns out to be one that takes no writes.
    """

    def __init__(self, database_url: str, *, on_standby: Callable[[], None]) -> None:
        self._on_standby = on_standby
        self.pool = ConnectionPool(
            database_url,
            size=SERVICE_CONNECTIONS,
            wait_seconds=_CONNECT_SECONDS,
            application_name="greenjobs runner",
            session=_SESSION,
        )
        self.runner_ids: list[int] = []
        """The ids under which this process has registered, the newest last."""
        self.failures = 0
        """How many tries have failed so far; only grows."""
        self._is_failing = False

    def call(self, statement: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`statement(connection, …)` when the database lets it through; blocks the greenlet until then."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                result = self.once(statement, *args, **kwargs)
            except _PASSING as error:
                self._note_failure(statement.__name__, error)
                gevent.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            else:
                self._note_success()
                return result

    def once(self, statement: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`statement(connection, …)`, tried once."""
        with self.pool.connection() as connection:
            try:
                return statement(connection, *args, **kwargs)
            except errors.ReadOnlySqlTransaction:
                # The server has become a standby: connections opened from now on go to the new primary.
                self.pool.close()
                self._on_standby()
                raise

    def close(self) -> None:
        """Close the connections."""
        self.pool.close()

    def _note_failure(self, doing: str, error: Exception) -> None:
        self.failures += 1
        if not self._is_failing:
            self._is_failing = True
            self._failing_since = time.monotonic()
            logger.warning("cannot %s: %s; trying again until the database answers", doing, str(error).strip())

    def _note_success(self) -> None:
        if self._is_failing:
            self._is_failing = False
            logger.warning("the database answers again after %.1f s", time.monotonic() - self._failing_since)
