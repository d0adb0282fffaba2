"""Every statement that only reads: what waits, what runs, who lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg2.extensions import cursor as TupleCursor  # whatever kind a caller's connection makes by itself

from greenjobs.progress import Progress
from greenjobs.statement import Statement

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class Work(NamedTuple):
    """What waits in a queue: jobs to claim together, jobs to claim one at a time because their runner died, and jobs
    of which some exclude others."""

    has_innocents: bool
    has_suspects: bool
    has_exclusive: bool


_LOOK = Statement(
    "look",
    """
SELECT
    queue,
    EXISTS (
        SELECT
        FROM background_jobs AS job
        WHERE job.queue = asked.queue
            AND job.state = 'available'
            AND job.crashes = 0
            AND job.exclusive_key IS NULL
            AND job.job_type = ANY(%(job_types)s)
    ),
    EXISTS (
        SELECT
        FROM background_jobs AS job
        WHERE job.queue = asked.queue
            AND job.state = 'available'
            AND job.crashes > 0
            AND job.job_type = ANY(%(job_types)s)
    ),
    EXISTS (
        SELECT
        FROM background_jobs AS job
        WHERE job.queue = asked.queue
            AND job.state = 'available'
            AND job.crashes = 0
            AND job.exclusive_key IS NOT NULL
            AND job.job_type = ANY(%(job_types)s)
    )
FROM unnest(%(queues)s::text[]) AS asked (queue)
""",
    queues="text[]",
    job_types="text[]",
)


def look(connection: Connection, *, queues: Sequence[str], job_types: Sequence[str]) -> dict[str, Work]:
    """Which of these queues have available jobs of these types."""
    with connection.cursor() as cursor:
        _LOOK.run(cursor, {"queues": list(queues), "job_types": list(job_types)})
        return {queue: Work(*what) for queue, *what in cursor.fetchall()}


_NEXT_DUE = Statement(
    "next_due",
    """
SELECT extract(epoch FROM min(run_at) - clock_timestamp())::float8
FROM background_jobs
WHERE state = 'scheduled'
""",
)


def seconds_until_due(connection: Connection) -> float | None:
    """Seconds until the next scheduled job is due, negative when it is overdue; None when there is none."""
    with connection.cursor() as cursor:
        _NEXT_DUE.run(cursor)
        row = cursor.fetchone()
        return None if row is None else row[0]


# A runner is alive exactly while its session holds the lock, or while its lease lasts, where it has one instead.
_LIVES = """
CASE
    WHEN leased_until IS NOT NULL THEN leased_until > now()
    ELSE EXISTS (
        SELECT
        FROM pg_locks
        WHERE locktype = 'advisory'
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND classid = 'background_runners'::regclass
            AND objid = background_runners.id
            AND objsubid = 2
            AND granted
    )
END
"""

# When the server was restarted all sessions ended at once. Their runners live, most likely, and get a few seconds to
# come back before anybody takes their jobs over.
_DEAD = f"""
SELECT id
FROM background_runners
WHERE NOT {_LIVES}
    AND (
        started_at > pg_postmaster_start_time()
        OR pg_postmaster_start_time() < now() - interval '5 seconds'
    )
"""

_DEAD_RUNNERS = Statement("dead_runners", _DEAD)


def dead_runners(connection: Connection) -> list[int]:
    """The ids in the register of those that live no more; those that ended in good order, some time ago, among them."""
    with connection.cursor() as cursor:
        _DEAD_RUNNERS.run(cursor)
        return [row[0] for row in cursor.fetchall()]


_HELD = """
SELECT id, attempt
FROM background_jobs
WHERE state = 'running'
    AND claimed_by = ANY(%(runners)s)
    AND claimed_at < now() - make_interval(secs => %(age)s)
