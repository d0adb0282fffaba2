"""Jobs and runners inside the test process, which is cooperative: each test with jobs and a database of its own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import psycopg2
from waiting import eventually

import greenjobs
from greenjobs import lending, pool
from greenjobs.job import Job
from greenjobs.runner import Runner, RunnerHandle

# Deadlines only bound a failing test: two cores may be busy with other tests.
PATIENCE_SECONDS = 30.0

# `greenjobs.job` is the decorator, which hides the module of that name.
_job_module = sys.modules["greenjobs.job"]


class Database:
    """What a test sees of its database, through a connection of the test's own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.connection = psycopg2.connect(url)
        self.connection.autocommit = True

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement; returns its rows, none for a statement that has none."""
        with self.connection.cursor() as cursor:
            cursor.execute(sql, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def column(self, sql: str, *parameters: Any) -> list[Any]:
        """The first column of all rows."""
        return [row[0] for row in self.rows(sql, *parameters)]

    def value(self, sql: str, *parameters: Any) -> Any:
        """The first column of the one row."""
        (row,) = self.rows(sql, *parameters)
        return row[0]

    def count(self, condition: str = "true", *parameters: Any) -> int:
        """How many job rows there are, of those that the condition holds for."""
        return int(self.value(f"SELECT count(*) FROM background_jobs WHERE {condition}", *parameters))

    def state(self, id: int) -> str | None:
        """The state of a job; None when it is gone."""
        states = self.column("SELECT state FROM background_jobs WHERE id = %s", id)
        return states[0] if states else None

    def wait_for(self, condition: str, *parameters: Any, count: int = 1) -> None:
        """Block until that many job rows fulfil the condition."""
        seen = f"{count} rows with {condition} {parameters}"
        eventually(lambda: self.count(condition, *parameters) == count, seen, seconds=PATIENCE_SECONDS)

    def terminate_sessions(self, application_name: str) -> int:
        """End the connections of this name, as a restart of the server does, and wait for it; returns their number.

        Who had them hears of it before they are gone, and may have got others by then.
        """
        ended = self.rows(
            "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = %s",
            application_name,
        )
        left = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
        pids = [pid for pid, _ in ended]
        eventually(lambda: self.value(left, pids) == 0, f"backends {pids} live on", seconds=PATIENCE_SECONDS)
        return len(pids)

    def terminate(self, pid: int) -> None:
        """End the session of this backend, and wait for it."""
        self.rows("SELECT pg_terminate_backend(%s)", pid)
        gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)"
        eventually(lambda: self.value(gone, pid), f"backend {pid} lives on", seconds=PATIENCE_SECONDS)

    def sessions(self) -> list[str]:
        """The names of the connections to this database, without this one."""
        return self.column(
            "SELECT application_name FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )


@contextlib.contextmanager
def application(url: str, **settings: Any) -> Iterator[Database]:
    """An application of its own: no jobs declared yet, and this database configured, until the end of the block.

    Who enqueues in it waits for the database as long as a busy machine needs, unless the settings say otherwise.
    """
    declared = dict(_job_module._registry)  # type: ignore[attr-defined]
    _job_module._registry.clear()  # type: ignore[attr-defined]
    greenjobs.configure(database_url=url, **{"enqueue_timeout": PATIENCE_SECONDS, **settings})
    database = Database(url)
    try:
        yield database
    finally:
        greenjobs.configure()
        _job_module._registry.clear()  # type: ignore[attr-defined]
        _job_module._registry.update(declared)  # type: ignore[attr-defined]
        for pools in (pool._shared_pools, lending._job_pools):
            used = pools.pop(url, None)  # type: ignore[attr-defined]
            if used is not None:
                used.close()
        database.connection.close()


@contextlib.contextmanager
def started(runner: Runner) -> Iterator[RunnerHandle]:
    """The runner at work; stopped, and waited for, at the end of the block."""
    handle = runner.start()
    try:
        yield handle
    finally:
        handle.shutdown()
        assert handle.wait_for_shutdown(PATIENCE_SECONDS), "the runner did not stop"


def work_off(*jobs: Job[Any, Any], pool: int = 10, **runner_arguments: Any) -> None:
    """Run what waits for these jobs, each queue with this pool, until nothing could run now."""
    runner = Runner(**runner_arguments).register(*jobs).shutdown_when_queue_empty()
    for queue in {job.queue for job in jobs}:
        runner.configure_queue(queue, pool=pool)
    assert runner.start().wait_for_shutdown(PATIENCE_SECONDS), "the runner did not stop when its queues were empty"
