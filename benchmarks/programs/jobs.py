"""The jobs of the benchmarks."""

from __future__ import annotations

import contextlib

from benchmarks.backlog import QUEUE
from benchmarks.programs import work
from benchmarks.programs.tally import tally
from greenjobs.job import Job, job
from greenjobs.pool import ConnectionPool

_WAIT_SECONDS = 60.0

_connections: list[ConnectionPool] = []


def open_connections(database_url: str, size: int) -> None:
    """Open the jobs' own connections beforehand: how long a server takes to accept them is not the question."""
    pool = ConnectionPool(database_url, size=size, wait_seconds=_WAIT_SECONDS, application_name="benchmarks jobs")
    with contextlib.ExitStack() as stack:
        for _ in range(size):
            stack.enter_context(pool.connection())
    _connections.append(pool)


def query(seconds: float) -> None:
    """Wait for one statement, on one of the jobs' own connections."""
    tally.begin()
    with _connections[0].connection() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%(seconds)s)", {"seconds": seconds})
    tally.count()


FUNCTIONS = {function.__name__: function for function in (work.noop, work.stamp, work.sleep, query)}

JOBS: dict[str, Job[..., None]] = {name: job(queue=QUEUE)(function) for name, function in FUNCTIONS.items()}