"""


def held_jobs(connection: Connection, runners: Sequence[int], *, age_seconds: float) -> list[tuple[int, int]]:
    """Id and attempt of the jobs that these runners have held for that long, according to the database."""
    with connection.cursor() as cursor:
        cursor.execute(_HELD, {"runners": list(runners), "age": age_seconds})
        return [(id, attempt) for id, attempt in cursor.fetchall()]


class Chores(NamedTuple):
    """What there is to do beside running jobs. Mostly nothing, and one question tells.

    `dead` are the ids of runners that live no more, unless they are noted as ended and hold nothing; `cancelled` those
    of jobs held by the asking process whose end was asked for; `has_homeless` says whether jobs have no queue,
    `has_unwanted` whether jobs wait that were cancelled while they ran, and `has_past_windows` whether unique keys have
    windows that have been over for a while. `queues` is what was said of queues by name.
    """

    dead: list[int]
    cancelled: list[int]
    has_homeless: bool
    has_unwanted: bool
    has_past_windows: bool
    queues: Mapping[str, QueueSetting]


class QueueSetting(NamedTuple):
    """What was said of a queue at run time. A `pool` of None is what each runner was started with."""

    paused: bool
    pool: int | None


UNCHANGED = QueueSetting(False, None)
"""What holds for a queue of which nothing was said."""

_QUEUE_SETTINGS = """
SELECT jsonb_object_agg(name, jsonb_build_array(paused, pool))
FROM background_queues
"""


def queue_settings(connection: Connection) -> dict[str, QueueSetting]:
    """What was said of queues, by name."""
    with connection.cursor() as cursor:
        cursor.execute(_QUEUE_SETTINGS)
        row = cursor.fetchone()
        return _as_settings(None if row is None else row[0])


def _as_settings(found: Mapping[str, Sequence[Any]] | None) -> dict[str, QueueSetting]:
    return {name: QueueSetting._make(setting) for name, setting in (found or {}).items()}


_CHORES = Statement(
    "chores",
    f"""
SELECT
    ARRAY(
        {_DEAD}
        AND (
            ended_at IS NULL
            OR EXISTS (
                SELECT
                FROM background_jobs
                WHERE state = 'running'
                    AND claimed_by = background_runners.id
            )
        )
    ),
    ARRAY(
        SELECT id
        FROM background_jobs
        WHERE claimed_by = ANY(%(runners)s)
            AND cancel_asked_at IS NOT NULL
    ),
    EXISTS (
        SELECT
        FROM background_jobs
        WHERE queue IS NULL
    ),
    EXISTS (
        SELECT
        FROM background_jobs
        WHERE cancel_asked_at IS NOT NULL
            AND state IN ('scheduled', 'available')
    ),
    EXISTS (
        SELECT
        FROM background_unique_windows
        WHERE ends_at < now() - interval '1 minute'
    ),
    ({_QUEUE_SETTINGS})
""",
    runners="int[]",
)


def chores(connection: Connection, runners: Sequence[int]) -> Chores:
    """What there is to do for a process that registered as these runners."""
    with connection.cursor() as cursor:
        _CHORES.run(cursor, {"runners": list(runners)})
        row = cursor.fetchone()
        assert row is not None
        *others, settings = row
        return Chores._make([*others, _as_settings(settings)])


_FAILED_COUNT = """
SELECT count(*)
FROM background_jobs
WHERE retries > 0
    OR state = 'failed'
"""


def failed_count(connection: Connection) -> int:
    """How many jobs failed at least once and are still there, waiting for another attempt or for somebody."""
    with connection.cursor() as cursor:
        cursor.execute(_FAILED_COUNT)
        row = cursor.fetchone()
        return 0 if row is None else int(row[0])


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Counts of one queue by state, and the age in seconds of the job that has waited longest since it was due."""

    queue: str | None
    available: int
    running: int
    scheduled: int
    failed: int
    oldest_waiting_seconds: float | None


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """A live runner as it registered."""

    id: int
    hostname: str
    pid: int
    version: str
    queues: Mapping[str, Any]
    job_types: Sequence[str]
    started_at: datetime


