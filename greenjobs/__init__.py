"""greenjobs: background jobs for synchronous Python, in PostgreSQL, on gevent.

Importing it patches nothing and loads neither gevent nor psycopg2: a web application that only enqueues pays for no
more than it uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from greenjobs.config import configure
from greenjobs.control import Discard, Retry, Snooze
from greenjobs.current import connection, current_job
from greenjobs.errors import GreenjobsError
from greenjobs.handle import JobHandle
from greenjobs.job import job
from greenjobs.version import __version__

if TYPE_CHECKING:
    from greenjobs.runner import Runner

__all__ = [
    "Discard",
    "GreenjobsError",
    "JobHandle",
    "Retry",
    "Runner",
    "Snooze",
    "__version__",
    "configure",
    "connection",
    "current_job",
    "job",
]


def __getattr__(name: str) -> Any:
    if name == "Runner":  # it needs gevent, which who merely enqueues does not
        from greenjobs.runner import Runner

        return Runner
    if name == "schedules":  # it needs psycopg2
        import greenjobs.schedules

        return greenjobs.schedules
    if name == "queues":  # so does this
        import greenjobs.queues

        return greenjobs.queues
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
