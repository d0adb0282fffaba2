"""Every statement that only reads of how jobs ended: whether one has, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from psycopg2.extensions import cursor as TupleCursor  # whatever kind a caller's connection makes by itself

from greenjobs.inspection import HISTORY_IS_MEANT, JobFilter
from greenjobs.progress import Progress
from greenjobs.statement import Statement

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

Status = Literal["scheduled", "available", "running", "failed", "done", "discarded", "cancelled", "expired", "gone"]

UNENDED = ("scheduled", "available", "running")
KEPT_OUTCOMES = ("done", "discarded", "cancelled", "expired")


class Look(NamedTuple):
    """What there is to know of a job by its id. `error` is its last one, `result` JSON text.

    `status` is "gone" for one that is in no table: it ended and was not kept, or was deleted, or never was.
    """

    status: Status
    job_type: str = ""
    error: Mapping[str, Any] | None = None
    result: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it has; a failed job has, until somebody retries it."""
        return self.status not in UNENDED


_LOOK = Statement(
    "look_at_job",
    """
SELECT state, job_type, (errors -> -1)::text, NULL::text, 1 AS place
FROM background_jobs
WHERE id = %(id)s
UNION ALL
SELECT outcome, job_type, (errors -> -1)::text, result::text, 2
FROM background_history
WHERE id = %(id)s
ORDER BY place
LIMIT 1
""",
    id="bigint",
)


def look(connection: Connection, id: int) -> Look:
    """How a job is doing, or how it ended."""
    with connection.cursor(cursor_factory=TupleCursor) as cursor:
        _LOOK.run(cursor, {"id": id})
        row = cursor.fetchone()
    if row is None:
        return Look("gone")
    status, job_type, error, result, _ = row
    # As text, for the connection may be a caller's that reads jsonb in its own way.
    return Look(status, job_type, None if error is None else json.loads(error), result)


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A job that ended and was kept, as a row of the history.

    `state` is how it ended: "done", "discarded", "cancelled" or "expired". `started_at`, `run_seconds` and
    `waited_seconds` are those of its last attempt, None if it was ended while it waited; `runner` is host:pid of the
    one that ran it. `result` is what it returned, as JSON, if `has_result`. `age_seconds` is counted from its end; all
    else is as for StoredJob.
    """

    id: int
    job_type: str
    queue: str | None
    state: str
    priority: int
    data: Any
    attempt: int
    retries: int
    crashes: int
    age_seconds: float
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime
    keep_until: datetime
    run_seconds: float | None
    waited_seconds: float | None
    runner: str | None
    has_result: bool
    result: Any
    errors: Sequence[Mapping[str, Any]]
    progress: Progress | None
    log: Sequence[Mapping[str, Any]]

    @property
    def error(self) -> str | None:
        """Class and message of the last error."""
        return f"{self.errors[-1].get('error')}: {self.errors[-1].get('message')}" if self.errors else None


_FIND = f"""
SELECT
    job.id,
    job.job_type,
    job.queue,
    job.outcome,
    job.priority,
    job.data,
    job.attempt,
    job.retries,
    job.crashes,
    extract(epoch FROM now() - job.ended_at)::float8,
    job.created_at,
    job.started_at,
    job.ended_at,
    job.keep_until,
    job.run_seconds,
    job.waited_seconds,
    job.runner,
    job.result IS NOT NULL,
    job.result,
    coalesce(job.errors, '[]'),
    job.progress,
    coalesce(job.log, '[]')
FROM background_history AS job
WHERE {HISTORY_IS_MEANT}
ORDER BY job.id DESC
LIMIT %(limit)s
"""


def find_jobs(connection: Connection, meant: JobFilter, *, limit: int | None) -> list[FinishedJob]:
    """The finished jobs that are meant, the newest first."""
    with connection.cursor() as cursor:
        cursor.execute(_FIND, {**asdict(meant), "limit": limit})
        return [FinishedJob(*(*row, Progress.read(progress), log)) for *row, progress, log in cursor.fetchall()]