_QUEUES = """
SELECT
    queue,
    count(*) FILTER (WHERE state = 'available'),
    count(*) FILTER (WHERE state = 'running'),
    count(*) FILTER (WHERE state = 'scheduled'),
    count(*) FILTER (WHERE state = 'failed'),
    extract(epoch FROM now() - min(greatest(run_at, created_at)) FILTER (WHERE state = 'available'))::float8
FROM background_jobs
GROUP BY queue
ORDER BY queue
"""


def queue_statuses(connection: Connection) -> list[QueueStatus]:
    """The queues that have rows, by name. Counts every row: for people, not for loops."""
    with connection.cursor() as cursor:
        cursor.execute(_QUEUES)
        return [QueueStatus(*row) for row in cursor.fetchall()]


_RUNNERS = f"""
SELECT id, hostname, pid, version, queues, job_types, started_at
FROM background_runners
WHERE {_LIVES}
    AND ended_at IS NULL
ORDER BY id
"""


def live_runners(connection: Connection) -> list[RunnerStatus]:
    """The runners that live, oldest first."""
    with connection.cursor() as cursor:
        cursor.execute(_RUNNERS)
        return [RunnerStatus(*row) for row in cursor.fetchall()]


# --- jobs, for people -------------------------------------------------------------------------------------------------


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


_COUNT = f"""
SELECT count(*)
FROM background_jobs AS job
WHERE {_IS_MEANT}
"""


def count_jobs(connection: Connection, meant: JobFilter) -> int:
    """How many jobs are meant. Counts every one of them: for people, not for loops."""
    with connection.cursor() as cursor:
        cursor.execute(_COUNT, asdict(meant))
        return sum(row[0] for row in cursor.fetchall())


_CHOOSE = f"""
SELECT job.id, job.attempt
FROM background_jobs AS job
WHERE {_IS_MEANT}
ORDER BY job.id DESC
LIMIT %(limit)s
"""


def choose_jobs(connection: Connection, meant: JobFilter, *, limit: int | None) -> list[tuple[int, int]]:
    """Id and attempt of the jobs that are meant, the newest first."""
    with connection.cursor() as cursor:
        cursor.execute(_CHOOSE, {**asdict(meant), "limit": limit})
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
        AND {_LIVES}
)
ORDER BY waiting.job_type
"""


def unknown_job_types(connection: Connection) -> list[UnknownJobType]:
    """The types of waiting jobs that no live runner knows, by name. Counts every row: for people, not for loops."""
    with connection.cursor() as cursor:
        cursor.execute(_UNKNOWN_JOB_TYPES)
        return [UnknownJobType(*row) for row in cursor.fetchall()]


# --- schedules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule as it is stored. `next_tick_at` is the first tick that nobody has looked at yet.

    `last_tick_at` is the last one that a job was enqueued for, `last_job_id` that job, `last_job_state` its state, None
    when it is done. `declared_by` is the runner that declared it last, None for one that was made at run time;
    `is_orphaned` says that this runner ended more than a minute ago, `is_known` that a live runner knows the job.
    """

    name: str
    job_type: str
    cron: str
    timezone: str
    data: Mapping[str, Any]
    queue: str | None
    priority: int | None
    catch_up: str
    overlap: bool
    source: str
    declared_by: int | None
    paused: bool
    next_tick_at: datetime
    last_tick_at: datetime | None
    last_job_id: int | None
    last_job_state: str | None
    declarer_lives: bool
    is_orphaned: bool
    is_known: bool


