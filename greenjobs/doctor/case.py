"""What is examined: the settings, the application that was found, and the database, by connections that only read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from greenjobs import pool
from greenjobs.doctor.finding import Limits, Verdict

if TYPE_CHECKING:
    from greenjobs.config import Settings
    from greenjobs.job import Job
    from greenjobs.statement import PlanningConnection

# Where a pooler is in between they are not made; every check has a deadline of its own, too.
_SESSION = {
    "default_transaction_read_only": "on",
    "statement_timeout": "4000",
    "lock_timeout": "2000",
    "idle_session_timeout": "0",
    # As the session of a runner has them, to see whether they hold.
    "tcp_keepalives_idle": "10",
}


@dataclass(frozen=True, slots=True)
class Application:
    """What was found of the application: `name` is None where nobody names one, `error` says why it cannot be loaded.

    `narrow_pools` tells of connections to databases of its own for which so many jobs would wait. `jobs_at_a_time` is
    what a runner of it has been started with, None where that is for the settings to say.
    """

    name: str | None = None
    jobs: Mapping[str, Job[Any, Any]] = field(default_factory=dict)
    error: str | None = None
    narrow_pools: Callable[[int], list[str]] | None = None
    jobs_at_a_time: int | None = None

    @property
    def names(self) -> dict[str, Job[Any, Any]]:
        """Its jobs by every name that a row may have."""
        return {name: job for job in self.jobs.values() for name in (job.name, *job.aliases)}


class Case:
    """One examination. Connections are opened when they are first asked for, and again when they were lost."""

    def __init__(self, settings: Settings, application: Application, limits: Limits) -> None:
        self.settings = settings
        self.application = application
        self.limits = limits
        self.is_cut_off = False
        """Whether a connection was lost, and no other can be opened in its place."""
        self._connections: dict[str, PlanningConnection] = {}

    def connection(self) -> PlanningConnection:
        """To the database that holds the jobs."""
        return self._connected("first", self.settings.require_database_url())

    def second_connection(self) -> PlanningConnection:
        """Another one, by the same way."""
        return self._connected("second", self.settings.require_database_url())

    def session(self) -> PlanningConnection:
        """By the way that the session of a runner takes."""
        return self._connected("session", self.session_url)

    def second_session(self) -> PlanningConnection:
        """Another one, by that way."""
        return self._connected("second session", self.session_url)

    @property
    def session_url(self) -> str:
        """That way."""
        return self.settings.session_url or self.settings.require_database_url()

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            connection.close()

    def _connected(self, purpose: str, url: str) -> PlanningConnection:
        connection = self._connections.get(purpose)
        if connection is None or connection.closed:
            self.is_cut_off = connection is not None
            connection = self._connections[purpose] = pool.connect(
                url, application_name="greenjobs doctor", timeout_seconds=self.limits.connect_seconds, session=_SESSION
            )
            self.is_cut_off = False
        return connection


@dataclass(frozen=True, slots=True)
class Check:
    """One look at one thing. `needs` are the checks without whose good end it would be of no use."""

    name: str
    look: Callable[[Case], Verdict]
    needs: tuple[str, ...] = ()
    seconds: float = 5.0
