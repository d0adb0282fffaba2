"""Jobs, for people: found, counted and chosen by what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from greenjobs.inspection.liveness import LIVES
from greenjobs.progress import Progress

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs are meant; None leaves a thing open, and what is given must hold together.

    `error` is searched in class and message of the last error, in any case. Ages, in seconds, are counted as those of
    StoredJob.
    """

    ids: list[int] | None = None
    queues: list[str] | None = None
    job_types: list[str] | None = None
    states: list[str] | None = None
    error: str | None = None
    older_than: float | None = None
    newer_than: float | None = None


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job row, as it was when somebody looked.

    `attempt` counts how often it was claimed, `retries` how often it failed since it was enqueued or retried by hand,
    `crashes` how often its runner died. `age_seconds` is counted from when it failed, if it is failed, else from when
    it was enqueued. `runner` is host:pid of the runner that holds it. `expires_at` is None for a job that does not
    expire, or not any more. `waits_for` is the running job that has the same `exclusive_key`. `options` is what its
    call said otherwise than the job. `errors` are those of the last attempts, the newest last, each with at least at,
    attempt, error (its class), message and runner. `progress` is what it said last of how far it is; `log` are the
    newest lines that it logged, where it keeps them, each with at, attempt, level and message.
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
    run_at: datetime
    last_retry: datetime | None
    claimed_at: datetime | None
    runner: str | None
    cancel_asked_at: datetime | None
    unique_key: str | None
    expires_at: datetime | None
    exclusive_key: str | None
    waits_for: int | None
    options: Mapping[str, Any] | None
    errors: Sequence[Mapping[str, Any]]
    progress: Progress | None
    log: Sequence[Mapping[str, Any]]

    @property
    def error(self) -> str | None:
        """Class and message of the last error."""
        return f"{self.errors[-1].get('error')}: {self.errors[-1].get('message')}" if self.errors else None


_SINCE = "CASE job.state WHEN 'failed' THEN greatest(job.last_retry, job.created_at) ELSE job.created_at END"

# Parameters are put in as literals, so the planner sees only the conditions that were given.
_IS_MEANT = f"""
(%(ids)s::bigint[] IS NULL OR job.id = ANY(%(ids)s::bigint[]))
AND (%(queues)s::text[] IS NULL OR job.queue = ANY(%(queues)s::text[]))
AND (%(job_types)s::text[] IS NULL OR job.job_type = ANY(%(job_types)s::text[]))
AND (%(states)s::text[] IS NULL OR job.state = ANY(%(states)s::text[]))
AND (%(older_than)s::float8 IS NULL OR {_SINCE} < now() - make_interval(secs => %(older_than)s))
AND (%(newer_than)s::float8 IS NULL OR {_SINCE} >= now() - make_interval(secs => %(newer_than)s))
AND (
    %(error)s::text IS NULL
    OR position(
        lower(%(error)s) IN lower(concat(job.errors -> -1 ->> 'error', ': ', job.errors -> -1 ->> 'message'))
    ) > 0
)
"""

HISTORY_IS_MEANT = _IS_MEANT.replace(_SINCE, "job.ended_at").replace("job.state", "job.outcome")
"""The same of rows of background_history."""

_FIND = f"""
SELECT
    job.id,
    job.job_type,
    job.queue,
    job.state,
    job.priority,
    job.data,
    job.attempt,
    job.retries,
    job.crashes,
    extract(epoch FROM now() - {_SINCE})::float8,
    job.created_at,
    job.run_at,
    nullif(job.last_retry, '1970-01-01 00:00:00+00'),
    job.claimed_at,
    runner.hostname || ':' || runner.pid,
    job.cancel_asked_at,
    job.unique_key,
    job.expires_at,
    job.exclusive_key,
    (
        SELECT rival.id
        FROM background_jobs AS rival
        WHERE rival.claimed_by IS NOT NULL
            AND rival.exclusive_key = job.exclusive_key
            AND rival.exclusive_key IS NOT NULL
            AND job.state = 'available'
    ),
    job.options,
    coalesce(job.errors, '[]'),
    job.progress,
    coalesce(job.log, '[]')
FROM background_jobs AS job
LEFT JOIN background_runners AS runner ON runner.id = job.claimed_by
WHERE {_IS_MEANT}
ORDER BY job.id DESC
LIMIT %(limit)s
"""


def find_jobs(connection: Connection, meant: JobFilter, *, limit: int | None) -> list[StoredJob]:
    """The jobs that are meant, the newest first."""
    with connection.cursor() as cursor:
        cursor.execute(_FIND, {**asdict(meant), "limit": limit})
        return [StoredJob(*(*row, Progress.read(progress), log)) for *row, progress, log in cursor.fetchall()]


# By whether those of the history are meant.
_MEANT = {
    False: f"""
FROM background_jobs AS job
WHERE {_IS_MEANT}
""",
    True: f"""
FROM background_history AS job
WHERE {HISTORY_IS_MEANT}
""",
}

_COUNT = {finished: f"SELECT count(*) {meant}" for finished, meant in _MEANT.items()}


def count_jobs(connection: Connection, meant: JobFilter, *, finished: bool = False) -> int:
    """How many jobs are meant, or `finished` ones. Counts every one of them: for people, not for loops."""
    with connection.cursor() as cursor:
        cursor.execute(_COUNT[finished], asdict(meant))
        return sum(row[0] for row in cursor.fetchall())


_CHOOSE = {
    finished: f"""
SELECT job.id, job.attempt
{meant}
ORDER BY job.id DESC
LIMIT %(limit)s
"""
    for finished, meant in _MEANT.items()
}


def choose_jobs(
    connection: Connection, meant: JobFilter, *, limit: int | None, finished: bool = False
) -> list[tuple[int, int]]:
    """Id and attempt of the jobs that are meant, or of `finished` ones, the newest first."""
    with connection.cursor() as cursor:
        cursor.execute(_CHOOSE[finished], {**asdict(meant), "limit": limit})
        return cursor.fetchall()


# Where an id is in both, the table of jobs comes last, and counts.
_STATES = """
SELECT id, outcome
FROM background_history
WHERE id = ANY(%(ids)s)
UNION ALL
SELECT id, state
FROM background_jobs
WHERE id = ANY(%(ids)s)
"""


def job_states(connection: Connection, ids: Sequence[int]) -> dict[int, str]:
    """The states of these jobs by id, or how they ended; those that are gone are not in it."""
    with connection.cursor() as cursor:
        cursor.execute(_STATES, {"ids": list(ids)})
        return dict(cursor.fetchall())


@dataclass(frozen=True, slots=True)
class UnknownJobType:
    """A type of which jobs wait, and which no live runner has registered."""

    job_type: str
    count: int


_UNKNOWN_JOB_TYPES = f"""
SELECT waiting.job_type, waiting.count
FROM (
    SELECT job_type, count(*) AS count
    FROM background_jobs
    WHERE state IN ('available', 'scheduled')
    GROUP BY job_type
) AS waiting
WHERE NOT EXISTS (
    SELECT
    FROM background_runners
    WHERE waiting.job_type = ANY(job_types)
        AND ended_at IS NULL
        AND {LIVES}
)
ORDER BY waiting.job_type
"""


def unknown_job_types(connection: Connection) -> list[UnknownJobType]:
    """The types of waiting jobs that no live runner knows, by name. Counts every row: for people, not for loops."""
    with connection.cursor() as cursor:
        cursor.execute(_UNKNOWN_JOB_TYPES)
        return [UnknownJobType(*row) for row in cursor.fetchall()]