_SCHEDULES = f"""
WITH live AS (
    SELECT id, job_types
    FROM background_runners
    WHERE {_LIVES}
        AND ended_at IS NULL
)
SELECT
    name,
    schedule.job_type,
    cron,
    timezone,
    schedule.data,
    schedule.queue,
    schedule.priority,
    catch_up,
    overlap,
    source,
    declared_by,
    paused,
    next_tick_at,
    last_tick_at,
    last_job_id,
    job.state,
    EXISTS (SELECT FROM live WHERE live.id = declared_by),
    declared_by IS NOT NULL AND NOT EXISTS (
        SELECT
        FROM background_runners AS declarer
        WHERE declarer.id = declared_by
            AND (declarer.ended_at IS NULL OR declarer.ended_at > now() - interval '1 minute')
    ),
    EXISTS (SELECT FROM live WHERE schedule.job_type = ANY(live.job_types))
FROM background_schedules AS schedule
LEFT JOIN background_jobs AS job ON job.id = last_job_id
WHERE %(name)s IS NULL
    OR name = %(name)s
ORDER BY name
"""


def schedules(connection: Connection, *, name: str | None = None) -> list[Schedule]:
    """All schedules by name, or the one of this name."""
    with connection.cursor() as cursor:
        cursor.execute(_SCHEDULES, {"name": name})
        return [Schedule(*row) for row in cursor.fetchall()]


class DueSchedule(NamedTuple):
    """A schedule with a tick that is due. `now` is the database's clock, which alone decides that."""

    name: str
    job_type: str
    cron: str
    timezone: str
    catch_up: str
    next_tick_at: datetime
    now: datetime


# A schedule that code or settings declare is for the runners that do: those of a newer release, from which it was taken
# out, leave it alone.
_OURS = """
FROM background_schedules
WHERE NOT paused
    AND job_type = ANY(%(job_types)s)
    AND (source = 'api' OR name = ANY(%(declared)s))
"""

_DUE_SCHEDULES = Statement(
    "due_schedules",
    f"""
SELECT name, job_type, cron, timezone, catch_up, next_tick_at, now()
{_OURS}
    AND next_tick_at <= now()
ORDER BY next_tick_at
""",
    job_types="text[]",
    declared="text[]",
)


def due_schedules(connection: Connection, *, job_types: Sequence[str], declared: Sequence[str]) -> list[DueSchedule]:
    """The schedules for these job types with a tick that is due; of those that runners declare, only these."""
    with connection.cursor() as cursor:
        _DUE_SCHEDULES.run(cursor, {"job_types": list(job_types), "declared": list(declared)})
        return [DueSchedule._make(row) for row in cursor.fetchall()]


_NEXT_TICK = Statement(
    "next_tick",
    f"""
SELECT extract(epoch FROM min(next_tick_at) - clock_timestamp())::float8
{_OURS}
""",
    job_types="text[]",
    declared="text[]",
)


def seconds_until_tick(connection: Connection, *, job_types: Sequence[str], declared: Sequence[str]) -> float | None:
    """Seconds until the next tick of those schedules, negative when it is overdue; None when there is none."""
    with connection.cursor() as cursor:
        _NEXT_TICK.run(cursor, {"job_types": list(job_types), "declared": list(declared)})
        row = cursor.fetchone()
        return None if row is None else row[0]


_UNFINISHED = """
SELECT EXISTS (
    SELECT
    FROM background_jobs
    WHERE id = %(id)s
        AND state IN ('scheduled', 'available', 'running')
)
"""


def is_unfinished(connection: Connection, id: int) -> bool:
    """Whether a job waits, for another attempt perhaps, or runs."""
    with connection.cursor() as cursor:
        cursor.execute(_UNFINISHED, {"id": id})
        row = cursor.fetchone()
        return row is not None and bool(row[0])


def now(connection: Connection) -> datetime:
    """What time it is, by the clock that decides it; also on a connection of the caller's, in its transaction."""
    with connection.cursor(cursor_factory=TupleCursor) as cursor:
        cursor.execute("SELECT clock_timestamp()")
        (instant,) = cursor.fetchone() or (None,)
        assert isinstance(instant, datetime)
        return instant


