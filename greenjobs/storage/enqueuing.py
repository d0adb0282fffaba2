"""Jobs come in."""

from __future__ import annotations

import enum
import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from psycopg2 import errors
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from psycopg2.extensions import cursor as TupleCursor  # whatever kind a caller's connection makes by itself

from greenjobs.statement import Statement
from greenjobs.storage import conflicts
from greenjobs.storage.conflicts import Changed
from greenjobs.storage.transaction import atomic
from greenjobs.storage.unique import Portion, UniqueRule, enqueue_unique

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import cursor as Cursor


logger = logging.getLogger(__name__)

_DEADLOCK_ROUNDS = 5
_DEADLOCK_SECONDS = 0.2


class NewJobs(NamedTuple):
    """Jobs of one type to enqueue together. `data` is a JSON object as text for each.

    `run_at` (aware) wins over `delay_seconds`. `unique_keys` has a key for each job, None where it has none, or is None
    for none at all. `options` is a JSON object as text: what all of them say otherwise than their job. They expire
    `expires_seconds` after they are due, or at `expires_at` (aware), which wins. `exclusive_key_of` makes of the data
    of a job the key under which it excludes others.
    """

    job_type: str
    data: Sequence[str]
    queue: str
    priority: int = 0
    delay_seconds: float = 0.0
    run_at: datetime | None = None
    unique_keys: Sequence[str | None] | None = None
    options: str | None = None
    unique_rule: UniqueRule = UniqueRule()
    expires_seconds: float | None = None
    expires_at: datetime | None = None
    exclusive_key_of: Callable[[str], str] | None = None

    @property
    def takes_transaction(self) -> bool:
        """Whether one statement can do a part of it only."""
        return (
            self.unique_keys is not None
            and len(self.data) > 1
            and (self.unique_rule.on_conflict != "keep" or self.unique_rule.window_seconds is not None)
        )

    @property
    def is_bound(self) -> bool:
        """Whether something bounds them in time: when they expire, or others that they exclude."""
        return self.exclusive_key_of is not None or self.expires_seconds is not None or self.expires_at is not None

    def exclusive_keys(self, data: Sequence[str]) -> list[str | None]:
        """The exclusive key of each job with such data, or None."""
        make = self.exclusive_key_of
        return [None] * len(data) if make is None else [make(each) for each in data]


class Enqueued(NamedTuple):
    """What became of a new job. It was "enqueued", and `id` is that of its row; or that row has its unique key already,
    and was "kept" as it was, "replaced", "extended" or "merged".
    """

    id: int
    action: str = "enqueued"

    @property
    def is_duplicate(self) -> bool:
        """Whether it has no row of its own."""
        return self.action != "enqueued"


# Jobs that are due are born available. The statement says whether somebody waits for them, and whether they are due
# sooner than a promoter looks by itself; only then is there a second one, which notifies. NOTIFY takes a lock on the
# whole database when it commits, so a busy system had better do without.
_ENQUEUE = """{before}
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
    {notify} AS is_awaited
    {returned_key}
{after}"""

_PLAIN = {
    "before": "",
    "id_column": "",
    "id": "",
    "key_column": "",
    "key": "",
    "bounds_columns": "",
    "bounds": "",
    "given": "jsonb_array_elements(%(data)s) WITH ORDINALITY AS given (data, place)",
    "order": "given.place",
    "on_conflict": "",
    "returned_key": "",
    "after": "",
}

# What bounds a job in time: when it expires, and which others it excludes. Both in one form; most jobs have neither.
_BOUND = {
    **_PLAIN,
    "bounds_columns": ", expires_at, exclusive_key",
    "bounds": """, coalesce(
        %(expires_at)s,
        coalesce(%(run_at)s, now() + make_interval(secs => %(delay)s)) + make_interval(secs => %(expires)s)
    ),
    given.exclusive_key""",
    "given": "ROWS FROM (jsonb_array_elements(%(data)s), unnest(%(exclusive_keys)s)) WITH ORDINALITY"
    " AS given (data, exclusive_key, place)",
}

_NUMBERED = """
    SELECT
        coalesce(
            listed.id,
            nextval((SELECT pg_get_serial_sequence('background_jobs', 'id')::regclass))
        ) AS id,
        listed.data,
        listed.key,
        listed.exclusive_key
    FROM ROWS FROM (
        jsonb_array_elements(%(data)s),
        unnest(%(keys)s),
        unnest(%(ids)s),
        unnest(%(exclusive_keys)s)
    ) WITH ORDINALITY AS listed (data, key, id, exclusive_key, place)
    ORDER BY listed.place
"""

