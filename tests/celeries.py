"""Applications of greenjobs.contrib.celery inside the test process: each test with tasks of its own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import running

from greenjobs import jobs, surroundings
from greenjobs.contrib.celery import Celery, task_job
from greenjobs.contrib.celery import app as rooms
from greenjobs.inspection import StoredJob

_job_module = sys.modules["greenjobs.job"]


@contextlib.contextmanager
def alone() -> Iterator[Celery]:
    """An application whose tasks are the only ones, and whose jobs are; without a database."""
    tasks, applications = dict(rooms.tasks), list(rooms._applications)
    declared = dict(_job_module._registry)  # type: ignore[attr-defined]
    rooms.tasks.clear()
    rooms._applications.clear()
    _job_module._registry.clear()  # type: ignore[attr-defined]
    try:
        yield Celery("shop", backend="greenjobs", timezone="UTC")
    finally:
        rooms.tasks.clear()
        rooms.tasks.update(tasks)
        rooms._applications[:] = applications
        rooms._current.default = rooms._current.latest = None
        if task_job._carry in surroundings.around_enqueues:
            surroundings.around_enqueues.remove(task_job._carry)
        _job_module._registry.clear()  # type: ignore[attr-defined]
        _job_module._registry.update(declared)  # type: ignore[attr-defined]


def run(*tasks: Any) -> None:
    """Run what waits for these tasks, until nothing could run now."""
    names = {task.job.name for task in tasks}
    while True:
        running.work_off(*(task.job for task in tasks))
        now = datetime.now(timezone.utc) + timedelta(milliseconds=1)
        # A runner stops between the moment in which a task wants to be retried at once, and the next; its last act may
        # have been to make that one available.
        left = [*jobs.find(state="scheduled"), *jobs.find(state="available")]
        if not any(job.run_at <= now for job in left if isinstance(job, StoredJob) and job.job_type in names):
            return


def row(database: running.Database, id: str) -> tuple[Any, ...]:
    """Queue, priority, state, arguments and options of a job, and in how many seconds it was to run."""
    columns = "queue, priority, state, data, options, round(extract(epoch FROM run_at - created_at))::int"
    (found,) = database.rows(f"SELECT {columns} FROM background_jobs WHERE id = %s", int(id))
    return found
