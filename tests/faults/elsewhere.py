"""An application whose jobs run in threads and processes, and complete in a transaction with what they write."""

from __future__ import annotations

import time

from greenjobs import current_job, job

from .application import begin, end

SECONDS = 0.1


def leave_a_mark() -> None:
    """Write one row that has no key, so that nothing but the job itself keeps it from being there twice."""
    run = begin()
    with current_job.transaction() as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO faults_marks (job_id) VALUES (%s)", (current_job.id,))
        time.sleep(SECONDS)
    end(run)


# The death of a job's process is a failed attempt.
@job(executor="thread", max_retries=1000, backoff=[0.0])
def in_thread(token: str) -> None:
    leave_a_mark()


@job(executor="process", max_retries=1000, backoff=[0.0])
def in_process(token: str) -> None:
    leave_a_mark()
