"""Jobs come in."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from psycopg2 import errors
from psycopg2.extensions import cursor as TupleCursor  # whatever kind a caller's connection makes by itself

from greenjobs.statement import Statement
from greenjobs.storage.transaction import atomic

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import cursor as Cursor


logger = logging.getLogger(__name__)

_DEADLOCK_ROUNDS = 5
_DEADLOCK_SECONDS = 0.2


class NewJobs(NamedTuple):
    """Jobs of one type to enqueue together. `data` is a JSON object as text for each.

    `run_at` (aware) wins over `delay_seconds`. `unique_keys` has a key for each job, or is None for none; so has
    `exclusive_keys`. `options` is a JSON object as text: what all of them say otherwise than their job. They expire
    `expires_seconds` after they are due, or at `expires_at` (aware), which wins.
    """

    job_type: str
    data: Sequence[str]
    queue: str
    priority: int = 0
    delay_seconds: float = 0.0
    run_at: datetime | None = None
    unique_keys: Sequence[str] | None = None
    options: str | None = None
    expires_seconds: float | None = None
    expires_at: datetime | None = None
    exclusive_keys: Sequence[str] | None = None


class Enqueued(NamedTuple):
    """What became of a new job: the id of its row, or that of the unstarted job that it duplicates."""

    id: int
    is_duplicate: bool


# Jobs that are due are born available. The statement says whether somebody waits for them, and whether they are due
# sooner than a promoter looks by itself; only then is there a second one, which notifies. NOTIFY takes a lock on the
# whole database when it commits, so a busy system had better do without.
_ENQUEUE = """
INSERT INTO background_jobs (
    {id_column}job_type, data, queue, priority, run_at, state, options{key_column}{bounds_columns}
)
SELECT
    {id}
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
    {bounds}
FROM {given}
ORDER BY {order}
{on_conflict}
RETURNING
    id,
    {notify}
    {key_column}
"""

_PLAIN = {
    "id_column": "",
    "id": "",
    "key_column": "",
    "key": "",
    "bounds_columns": "",
    "bounds": "",
    "given": "jsonb_array_elements(%(data)s) WITH ORDINALITY AS given (data, place)",
    "order": "given.place",
    "on_conflict": "",
}

# Numbered in the order of the jobs, inserted in that of their keys: two statements that meet in several keys then wait
# for one another instead of ending in a deadlock.
_UNIQUE = {
    "id_column": "id, ",
    "id": "given.id,",
    "key_column": ", unique_key",
    "key": ", given.key",
    "bounds_columns": "",
    "bounds": "",
    "given": """(
    SELECT
        nextval((SELECT pg_get_serial_sequence('background_jobs', 'id')::regclass)) AS id,
        listed.data,
        listed.key
    FROM ROWS FROM (jsonb_array_elements(%(data)s), unnest(%(keys)s)) WITH ORDINALITY AS listed (data, key, place)
    ORDER BY listed.place
) AS given""",
    "order": "given.key",
    "on_conflict": """ON CONFLICT (unique_key)
    WHERE unique_key IS NOT NULL AND state IN ('scheduled', 'available')
    DO NOTHING""",
}

# What bounds a job in time: when it expires, and which others it excludes. Both in one form; most jobs have neither.
_BOUNDS = {
    "bounds_columns": ", expires_at, exclusive_key",
    "bounds": """, coalesce(
        %(expires_at)s,
        coalesce(%(run_at)s, now() + make_interval(secs => %(delay)s)) + make_interval(secs => %(expires)s)
    ),
    given.exclusive_key""",
}

_BOUND_PLAIN = {
    **_PLAIN,
    **_BOUNDS,
    "given": "ROWS FROM (jsonb_array_elements(%(data)s), unnest(%(exclusive_keys)s)) WITH ORDINALITY"
    " AS given (data, exclusive_key, place)",
}

_BOUND_UNIQUE = {
    **_UNIQUE,
    **_BOUNDS,
    "given": """(
    SELECT
        nextval((SELECT pg_get_serial_sequence('background_jobs', 'id')::regclass)) AS id,
        listed.data,
        listed.key,
        listed.exclusive_key
    FROM ROWS FROM (jsonb_array_elements(%(data)s), unnest(%(keys)s), unnest(%(exclusive_keys)s)) WITH ORDINALITY
        AS listed (data, key, exclusive_key, place)
    ORDER BY listed.place
) AS given""",
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


_KEY = {"keys": "text[]"}
_BOUND = {"expires": "float8", "expires_at": "timestamptz", "exclusive_keys": "text[]"}

# By whether the jobs are unique, are bound, and whether it is done in a transaction of the caller's.
_ENQUEUE_STATEMENTS = {
    (False, False, False): _enqueue_statement("enqueue", _PLAIN, _SOMEBODY_WAITS),
    (True, False, False): _enqueue_statement("enqueue_unique", _UNIQUE, _SOMEBODY_WAITS, **_KEY),
    (False, True, False): _enqueue_statement("enqueue_bound", _BOUND_PLAIN, _SOMEBODY_WAITS, **_BOUND),
    (True, True, False): _enqueue_statement("enqueue_both", _BOUND_UNIQUE, _SOMEBODY_WAITS, **_KEY, **_BOUND),
    (False, False, True): _enqueue_statement("enqueue_inside", _PLAIN, _NOTIFY_ALWAYS),
    (True, False, True): _enqueue_statement("enqueue_unique_inside", _UNIQUE, _NOTIFY_ALWAYS, **_KEY),
    (False, True, True): _enqueue_statement("enqueue_bound_inside", _BOUND_PLAIN, _NOTIFY_ALWAYS, **_BOUND),
    (True, True, True): _enqueue_statement("enqueue_both_inside", _BOUND_UNIQUE, _NOTIFY_ALWAYS, **_KEY, **_BOUND),
}

# What most calls of a web application are: one job, at once. It costs the server half of what the general form does.
_ENQUEUE_ONE = Statement(
    "enqueue_one",
    """
