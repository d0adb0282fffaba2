"""Every statement that changes rows of jobs, runners and waiting workers.

Each function takes an autocommit connection (or, to enqueue, the caller's own, in its transaction) and does one
statement, so that nothing is ever half done. Changes to a claimed job are fenced by owner and attempt: they name the
runner and the attempt they speak for, and leave alone a row that has moved on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from psycopg2 import errors
from psycopg2.extensions import cursor as TupleCursor  # whatever kind a caller's connection makes by itself

from greenjobs.statement import Statement

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import cursor as Cursor

logger = logging.getLogger(__name__)

CHANNEL = "greenjobs"

# Errors of the last attempts kept on the row; more would make every later change of the row dearer.
KEPT_ERRORS = 10

_DEADLOCK_ROUNDS = 5

# A unique key that is contested while rows go back to waiting: each round resolves what the last one ran into.
_CONTEST_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class NewJobs:
    """Jobs of one type to enqueue together. `data` is a JSON object as text for each.

    `run_at` (aware) wins over `delay_seconds`. `unique_keys` has a key for each job, or is None for none. `options` is
    a JSON object as text: what all of them say otherwise than their job.
    """

    job_type: str
    data: Sequence[str]
    queue: str
    priority: int = 0
    delay_seconds: float = 0.0
    run_at: datetime | None = None
    unique_keys: Sequence[str] | None = None
    options: str | None = None


class Enqueued(NamedTuple):
    """What became of a new job: the id of its row, or that of the unstarted job that it duplicates."""

    id: int
    is_duplicate: bool


class ClaimedJob(NamedTuple):
    """A row as the claim returns it.

    `data` and `options` are JSON texts, `created_at` is in seconds since 1970, `waited` in seconds.
    """

    id: int
    job_type: str
    data: str
    attempt: int
    retries: int
    priority: int
    crashes: int
    created_at: float
    waited: float
    options: str | None


class ClaimCursor(NamedTuple):
    """A place in the order in which jobs are claimed."""

    negative_priority: int
    id: int


class Fence(NamedTuple):
    """The claim that a change speaks for. Together with the ids of its runner it fits one claim ever."""

    id: int
    attempt: int


class Failure(NamedTuple):
    """A failed attempt: seconds until the next, or None for never again; and the error, to be kept as a JSON object."""

    fence: Fence
    retry_in: float | None
    error: Mapping[str, Any]


class Snoozed(NamedTuple):
    """An attempt that is to be made again, as if it had not been made, in so many seconds."""

    fence: Fence
    seconds: float


class Rescued(NamedTuple):
    """One job that was taken from a dead runner: whether it waits again, or failed because too many of them died."""

    id: int
    job_type: str
    queue: str
    crashes: int
    has_failed: bool


# --- enqueue ----------------------------------------------------------------------------------------------------------

# Jobs that are due are born available. The statement says whether somebody waits for them, and whether they are due
# sooner than a promoter looks by itself; only then is there a second one, which notifies. NOTIFY takes a lock on the
# whole database when it commits, so a busy system had better do without.
_ENQUEUE = """
INSERT INTO background_jobs (job_type, data, queue, priority, run_at, state, options{key_column})
SELECT
    %(job_type)s,
    given.data,
    %(queue)s,
    %(priority)s,
    coalesce(%(run_at)s, now() + make_interval(secs => %(delay)s)),
    CASE
        WHEN coalesce(%(run_at)s, now() + make_interval(secs => %(delay)s)) > now() THEN 'scheduled'
        ELSE 'available'
    END,
    %(options)s
    {key}
FROM {given}
ORDER BY given.place
{on_conflict}
RETURNING
    id,
    {notify}
    {key_column}
"""

_PLAIN = {
    "key_column": "",
    "key": "",
    "given": "jsonb_array_elements(%(data)s) WITH ORDINALITY AS given (data, place)",
    "on_conflict": "",
}

_UNIQUE = {
    "key_column": ", unique_key",
    "key": ", given.key",
    "given": "ROWS FROM (jsonb_array_elements(%(data)s), unnest(%(keys)s)) WITH ORDINALITY AS given (data, key, place)",
    "on_conflict": """ON CONFLICT (unique_key)
    WHERE unique_key IS NOT NULL AND state IN ('scheduled', 'available')
    DO NOTHING""",
}

_SOMEBODY_WAITS = {
    "notify": """CASE
        WHEN state = 'available' THEN EXISTS (
            SELECT
            FROM background_waiting
            WHERE background_waiting.queue = %(queue)s
        )
        ELSE run_at < now() + interval '2 seconds'
    END"""
}

# The caller's transaction may take its time to commit, and who waits now says nothing about then. So it always
# notifies; PostgreSQL folds equal notifications of one transaction into one.
_NOTIFY_ALWAYS = {
    "notify": """CASE
        WHEN state = 'available' THEN pg_notify('greenjobs', '*:' || %(queue)s) IS NULL
        WHEN run_at < now() + interval '2 seconds' THEN pg_notify('greenjobs', 'due') IS NULL
    END"""
}

_ENQUEUE_TYPES = {
    "job_type": "text",
    "data": "jsonb",
    "queue": "text",
    "priority": "smallint",
    "run_at": "timestamptz",
    "delay": "float8",
    "options": "jsonb",
}


def _enqueue_statement(name: str, jobs: Mapping[str, str], notify: Mapping[str, str], **types: str) -> Statement:
    # Parameters are typed in place for connections on which nothing is prepared.
    typed = {parameter: f"%({parameter})s::{type}" for parameter, type in {**_ENQUEUE_TYPES, **types}.items()}
    text = _ENQUEUE.format(**jobs, **notify)
    for parameter, cast in typed.items():
        text = text.replace(f"%({parameter})s", cast)
    return Statement(name, text, **_ENQUEUE_TYPES, **types)


_ENQUEUE_STATEMENTS = {
    (False, False): _enqueue_statement("enqueue", _PLAIN, _SOMEBODY_WAITS),
    (True, False): _enqueue_statement("enqueue_unique", _UNIQUE, _SOMEBODY_WAITS, keys="text[]"),
    (False, True): _enqueue_statement("enqueue_inside", _PLAIN, _NOTIFY_ALWAYS),
    (True, True): _enqueue_statement("enqueue_unique_inside", _UNIQUE, _NOTIFY_ALWAYS, keys="text[]"),
}

# As many waiting workers are woken as there are jobs. The promoters are, when none of the jobs is available yet.
_NOTIFY = Statement(
    "notify",
    """