# --- queues, for people -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QueueServer:
    """A live runner that serves a queue, and how many jobs of it at a time, as it was started.

    `share` is the number of slots that the queue shares with others there, None where its pool is its own.
    """

    runner: int
    hostname: str
    pid: int
    pool: int
    share: int | None


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue as it was when somebody looked: one that has rows, is served by a live runner, or was paused or resized.

    `waiting` counts jobs that could run now, `scheduled` those for later, retries included. `pool` is the one that was
    set at run time, None where every server has its own. `changed_at` is when somebody last paused or resized it.
    """

    name: str
    waiting: int
    running: int
    scheduled: int
    failed: int
    paused: bool
    pool: int | None
    changed_at: datetime | None
    servers: Sequence[QueueServer]


_QUEUES_AT_RUN_TIME = f"""
WITH counted AS (
    SELECT
        queue AS name,
        count(*) FILTER (WHERE state = 'available') AS waiting,
        count(*) FILTER (WHERE state = 'running') AS running,
        count(*) FILTER (WHERE state = 'scheduled') AS scheduled,
        count(*) FILTER (WHERE state = 'failed') AS failed
    FROM background_jobs
    WHERE queue IS NOT NULL
        AND (%(names)s::text[] IS NULL OR queue = ANY(%(names)s::text[]))
    GROUP BY queue
), served AS (
    SELECT
        queue.key AS name,
        jsonb_agg(
            jsonb_build_array(id, hostname, pid, queue.value -> 'pool', queue.value -> 'share') ORDER BY id
        ) AS servers
    FROM background_runners
    CROSS JOIN jsonb_each(queues) AS queue
    WHERE {_LIVES}
        AND ended_at IS NULL
        AND (%(names)s::text[] IS NULL OR queue.key = ANY(%(names)s::text[]))
    GROUP BY queue.key
), said AS (
    SELECT name, paused, pool, changed_at
    FROM background_queues
    WHERE %(names)s::text[] IS NULL
        OR name = ANY(%(names)s::text[])
)
SELECT
    name,
    coalesce(waiting, 0),
    coalesce(running, 0),
    coalesce(scheduled, 0),
    coalesce(failed, 0),
    coalesce(paused, false),
    pool,
    changed_at,
    coalesce(servers, '[]')
FROM counted
FULL JOIN served USING (name)
FULL JOIN said USING (name)
ORDER BY name
"""


def queues(connection: Connection, names: Sequence[str] | None = None) -> list[Queue]:
    """All queues by name, or those of these names. Counts every row: for people, not for loops."""
    with connection.cursor() as cursor:
        cursor.execute(_QUEUES_AT_RUN_TIME, {"names": None if names is None else list(names)})
        rows = [(*row[:-1], [QueueServer(*server) for server in row[-1]]) for row in cursor.fetchall()]
        return [Queue(*row) for row in rows]


_KNOWN_QUEUES = f"""
SELECT asked.name
FROM unnest(%(names)s::text[]) AS asked (name)
WHERE EXISTS (SELECT FROM background_jobs WHERE queue = asked.name)
    OR EXISTS (SELECT FROM background_queues WHERE background_queues.name = asked.name)
    OR EXISTS (SELECT FROM background_runners WHERE queues ? asked.name AND ended_at IS NULL AND {_LIVES})
"""


def known_queues(connection: Connection, names: Sequence[str]) -> set[str]:
    """Those of the names that `queues` would find."""
    with connection.cursor() as cursor:
        cursor.execute(_KNOWN_QUEUES, {"names": list(names)})
        return {row[0] for row in cursor.fetchall()}


_HAS_WRITTEN = """
SELECT pg_current_xact_id_if_assigned() IS NOT NULL
"""


def has_written(connection: Connection) -> bool:
    """Whether the open transaction of this connection has changed anything so far."""
    with connection.cursor(cursor_factory=TupleCursor) as cursor:
        cursor.execute(_HAS_WRITTEN)
        (has_written,) = cursor.fetchone() or (False,)
        return bool(has_written)