INSERT INTO background_jobs (job_type, data, queue, priority, options)
VALUES (%(job_type)s, %(data)s, %(queue)s, %(priority)s, %(options)s)
RETURNING
    id,
    EXISTS (
        SELECT
        FROM background_waiting
        WHERE background_waiting.queue = %(queue)s
    )
""",
    job_type="text",
    data="jsonb",
    queue="text",
    priority="smallint",
    options="jsonb",
)

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
    AND (expires_at IS NULL OR expires_at > clock_timestamp())
"""

# Such a job is not going to run, so another of its key is no duplicate.
_DROP_KEYS_OF_EXPIRED = """
UPDATE background_jobs
SET unique_key = NULL
WHERE unique_key = ANY(%(keys)s)
    AND state IN ('scheduled', 'available')
    AND expires_at <= clock_timestamp()
"""

# A promoter looks at least this often. Jobs due within twice that time of being enqueued notify it.
PROMOTER_SECONDS = 1.0


def enqueue(connection: Connection, batches: Sequence[NewJobs]) -> list[Enqueued]:
    """Insert the jobs, in order, all or none, on an idle autocommit connection; committed; and wake who waits for them.

    A job whose unique key an unstarted job has already is not inserted; the other's id stands in its place.
    """
    for round in range(_DEADLOCK_ROUNDS):
        try:
            return _enqueue_alone(connection, batches)
        except errors.DeadlockDetected:
            # Two that enqueue the same unique jobs in several statements each, in another order. This one was undone,
            # and comes back when the other is through.
            logger.debug("%s: enqueuing met a deadlock, once more", batches[0].job_type)
            time.sleep(random.uniform(0, _DEADLOCK_SECONDS * 2**round))
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


def _enqueue(connection: Connection, jobs: NewJobs, *, in_transaction: bool) -> list[Enqueued]:
    is_bound = jobs.exclusive_keys is not None or jobs.expires_seconds is not None or jobs.expires_at is not None
    statement = _ENQUEUE_STATEMENTS[jobs.unique_keys is not None, is_bound, in_transaction]
    parameters: dict[str, Any] = {
        "job_type": jobs.job_type,
        "queue": jobs.queue,
        "priority": jobs.priority,
        "options": jobs.options,
    }
    cursor = connection.cursor(cursor_factory=TupleCursor)
    is_one = len(jobs.data) == 1 and jobs.unique_keys is None and not (in_transaction or is_bound)
    if is_one and jobs.run_at is None and not jobs.delay_seconds:
        parameters["data"] = jobs.data[0]
        _ENQUEUE_ONE.run(cursor, parameters)
    else:
        parameters["run_at"], parameters["delay"] = jobs.run_at, jobs.delay_seconds
        if is_bound:
            parameters["expires"], parameters["expires_at"] = jobs.expires_seconds, jobs.expires_at
            parameters["exclusive_keys"] = list(jobs.exclusive_keys or ()) or [None] * len(jobs.data)
        if jobs.unique_keys is not None:
            return _enqueue_unique(cursor, statement, parameters, jobs, jobs.unique_keys, in_transaction)
        parameters["data"] = _json_array(jobs.data)
        statement.run(cursor, parameters)
    rows = cursor.fetchall()
    if rows[0][1] and not in_transaction:
        _notify(cursor, jobs)
    # The serial numbers were drawn in the order of the jobs, whatever the order in which they come back.
    return [Enqueued(id, False) for id in sorted([row[0] for row in rows])]


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
    exclusive_keys = dict(zip(reversed(keys), reversed(parameters.get("exclusive_keys", ())), strict=False))
    found: dict[str, Enqueued] = {}
    while pending:
        parameters["exclusive_keys"] = [exclusive_keys.get(key) for key in pending]
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
        if pending:
            cursor.execute(_DROP_KEYS_OF_EXPIRED, {"keys": list(pending)})
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


def exclusive_key(job_type: str, key: str) -> str:
    """The key that jobs of this type have in common that exclude one another under `key`, whatever text that is."""
    text = f"{job_type}\0{key}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()