WITH woken AS (
    DELETE FROM background_waiting
    WHERE (queue, runner) IN (
        SELECT queue, runner
        FROM background_waiting
        WHERE queue = %(queue)s
        LIMIT %(count)s
        FOR UPDATE SKIP LOCKED
    )
    RETURNING runner
)
SELECT pg_notify('greenjobs', runner || ':' || %(queue)s)
FROM woken
UNION ALL
SELECT pg_notify('greenjobs', 'due')
WHERE %(is_later)s
""",
    queue="text",
    count="int",
    is_later="bool",
)

_UNSTARTED = """
SELECT unique_key, id
FROM background_jobs
WHERE unique_key = ANY(%(keys)s)
    AND state IN ('scheduled', 'available')
"""

# A promoter looks at least this often. Jobs due within twice that time of being enqueued notify it.
PROMOTER_SECONDS = 1.0


def enqueue(connection: Connection, batches: Sequence[NewJobs]) -> list[Enqueued]:
    """Insert the jobs, in order, all or none, on an idle autocommit connection; committed; and wake who waits for them.

    A job whose unique key an unstarted job has already is not inserted; the other's id stands in its place.
    """
    for _ in range(_DEADLOCK_ROUNDS):
        try:
            return _enqueue_alone(connection, batches)
        except errors.DeadlockDetected:
            # Two that enqueue the same unique jobs, each in another order; one of them was undone, and comes later now.
            logger.debug("%s: enqueuing met a deadlock, once more", batches[0].job_type)
    return _enqueue_alone(connection, batches)


def _enqueue_alone(connection: Connection, batches: Sequence[NewJobs]) -> list[Enqueued]:
    if len(batches) == 1:
        return _enqueue(connection, batches[0], in_transaction=False)
    with atomic(connection):
        return enqueue_inside(connection, batches)


def enqueue_inside(connection: Connection, batches: Sequence[NewJobs]) -> list[Enqueued]:
    """As `enqueue`, in the transaction of the connection, which is the caller's to commit.

    psycopg2 does not tell for certain whether there is one: `with connection:` makes autocommit wait, and looks idle.
    """
    return [row for jobs in batches for row in _enqueue(connection, jobs, in_transaction=True)]


@contextlib.contextmanager
def atomic(connection: Connection) -> Iterator[None]:
    """Make what is done on an autocommit connection inside one transaction."""
    connection.autocommit = False
    try:
        with connection:
            yield
    finally:
        if not connection.closed:
            connection.autocommit = True


def _enqueue(connection: Connection, jobs: NewJobs, *, in_transaction: bool) -> list[Enqueued]:
    statement = _ENQUEUE_STATEMENTS[jobs.unique_keys is not None, in_transaction]
    parameters = {
        "job_type": jobs.job_type,
        "queue": jobs.queue,
        "priority": jobs.priority,
        "run_at": jobs.run_at,
        "delay": jobs.delay_seconds,
        "options": jobs.options,
    }
    cursor = connection.cursor(cursor_factory=TupleCursor)
    if jobs.unique_keys is not None:
        return _enqueue_unique(cursor, statement, parameters, jobs, jobs.unique_keys, in_transaction)
    parameters["data"] = _json_array(jobs.data)
    statement.run(cursor, parameters)
    rows = cursor.fetchall()
    if rows[0][1] and not in_transaction:
        _notify(cursor, jobs)
    # The serial numbers were drawn in the order of the jobs, whatever the order in which they come back.
    return [Enqueued(row[0], False) for row in sorted(rows)]


def _enqueue_unique(
    cursor: Cursor,
    statement: Statement,
    parameters: dict[str, Any],
    jobs: NewJobs,
    keys: Sequence[str],
    in_transaction: bool,
) -> list[Enqueued]:
    pending: dict[str, str] = {}
    for key, data in zip(keys, jobs.data, strict=True):
        pending.setdefault(key, data)  # of equal keys the first one counts
    found: dict[str, Enqueued] = {}
    while pending:
        statement.run(cursor, {**parameters, "data": _json_array(pending.values()), "keys": list(pending)})
        rows = cursor.fetchall()
        for id, _, key in rows:
            found[key] = Enqueued(id, False)
            del pending[key]
        if rows and rows[0][1] and not in_transaction:
            _notify(cursor, jobs)
        if pending:
            # The statement's snapshot may be older than the row it ran into, so that only a new look sees it. A job
            # that started between the two looks has let go of its key: once more, then.
            cursor.execute(_UNSTARTED, {"keys": list(pending)})
            for key, id in cursor.fetchall():
                found[key] = Enqueued(id, True)
                del pending[key]
    enqueued = []
    for key in keys:
        enqueued.append(found[key])
        found[key] = Enqueued(found[key].id, True)
    return enqueued


def _notify(cursor: Cursor, jobs: NewJobs) -> None:
    is_later = jobs.run_at is not None or jobs.delay_seconds > 0
    _NOTIFY.run(cursor, {"queue": jobs.queue, "count": len(jobs.data), "is_later": is_later})


def _json_array(items: Iterable[str]) -> str:
    return "[" + ",".join(items) + "]"


def unique_key(job_type: str, data: str) -> str:
    """The key under which jobs of the same type and data are one: a digest of both, blind to the order of keys."""
    canonical = orjson.dumps(orjson.loads(data), option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(job_type.encode() + b"\0" + canonical, digest_size=16).hexdigest()


# --- claim ------------------------------------------------------------------------------------------------------------

# An array in place of a join: the planner always reads it through the primary key, however wrong its statistics are.
_CLAIM = """
UPDATE background_jobs
SET
    state = 'running',
    attempt = attempt + 1,
    claimed_by = %(runner)s,
    claimed_at = now()