# Numbered in the order of the jobs, inserted in that of their keys: two statements that meet in several keys then wait
# for one another instead of ending in a deadlock. Both indexes of keys have a say in what is a conflict.
_UNIQUE = {
    **_BOUND,
    "id_column": "id, ",
    "id": "given.id,",
    "key_column": ", unique_key, unique_until_finished",
    "key": ", given.key, %(until_finished)s",
    "given": f"({_NUMBERED}) AS given",
    "order": "given.key",
    "on_conflict": "ON CONFLICT DO NOTHING",
    "returned_key": ", unique_key",
}

# The windows are opened in the order of the keys; who opened one inserts its job. The keys stay out of the rows of the
# jobs, lest one that still waits when its window is over has it taken until it starts.
_WINDOWED = {
    **_BOUND,
    "before": f"""
WITH given AS (
    {_NUMBERED}
),
opened AS (
    INSERT INTO background_unique_windows (unique_key, job_id, ends_at)
    SELECT key, id, statement_timestamp() + make_interval(secs => %(window)s)
    FROM given
    WHERE key IS NOT NULL
    ORDER BY key
    ON CONFLICT DO NOTHING
    RETURNING unique_key, job_id
),
enqueued AS (""",
    "id_column": "id, ",
    "id": "given.id,",
    "given": """given
LEFT JOIN opened ON opened.job_id = given.id
WHERE given.key IS NULL
    OR opened.job_id IS NOT NULL""",
    "order": "given.id",
    "after": """)
SELECT enqueued.id, enqueued.is_awaited, opened.unique_key
FROM enqueued
LEFT JOIN opened ON opened.job_id = enqueued.id
""",
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

# In a transaction in two phases PostgreSQL allows no NOTIFY. Who waits finds the jobs when it looks the next time.
_NOTIFY_NEVER = {"notify": "false"}


class _Wakes(enum.Enum):
    """How those hear of it who wait for jobs: by a statement of its own, at the commit, or not at all."""

    AFTERWARDS = _SOMEBODY_WAITS
    AT_COMMIT = _NOTIFY_ALWAYS
    NOBODY = _NOTIFY_NEVER


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


_KEY_TYPES = {"keys": "text[]", "ids": "bigint[]"}
_BOUND_TYPES = {"expires": "float8", "expires_at": "timestamptz", "exclusive_keys": "text[]"}

# What each kind of jobs takes, with the types of its parameters.
_KINDS: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    "plain": (_PLAIN, {}),
    "bound": (_BOUND, _BOUND_TYPES),
    "unique": (_UNIQUE, {**_BOUND_TYPES, **_KEY_TYPES, "until_finished": "boolean"}),
    "windowed": (_WINDOWED, {**_BOUND_TYPES, **_KEY_TYPES, "window": "float8"}),
}

