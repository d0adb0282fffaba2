"""The application that the runners under test load: jobs that write themselves into the ledger, and the fault inside.

With FAULTS_DIE_AT=claim:after:2 the process kills itself with SIGKILL right after the second call of storage.claim has
returned; with `before`, right before it. So every boundary between two statements can be the last.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from greenjobs import current_job, job, storage
from greenjobs.pool import ConnectionPool

# A job waits here for a connection at most so long; 50 of them share what is more than they need.
_WAIT_SECONDS = 60.0
_GATE_POLL_SECONDS = 0.02

_ledger = ConnectionPool(os.environ["FAULTS_LEDGER_URL"], size=4, wait_seconds=_WAIT_SECONDS, application_name="ledger")


def write(sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a statement on a connection to the ledger."""
    with _ledger.connection() as connection, connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchall() if cursor.description else []


def begin() -> int:
    """Note that the current job runs; returns the number of this run."""
    ((run,),) = write(
        "INSERT INTO faults_runs (job_id, attempt, runner) VALUES (%s, %s, %s) RETURNING id",
        *(current_job.id, current_job.attempt, os.getpid()),
    )
    return int(run)


def end(run: int) -> None:
    """Note that this run came to its end."""
    write("UPDATE faults_runs SET ended_at = clock_timestamp() WHERE id = %s", run)


@job
def tick(token: str) -> None:
    """The quickest job: its run is one statement."""
    write(
        "INSERT INTO faults_runs (job_id, attempt, runner, ended_at) VALUES (%s, %s, %s, clock_timestamp())",
        *(current_job.id, current_job.attempt, os.getpid()),
    )


@job
def linger(token: str, seconds: float) -> None:
    """A job that waits, as most do."""
    run = begin()
    time.sleep(seconds)
    end(run)


@job
def hold(token: str, gate: str) -> None:
    """A job that is under way until the test opens the gate, for all or for this process: a file in the folder."""
    run = begin()
    while not os.path.exists(gate) and not os.path.exists(f"{gate}-{os.getpid()}"):
        time.sleep(_GATE_POLL_SECONDS)
    end(run)


@job
def spin(token: str, seconds: float) -> None:
    """A job that computes, and lets nothing else happen in its process."""
    run = begin()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        pass
    end(run)


@job
def stumble(token: str) -> None:
    """A job that fails at its first attempt."""
    run = begin()
    if current_job.retries == 0:
        raise RuntimeError("stumbled")
    end(run)


@job
def poison(token: str) -> None:
    """A job that ends whoever runs it."""
    begin()
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(function: str, place: str, count: int) -> None:
    """Let the process kill itself around that call of a function in storage."""
    original: Callable[..., Any] = getattr(storage, function)
    calls = 0

    @functools.wraps(original)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        number = calls  # others may call it while this call is under way
        if number == count and place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if number == count and place == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(storage, function, deadly)


if "FAULTS_DIE_AT" in os.environ:
    _function, _place, _count = os.environ["FAULTS_DIE_AT"].split(":")
    _die_at(_function, _place, int(_count))