WHERE id = ANY(ARRAY(
    SELECT id
    FROM background_jobs
    WHERE queue = %(queue)s
        AND state = 'available'
        AND {which}
        AND job_type = ANY(%(job_types)s)
        {behind}
    ORDER BY (-priority), id
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
RETURNING
    id,
    job_type,
    data::text,
    attempt,
    retries,
    priority,
    crashes,
    date_part('epoch', created_at),
    date_part('epoch', now() - greatest(run_at, created_at)),
    options::text
"""

_CLAIM_TYPES = {"runner": "int", "queue": "text", "job_types": "text[]", "limit": "int"}

_CLAIM_FROM_TOP = Statement("claim_from_top", _CLAIM.format(which="crashes = 0", behind=""), **_CLAIM_TYPES)
_CLAIM_SUSPECT = Statement("claim_suspect", _CLAIM.format(which="crashes > 0", behind=""), **_CLAIM_TYPES)

# The entries before the cursor are mostly dead: jobs that are done, which no vacuum has removed yet, perhaps cannot
# while some transaction goes on. A row comparison lets the scan begin behind them.
_CLAIM_BEHIND = Statement(
    "claim_behind",
    _CLAIM.format(which="crashes = 0", behind="AND ((-priority), id) > (%(negative_priority)s, %(id)s)"),
    **_CLAIM_TYPES,
    negative_priority="smallint",
    id="bigint",
)


def claim(
    connection: Connection,
    *,
    runner: int,
    queue: str,
    job_types: Sequence[str],
    limit: int,
    suspects: bool = False,
    after: ClaimCursor | None = None,
) -> list[ClaimedJob]:
    """Take up to `limit` available jobs of these types, highest priority first, then oldest.

    With `suspects`, only jobs whose runner died are taken; without, only others. `after` begins behind that place.
    """
    parameters: dict[str, Any] = {"runner": runner, "queue": queue, "job_types": job_types, "limit": limit}
    if after is None:
        statement = _CLAIM_SUSPECT if suspects else _CLAIM_FROM_TOP
    else:
        statement = _CLAIM_BEHIND
        parameters.update(after._asdict())
    with connection.cursor() as cursor:
        statement.run(cursor, parameters)
        claimed = [ClaimedJob._make(row) for row in cursor.fetchall()]
    claimed.sort(key=claim_order)
    return claimed


def claim_order(job: ClaimedJob) -> ClaimCursor:
    """The key of the order in which jobs are claimed."""
    return ClaimCursor(-job.priority, job.id)


# --- acknowledge ------------------------------------------------------------------------------------------------------

# A process that lost its session and registered again has several ids; what it claimed under any of them is its own.
_FENCED = """
unnest(%(ids)s::bigint[], %(attempts)s::int[]) AS fence (id, attempt)
WHERE job.id = fence.id
    AND job.attempt = fence.attempt
    AND job.claimed_by = ANY(%(runners)s::int[])
"""

_FENCE_TYPES = {"ids": "bigint[]", "attempts": "int[]", "runners": "int[]"}

_ACKNOWLEDGE = Statement(
    "acknowledge",
    f"""
DELETE FROM background_jobs AS job
USING {_FENCED}
RETURNING job.id
""",
    **_FENCE_TYPES,
)


def acknowledge(connection: Connection, runners: Sequence[int], done: Sequence[Fence]) -> set[int]:
    """Delete finished jobs of a process that registered as these runners; returns the ids of those still held.

    The others are left as they are.
    """
    with connection.cursor() as cursor:
        _ACKNOWLEDGE.run(cursor, _fences(runners, done))
        return {row[0] for row in cursor.fetchall()}


_FAIL = """
UPDATE background_jobs AS job
SET
    state = CASE WHEN failure.retry_in IS NULL THEN 'failed' ELSE 'scheduled' END,
    retries = job.retries + 1,
    last_retry = now(),
    run_at = now() + make_interval(secs => coalesce(failure.retry_in, 0)),
    claimed_by = NULL,
    claimed_at = NULL,
    errors = (
        SELECT jsonb_agg(kept.error ORDER BY kept.place)
        FROM (
            SELECT error, place
            FROM jsonb_array_elements(coalesce(job.errors, '[]') || failure.error)
                WITH ORDINALITY AS every (error, place)
            ORDER BY place DESC
            LIMIT %(kept)s
        ) AS kept
    )
FROM jsonb_to_recordset(%(failures)s::jsonb)
    AS failure (id bigint, attempt int, retry_in float8, error jsonb)
WHERE job.id = failure.id
    AND job.attempt = failure.attempt
    AND job.claimed_by = ANY(%(runners)s::int[])
RETURNING job.id
"""


def fail(connection: Connection, runners: Sequence[int], failures: Sequence[Failure]) -> set[int]:
    """Write down failed attempts: each job waits for its next, or stays as failed. Returns the ids still held."""
    document = orjson.dumps(
        [{**failure.fence._asdict(), "retry_in": failure.retry_in, "error": failure.error} for failure in failures]
    ).decode()
    held = [failure.fence.id for failure in failures]
    return _to_waiting(connection, held, _FAIL, {"failures": document, "runners": list(runners), "kept": KEPT_ERRORS})


_GIVE_BACK = f"""
UPDATE background_jobs AS job
SET
    state = 'available',
    claimed_by = NULL,
    claimed_at = NULL
FROM {_FENCED}
RETURNING job.id
"""


def give_back(connection: Connection, runners: Sequence[int], unfinished: Sequence[Fence]) -> set[int]:
    """Make claimed jobs available again without counting anything; returns the ids still held."""
    held = [fence.id for fence in unfinished]
    return _to_waiting(connection, held, _GIVE_BACK, _fences(runners, unfinished))


_SNOOZE = """
UPDATE background_jobs AS job
SET
    state = 'scheduled',
    run_at = now() + make_interval(secs => snoozed.seconds),
    claimed_by = NULL,
    claimed_at = NULL
FROM unnest(%(ids)s::bigint[], %(attempts)s::int[], %(seconds)s::float8[]) AS snoozed (id, attempt, seconds)
WHERE job.id = snoozed.id
    AND job.attempt = snoozed.attempt
    AND job.claimed_by = ANY(%(runners)s::int[])
RETURNING job.id
"""


def snooze(connection: Connection, runners: Sequence[int], snoozed: Sequence[Snoozed]) -> set[int]:
    """Put claimed jobs off without counting anything; returns the ids still held."""
    fences = [each.fence for each in snoozed]
    parameters = {**_fences(runners, fences), "seconds": [each.seconds for each in snoozed]}
    return _to_waiting(connection, [fence.id for fence in fences], _SNOOZE, parameters)


_DROP_CONTESTED_KEYS = """
UPDATE background_jobs AS job
SET unique_key = NULL
WHERE job.id = ANY(%(ids)s)
    AND job.state = 'running'
    AND EXISTS (
        SELECT
        FROM background_jobs AS other
        WHERE other.unique_key = job.unique_key
            AND (other.state IN ('scheduled', 'available') OR (other.id = ANY(%(ids)s) AND other.id < job.id))
    )
"""


def _to_waiting(connection: Connection, ids: Sequence[int], statement: str, parameters: Mapping[str, Any]) -> set[int]:
    """Run a statement that sends running jobs back to waiting, where each wants its unique key again.

    A job started let go of its key, and another may have it by now. That one is the unstarted job of the key then, and
    the older goes on without.
    """
    for round in range(_CONTEST_ROUNDS):
        with connection.cursor() as cursor:
            try:
                cursor.execute(statement, parameters)
                return {row[0] for row in cursor.fetchall()}
            except errors.UniqueViolation:
                if round == _CONTEST_ROUNDS - 1:
                    raise
                cursor.execute(_DROP_CONTESTED_KEYS, {"ids": list(ids)})
    raise AssertionError("unreachable")


def _fences(runners: Sequence[int], fences: Sequence[Fence]) -> dict[str, Any]:
    ids, attempts = zip(*fences, strict=True)
    return {"ids": _int_array(ids), "attempts": _int_array(attempts), "runners": _int_array(runners)}


def _int_array(numbers: Iterable[int]) -> str:
    """PostgreSQL's text form of an array. psycopg2 would adapt every number by itself, which takes it longer than all
    else that an acknowledge does."""
    return "{" + ",".join(map(str, numbers)) + "}"


# --- cancel -----------------------------------------------------------------------------------------------------------

_REMOVE_WAITING = """
DELETE FROM background_jobs
WHERE id = ANY(%(ids)s)
    AND state IN ('scheduled', 'available')
RETURNING id
"""

_ASK_CANCEL = """
WITH asked AS (
    UPDATE background_jobs
    SET cancel_asked_at = now()
    WHERE id = ANY(%(ids)s)
        AND state = 'running'
    RETURNING id
)
SELECT id, pg_notify('greenjobs', 'cancel:' || id)
FROM asked
"""

# Between the two looks of one round a job may start, or go back to waiting; it is met in the next round, then.
_CANCEL_ROUNDS = 3


def cancel(connection: Connection, ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Remove those of these jobs that wait, and ask for the end of those that run; returns both, by id.

    Jobs that are done, failed or unknown are in neither.
    """
    removed: set[int] = set()
    asked: set[int] = set()
    for _ in range(_CANCEL_ROUNDS):
        pending = [id for id in ids if id not in removed and id not in asked]
        if not pending:
            break
        with connection.cursor() as cursor:
            cursor.execute(_REMOVE_WAITING, {"ids": pending})
            removed.update(row[0] for row in cursor.fetchall())
            cursor.execute(_ASK_CANCEL, {"ids": pending})
            asked.update(row[0] for row in cursor.fetchall())
    return sorted(removed), sorted(asked)


# A job whose end was asked for may have come back from a dead runner, or from one that stopped, instead of ending.
_REMOVE_CANCELLED = """
DELETE FROM background_jobs
WHERE cancel_asked_at IS NOT NULL
    AND state IN ('scheduled', 'available')
"""


def remove_cancelled(connection: Connection) -> int:
    """Remove jobs that were cancelled while they ran and wait again since; returns how many."""
    with connection.cursor() as cursor:
        cursor.execute(_REMOVE_CANCELLED)
        return cursor.rowcount


# --- promote, route, rescue -------------------------------------------------------------------------------------------

_PROMOTE = Statement(
    "promote",
    """
WITH promoted AS (
    UPDATE background_jobs
    SET state = 'available'
    WHERE id = ANY(ARRAY(
        SELECT id
        FROM background_jobs
        WHERE state = 'scheduled'
            AND run_at <= now()
        ORDER BY run_at
        LIMIT %(limit)s
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING queue
)
SELECT queue, count(*)
FROM promoted
GROUP BY queue
""",
    limit="int",
)


def promote(connection: Connection, *, limit: int) -> dict[str | None, int]:
    """Make up to `limit` jobs available whose time has come; returns how many in which queue."""
    with connection.cursor() as cursor:
        _PROMOTE.run(cursor, {"limit": limit})
        return dict(cursor.fetchall())


_ROUTE = Statement(
    "route",
    """
WITH routed AS (
    UPDATE background_jobs AS job
    SET queue = home.queue
    FROM unnest(%(job_types)s::text[], %(queues)s::text[]) AS home (job_type, queue)
    WHERE job.queue IS NULL
        AND job.job_type = home.job_type
    RETURNING job.queue
)
SELECT DISTINCT queue
FROM routed
""",
    job_types="text[]",
    queues="text[]",
)


def route(connection: Connection, home_queues: Mapping[str, str]) -> list[str]:
    """Put jobs without a queue, as the crate or plain SQL inserts them, where their type is at home; returns where."""
    with connection.cursor() as cursor:
        _ROUTE.run(cursor, {"job_types": list(home_queues), "queues": list(home_queues.values())})
        return [row[0] for row in cursor.fetchall()]


# The runner is blamed for at the moment it is found dead. What turns up later under its name is a claim that was still
# on its way to the server then, and never started.
_RESCUE = """
WITH dead AS (
    SELECT id, hostname, pid, memory_bytes, ended_at IS NULL AS is_news
    FROM background_runners
    WHERE id = ANY(%(runners)s)
),
held AS (
    SELECT
        job.id,
        dead.hostname,
        dead.pid,
        dead.memory_bytes,
        (
            dead.is_news
            AND (
                job.crashes > 0
                OR NOT EXISTS (
                    SELECT
                    FROM background_jobs AS suspect
                    WHERE suspect.state = 'running'
                        AND suspect.claimed_by = dead.id
                        AND suspect.crashes > 0
                )
            )
        )::int AS blame
    FROM dead
    JOIN background_jobs AS job ON job.state = 'running' AND job.claimed_by = dead.id
),
ended AS (
    UPDATE background_runners
    SET ended_at = now()
    WHERE id IN (SELECT id FROM dead WHERE is_news)
),
silenced AS (
    DELETE FROM background_waiting
    WHERE runner = ANY(%(runners)s)
)
UPDATE background_jobs AS job
SET
    state = CASE WHEN job.crashes + held.blame >= %(most_crashes)s THEN 'failed' ELSE 'available' END,
    crashes = job.crashes + held.blame,
    last_retry = now(),
    claimed_by = NULL,
    claimed_at = NULL,
    errors = CASE
        WHEN job.crashes + held.blame < %(most_crashes)s THEN job.errors
        ELSE coalesce(job.errors, '[]') || jsonb_build_object(
            'at', now(),
            'attempt', job.attempt,
            'error', 'RunnerDied',
            'message', format('its runner died %%s times', job.crashes + held.blame),
            'runner', held.hostname || ':' || held.pid,
            'memory_bytes', held.memory_bytes
        )
    END
FROM held
WHERE job.id = held.id
    AND job.state = 'running'
    AND job.claimed_by = ANY(%(runners)s)
RETURNING job.id, job.job_type, job.queue, job.crashes, job.state = 'failed'
"""

_HELD_BY = """
SELECT id
FROM background_jobs
WHERE state = 'running'
    AND claimed_by = ANY(%(runners)s)
"""


def rescue(connection: Connection, dead_runners: Sequence[int], *, most_crashes: int) -> list[Rescued]:
    """Take the jobs of dead runners back; those whose runner died `most_crashes` times are failed.

    Ids of runners are never used again, so whoever was dead is dead still. Any number of rescuers may work at once.
    """
    parameters = {"runners": list(dead_runners), "most_crashes": most_crashes}
    for _ in range(_CONTEST_ROUNDS):
        with connection.cursor() as cursor:
            try:
                cursor.execute(_RESCUE, parameters)
                return [Rescued._make(row) for row in cursor.fetchall()]
            except errors.UniqueViolation:
                cursor.execute(_HELD_BY, parameters)
                cursor.execute(_DROP_CONTESTED_KEYS, {"ids": [row[0] for row in cursor.fetchall()]})
    return []  # contested without end; the next look, seconds from now, tries again


# --- runners and who waits --------------------------------------------------------------------------------------------

_REGISTER = """
INSERT INTO background_runners (hostname, pid, version, queues, job_types, leased_until)
VALUES (
    %(hostname)s,
    %(pid)s,
    %(version)s,
    %(queues)s,
    %(job_types)s,
    now() + make_interval(secs => %(lease)s)
)
RETURNING id
"""

# The oid of the table is the class of the locks, so that two schemas in one database keep theirs apart.
_HOLD_SESSION = """
SELECT pg_advisory_lock('background_runners'::regclass::oid::int, %(runner)s)
"""


# What it claimed under its former ids, and nobody took over since, goes on under the new one.
_ADOPT = """
UPDATE background_jobs
SET claimed_by = %(runner)s
WHERE state = 'running'
    AND claimed_by = ANY(%(former)s)
"""

_END_FORMER = """
UPDATE background_runners
SET ended_at = now()
WHERE id = ANY(%(former)s)
    AND ended_at IS NULL
"""


def register_runner(
    connection: Connection,
    *,
    hostname: str,
    pid: int,
    version: str,
    queues: Mapping[str, Mapping[str, float]],
    job_types: Sequence[str],
    former: Sequence[int] = (),
    lease_seconds: float | None = None,
) -> int:
    """Register a runner whose life is that of this connection's session, or that of its lease; returns its id.

    The row is committed when the session holds its lock, so nobody ever sees the one without the other. A process that
    lost its session gives its `former` ids, and keeps the jobs that were not taken from it meanwhile.
    """
    with atomic(connection), connection.cursor() as cursor:
        cursor.execute(
            _REGISTER,
            {
                "hostname": hostname,
                "pid": pid,
                "version": version,
                "queues": orjson.dumps(queues).decode(),
                "job_types": list(job_types),
                "lease": lease_seconds,
            },
        )
        (runner,) = cursor.fetchone() or (0,)
        if lease_seconds is None:
            cursor.execute(_HOLD_SESSION, {"runner": runner})
        if former:
            cursor.execute(_ADOPT, {"runner": runner, "former": list(former)})
            cursor.execute(_END_FORMER, {"former": list(former)})
    return int(runner)


# A lease that ran out is gone for good: others may have acted on it.
_RENEW = """
UPDATE background_runners
SET leased_until = now() + make_interval(secs => %(lease)s)
WHERE id = %(runner)s
    AND leased_until > now()
    AND ended_at IS NULL
"""


def renew_lease(connection: Connection, runner: int, *, lease_seconds: float) -> bool:
    """Let the lease last that long from now on; False when it has run out already."""
    with connection.cursor() as cursor:
        cursor.execute(_RENEW, {"runner": runner, "lease": lease_seconds})
        return cursor.rowcount == 1


_NOTE_MEMORY = """
UPDATE background_runners
SET memory_bytes = %(memory)s
WHERE id = %(runner)s
"""


def note_memory(connection: Connection, runner: int, memory_bytes: int) -> None:
    """Write down how much memory a runner takes, for those who ask what it died of."""
    with connection.cursor() as cursor:
        cursor.execute(_NOTE_MEMORY, {"runner": runner, "memory": memory_bytes})


_HELD_FENCES = """
SELECT id, attempt, queue
FROM background_jobs
WHERE state = 'running'
    AND claimed_by = ANY(%(runners)s)
"""

_END_RUNNERS = """
WITH silenced AS (
    DELETE FROM background_waiting
    WHERE runner = ANY(%(runners)s)
)
UPDATE background_runners
SET ended_at = now()
WHERE id = ANY(%(runners)s)
"""


def end_runners(connection: Connection, runners: Sequence[int]) -> list[str]:
    """Note that a process ends in good order, and give back whatever it still holds; returns the queues of that."""
    with connection.cursor() as cursor:
        cursor.execute(_HELD_FENCES, {"runners": list(runners)})
        rows = cursor.fetchall()
        if rows:
            give_back(connection, runners, [Fence(id, attempt) for id, attempt, _ in rows])
        cursor.execute(_END_RUNNERS, {"runners": list(runners)})
    return sorted({queue for _, _, queue in rows})


_FORGET_RUNNERS = """
DELETE FROM background_runners
WHERE ended_at < now() - make_interval(secs => %(age)s)
    AND NOT EXISTS (
        SELECT
        FROM background_jobs
        WHERE state = 'running'
            AND claimed_by = background_runners.id
    )
"""


def forget_runners(connection: Connection, *, age_seconds: float) -> int:
    """Delete the register's entries of runners that ended that long ago; returns how many."""
    with connection.cursor() as cursor:
        cursor.execute(_FORGET_RUNNERS, {"age": age_seconds})
        return cursor.rowcount


_SAY_WAITING = Statement(
    "say_waiting",
    """
INSERT INTO background_waiting (queue, runner)
SELECT queue, %(runner)s
FROM unnest(%(queues)s::text[]) AS queue
ON CONFLICT DO NOTHING
""",
    runner="int",
    queues="text[]",
)


def say_waiting(connection: Connection, runner: int, queues: Sequence[str]) -> None:
    """Say that this runner has room in these queues, so that whoever enqueues there wakes it.

    An enqueue that began before this committed cannot know: look once more afterwards.
    """
    with connection.cursor() as cursor:
        _SAY_WAITING.run(cursor, {"runner": runner, "queues": list(queues)})


_WAKE = Statement(
    "wake",
    """
WITH woken AS (
    DELETE FROM background_waiting
    WHERE queue = ANY(%(queues)s)
    RETURNING queue, runner
)
SELECT pg_notify('greenjobs', runner || ':' || queue)
FROM woken
""",
    queues="text[]",
)


def wake(connection: Connection, queues: Sequence[str]) -> None:
    """Wake every worker that waits at one of these queues."""
    with connection.cursor() as cursor:
        _WAKE.run(cursor, {"queues": list(queues)})


# --- jobs that people change ------------------------------------------------------------------------------------------

# Locked in one order, so that two who change the same jobs wait for each other, and never in a circle. Whoever had to
# wait looks at the row anew: one that is claimed, retried or failed again by then is no longer the one that was chosen.
_CHOSEN = """
WITH chosen AS (
    SELECT job.id
    FROM unnest(%(ids)s::bigint[], %(attempts)s::int[]) AS fence (id, attempt)
    JOIN background_jobs AS job ON job.id = fence.id
    WHERE job.attempt = fence.attempt
        AND job.state = ANY(%(states)s)
    ORDER BY job.id
    FOR UPDATE OF job
)
"""

# Whose runner died stays a suspect, which is claimed alone; but one death is not the last yet.
_RETRY = f"""
{_CHOSEN}
UPDATE background_jobs AS job
SET
    state = 'available',
    run_at = now(),
    cancel_asked_at = NULL,
    retries = CASE job.state WHEN 'failed' THEN 0 ELSE job.retries END,
    crashes = CASE job.state WHEN 'failed' THEN least(job.crashes, 1) ELSE job.crashes END
FROM chosen
WHERE job.id = chosen.id
RETURNING job.id, job.queue
"""


def retry(connection: Connection, chosen: Sequence[Fence], *, states: Sequence[str]) -> dict[int, str | None]:
    """Make jobs in these states available, with all their retries before them; returns their queues by id.

    Those that have moved on since they were chosen are left alone. Raises UniqueViolation, and has changed nothing,
    when another job with the unique key of one of them has not started.
    """
    with connection.cursor() as cursor:
        cursor.execute(_RETRY, {**_chosen(chosen), "states": list(states)})
        return dict(cursor.fetchall())


_DISCARD = f"""
{_CHOSEN}
DELETE FROM background_jobs AS job
USING chosen
WHERE job.id = chosen.id
RETURNING job.id
"""


def discard(connection: Connection, chosen: Sequence[Fence], *, states: Sequence[str]) -> set[int]:
    """Delete jobs in these states, of which running must not be one; returns the ids of those that were deleted.

    Those that have moved on since they were chosen are left alone.
    """
    with connection.cursor() as cursor:
        cursor.execute(_DISCARD, {**_chosen(chosen), "states": list(states)})
        return {row[0] for row in cursor.fetchall()}


def _chosen(chosen: Sequence[Fence]) -> dict[str, Any]:
    return {
        "ids": _int_array(fence.id for fence in chosen),
        "attempts": _int_array(fence.attempt for fence in chosen),
    }


# A row that was inserted as failed, or made so by hand, may say that it was last tried in 1970.
_PRUNE = """
DELETE FROM background_jobs
WHERE id = ANY(ARRAY(
    SELECT id
    FROM background_jobs
    WHERE state = 'failed'
        AND last_retry < now() - make_interval(secs => %(age)s)
        AND created_at < now() - make_interval(secs => %(age)s)
    ORDER BY last_retry
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
"""


def prune(connection: Connection, *, age_seconds: float, limit: int) -> int:
    """Delete up to `limit` jobs that failed that long ago, the oldest first; returns how many."""
    with connection.cursor() as cursor:
        cursor.execute(_PRUNE, {"age": age_seconds, "limit": limit})
        return cursor.rowcount


# --- schedules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewSchedule:
    """A schedule to be kept. `data` is a JSON object as text; a queue or a priority of None is that of the job.

    `next_tick_at` counts for a schedule that is new, or whose ticks have changed.
    """

    name: str
    job_type: str
    cron: str
    timezone: str
    data: str
    queue: str | None
    priority: int | None
    catch_up: str
    overlap: bool
    source: str
    next_tick_at: datetime


# Where nothing changes about its ticks, it goes on from where it was: those that were missed are still to be looked at.
_KEEP_SCHEDULE = """
INSERT INTO background_schedules AS known (
    name,
    job_type,
    cron,
    timezone,
    data,
    queue,
    priority,
    catch_up,
    overlap,
    source,
    declared_by,
    next_tick_at
)
VALUES (
    %(name)s,
    %(job_type)s,
    %(cron)s,
    %(timezone)s,
    %(data)s,
    %(queue)s,
    %(priority)s,
    %(catch_up)s,
    %(overlap)s,
    %(source)s,
    %(declared_by)s,
    %(next_tick_at)s
)
ON CONFLICT (name) DO UPDATE
SET
    job_type = excluded.job_type,
    cron = excluded.cron,
    timezone = excluded.timezone,
    data = excluded.data,
    queue = excluded.queue,
    priority = excluded.priority,
    catch_up = excluded.catch_up,
    overlap = excluded.overlap,
    source = excluded.source,
    declared_by = excluded.declared_by,
    next_tick_at = CASE
        WHEN (known.cron, known.timezone) = (excluded.cron, excluded.timezone) THEN known.next_tick_at
        ELSE excluded.next_tick_at
    END
WHERE (known.source = 'api') = (excluded.source = 'api')
"""


def keep_schedule(connection: Connection, schedule: NewSchedule, *, declared_by: int | None = None) -> bool:
    """Insert a schedule, or let it replace the one of its name; `declared_by` is the runner, None for source 'api'.

    False, and nothing is changed, when that name belongs to the API and the new one does not, or the other way round.
    """
    with connection.cursor() as cursor:
        parameters = {field: getattr(schedule, field) for field in NewSchedule.__slots__}
        cursor.execute(_KEEP_SCHEDULE, {**parameters, "declared_by": declared_by})
        return cursor.rowcount == 1


_DROP_SCHEDULE = """
DELETE FROM background_schedules
WHERE name = %(name)s
    AND declared_by IS NOT DISTINCT FROM %(declared_by)s
"""


def drop_schedule(connection: Connection, name: str, *, declared_by: int | None) -> bool:
    """Delete a schedule if it still belongs to that runner, or to the API; whether it was there."""
    with connection.cursor() as cursor:
        cursor.execute(_DROP_SCHEDULE, {"name": name, "declared_by": declared_by})
        return cursor.rowcount == 1


_PAUSE_SCHEDULE = """
UPDATE background_schedules
SET
    paused = %(paused)s,
    next_tick_at = coalesce(%(next_tick_at)s, next_tick_at)
WHERE name = %(name)s
    AND paused <> %(paused)s
"""


def pause_schedule(connection: Connection, name: str, *, paused: bool, next_tick_at: datetime | None = None) -> bool:
    """Let a schedule enqueue nothing, or go on from that tick; False when it is so already, or is not there."""
    with connection.cursor() as cursor:
        cursor.execute(_PAUSE_SCHEDULE, {"name": name, "paused": paused, "next_tick_at": next_tick_at})
        return cursor.rowcount == 1


# Of all who saw the same tick one gets here first, and holds the row until its jobs are committed with it. The others
# wait for that, find another tick, and change nothing; when the first one died instead, the next takes its place.
_TAKE_TICKS = """
UPDATE background_schedules
SET next_tick_at = %(next)s
WHERE name = %(name)s
    AND next_tick_at = %(seen)s
    AND job_type = %(job_type)s
    AND cron = %(cron)s
    AND timezone = %(timezone)s
    AND catch_up = %(catch_up)s
    AND NOT paused
RETURNING data::text, queue, priority, overlap, last_job_id
"""


class TakenTicks(NamedTuple):
    """What a schedule enqueues, as it is at this moment. `data` is JSON text."""

    data: str
    queue: str | None
    priority: int | None
    overlap: bool
    last_job_id: int | None


def take_ticks(
    connection: Connection,
    name: str,
    *,
    job_type: str,
    cron: str,
    timezone: str,
    catch_up: str,
    seen: datetime,
    next: datetime,
) -> TakenTicks | None:
    """Move a schedule on from the tick that was seen to `next`; None when somebody else has, or it is another by now.

    In a transaction of the caller's, in which the jobs are enqueued, too.
    """
    parameters = {
        "name": name,
        "job_type": job_type,
        "cron": cron,
        "timezone": timezone,
        "catch_up": catch_up,
        "seen": seen,
        "next": next,
    }
    with connection.cursor() as cursor:
        cursor.execute(_TAKE_TICKS, parameters)
        row = cursor.fetchone()
        return None if row is None else TakenTicks._make(row)


_NOTE_TICK = """
UPDATE background_schedules
SET
    last_tick_at = %(tick)s,
    last_job_id = %(job)s
WHERE name = %(name)s
"""


def note_tick(connection: Connection, name: str, *, tick: datetime, job: int) -> None:
    """Write down the last tick that a job was enqueued for, in the transaction that did it."""
    with connection.cursor() as cursor:
        cursor.execute(_NOTE_TICK, {"name": name, "tick": tick, "job": job})