_ENQUEUE_STATEMENTS = {
    (kind, wakes): _enqueue_statement(f"enqueue_{kind}_{wakes.name.lower()}", jobs, wakes.value, **types)
    for kind, (jobs, types) in _KINDS.items()
    for wakes in _Wakes
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

_NOTIFY_INSIDE = """
SELECT pg_notify('greenjobs', told)
FROM unnest(%(told)s::text[]) AS told
"""

# A promoter looks at least this often. Jobs due within twice that time of being enqueued notify it.
PROMOTER_SECONDS = 1.0


def enqueue(connection: Connection, batches: Sequence[NewJobs]) -> list[Enqueued]:
    """Insert the jobs, in order, all or none, on an idle autocommit connection; committed; and wake who waits for them.

    A job whose unique key is taken is not inserted; the id of the job that has it stands in its place, which is changed
    as `on_conflict` says if it waits.
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
    if len(batches) == 1 and not batches[0].takes_transaction:
        return _enqueue(connection, batches[0], _Wakes.AFTERWARDS)
    with atomic(connection):
        return enqueue_inside(connection, batches)


def enqueue_inside(
    connection: Connection, batches: Sequence[NewJobs], *, in_two_phases: bool = False
) -> list[Enqueued]:
    """As `enqueue`, in the transaction of the connection, which is the caller's to commit; `in_two_phases`, nobody who
    waits for the jobs is woken.

    psycopg2 does not tell for certain whether there is one: `with connection:` makes autocommit wait, and looks idle.
    """
    if connection.autocommit and batches[0].takes_transaction and not _is_in_transaction(connection):
        with atomic(connection):
            return enqueue_inside(connection, batches)
    wakes = _Wakes.NOBODY if in_two_phases else _Wakes.AT_COMMIT
    if len(batches) > 1 and batches[0].unique_keys is not None:
        # In the order of their keys over all batches.
        everything = batches[0]._replace(
            data=[data for jobs in batches for data in jobs.data],
            unique_keys=[key for jobs in batches for key in jobs.unique_keys or [None] * len(jobs.data)],
        )
        return _enqueue(connection, everything, wakes, at_once=len(batches[0].data))
    return [row for jobs in batches for row in _enqueue(connection, jobs, wakes)]


def _is_in_transaction(connection: Connection) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT")  # with which a transaction begins, where one is to
    return connection.get_transaction_status() != TRANSACTION_STATUS_IDLE


def _enqueue(connection: Connection, jobs: NewJobs, wakes: _Wakes, *, at_once: int | None = None) -> list[Enqueued]:
    parameters: dict[str, Any] = {
        "job_type": jobs.job_type,
        "queue": jobs.queue,
        "priority": jobs.priority,
        "options": jobs.options,
    }
    cursor = connection.cursor(cursor_factory=TupleCursor)
    is_one = len(jobs.data) == 1 and jobs.unique_keys is None and not jobs.is_bound
    if is_one and wakes is _Wakes.AFTERWARDS and jobs.run_at is None and not jobs.delay_seconds:
        parameters["data"] = jobs.data[0]
        _ENQUEUE_ONE.run(cursor, parameters)
    else:
        parameters["run_at"], parameters["delay"] = jobs.run_at, jobs.delay_seconds
        parameters["expires"], parameters["expires_at"] = jobs.expires_seconds, jobs.expires_at
        if jobs.unique_keys is not None:
            return _enqueue_unique(cursor, parameters, jobs, wakes, at_once or len(jobs.data))
        parameters["data"] = _json_array(jobs.data)
        if jobs.is_bound:
            parameters["exclusive_keys"] = jobs.exclusive_keys(jobs.data)
        _ENQUEUE_STATEMENTS["bound" if jobs.is_bound else "plain", wakes].run(cursor, parameters)
    rows = cursor.fetchall()
    if rows[0][1] and wakes is _Wakes.AFTERWARDS:
        _notify(cursor, jobs)
    # The serial numbers were drawn in the order of the jobs, whatever the order in which they come back.
    return [Enqueued(id) for id in sorted([row[0] for row in rows])]


def _enqueue_unique(
    cursor: Cursor, parameters: Mapping[str, Any], jobs: NewJobs, wakes: _Wakes, at_once: int
) -> list[Enqueued]:
    rule = jobs.unique_rule
    statement = _ENQUEUE_STATEMENTS["unique" if rule.window_seconds is None else "windowed", wakes]
    parameters = {**parameters, "until_finished": rule.until_finished, "window": rule.window_seconds}

    def insert(portion: Portion) -> list[tuple[int, str | None]]:
        more = {"data": _json_array(portion.data), "keys": portion.keys, "ids": portion.ids}
        statement.run(cursor, {**parameters, **more, "exclusive_keys": jobs.exclusive_keys(portion.data)})
        rows = cursor.fetchall()
        if rows and rows[0][1] and wakes is _Wakes.AFTERWARDS:
            _notify(cursor, jobs)
        return [(id, key) for id, _, key in rows]

    def tell(changed: Sequence[Changed]) -> None:
        _tell(cursor, changed, wakes)

    keys = jobs.unique_keys or ()
    new = conflicts.New(parameters, jobs.exclusive_keys)
    settled = enqueue_unique(cursor, rule, keys, jobs.data, new, insert=insert, tell=tell, at_once=at_once)
    return [Enqueued(id, action) for id, action in settled]


def _tell(cursor: Cursor, changed: Sequence[Changed], wakes: _Wakes) -> None:
    """Wake whoever may take these jobs now, or has to look at them sooner than it knows."""
    if wakes is _Wakes.NOBODY:
        return
    available = Counter(each.queue for each in changed if each.is_available)
    is_due_soon = any(each.is_due_soon for each in changed)
    if wakes is _Wakes.AT_COMMIT:
        told = [f"*:{queue}" for queue in available] + ["due"] * is_due_soon
        if told:
            cursor.execute(_NOTIFY_INSIDE, {"told": told})
        return
    for queue, count in available.items():
        _NOTIFY.run(cursor, {"queue": queue, "count": count, "is_later": False})
    if is_due_soon:
        _NOTIFY.run(cursor, {"queue": "", "count": 0, "is_later": True})


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
