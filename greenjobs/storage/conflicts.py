"""What a new unique job finds in its way: who holds its key, and what becomes of that one.

A job holds its key while it waits, and one whose key is taken until it is finished while it runs, too. A window holds
the key of the job that opened it until the window is over, or the job has failed.

None of the statements is prepared: planned while few jobs wait, they would go on reading all of them when many do.

Whoever looks is told of a moment that is gone, so a change is made to jobs that wait still, and says to which it was
made; the others are to be looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg2 import extensions

from greenjobs.storage.history import removal
from greenjobs.storage.transaction import atomic

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor


class Holder(NamedTuple):
    """A job in the way, which may be gone, where it is a window that holds the key; whether it can still be changed."""

    id: int
    waits: bool


class Changed(NamedTuple):
    """A job that was changed and may start soon, in this queue: now, or else so soon that a promoter must know."""

    id: int
    queue: str
    is_available: bool
    is_due_soon: bool


class New(NamedTuple):
    """What new jobs have beside their data: parameters of the statements here, and the exclusive keys of such data."""

    parameters: Mapping[str, Any]
    exclusive_keys: Callable[[Sequence[str]], list[str | None]]


# --- who holds the keys -----------------------------------------------------------------------------------------------

# The waiting ones last: of two with the same key, which were enqueued under different rules, they count. One that was
# cancelled while it ran, and waits again since, only waits to be removed; and one that has expired, to be discarded.
_HOLDERS = """
SELECT unique_key, id, false AS waits, false AS is_unwanted, false AS has_expired
FROM background_jobs
WHERE %(until_finished)s::boolean
    AND unique_key = ANY(%(keys)s::text[])
    AND unique_until_finished
    AND state = 'running'
UNION ALL
SELECT unique_key, id, true, cancel_asked_at IS NOT NULL, coalesce(expires_at <= clock_timestamp(), false)
FROM background_jobs
WHERE unique_key = ANY(%(keys)s::text[])
    AND state IN ('scheduled', 'available')
"""

_REMOVE_UNWANTED = removal(
    "cancelled",
    """
    WHERE job.id = ANY(%(ids)s)
        AND job.cancel_asked_at IS NOT NULL
        AND job.state IN ('scheduled', 'available')
    """,
)

_DROP_KEYS_OF_EXPIRED = """
UPDATE background_jobs
SET unique_key = NULL
WHERE id = ANY(%(ids)s)
    AND state IN ('scheduled', 'available')
    AND expires_at <= clock_timestamp()
"""


def holders(cursor: Cursor, keys: Sequence[str], *, until_finished: bool) -> dict[str, Holder]:
    """The jobs that hold these keys, running ones only where it is `until_finished`; none may be left that does."""
    cursor.execute(_HOLDERS, {"keys": list(keys), "until_finished": until_finished})
    found: dict[str, Holder] = {}
    unwanted, expired = [], []
    for key, id, waits, is_unwanted, has_expired in cursor.fetchall():
        if is_unwanted:
            unwanted.append(id)
        elif has_expired:
            expired.append(id)
        else:
            found[key] = Holder(id, waits)
    if unwanted:
        cursor.execute(_REMOVE_UNWANTED, {"ids": sorted(unwanted)})
    if expired:
        cursor.execute(_DROP_KEYS_OF_EXPIRED, {"ids": sorted(expired)})
    return found


# Not now(), which in a long transaction of the caller's may be before the window was opened.
_WINDOWS = """
SELECT
    held.unique_key,
    held.job_id,
    coalesce(job.state IN ('scheduled', 'available') AND job.cancel_asked_at IS NULL, false),
    held.ends_at <= statement_timestamp() OR job.state IS NOT DISTINCT FROM 'failed'
FROM background_unique_windows AS held
LEFT JOIN background_jobs AS job ON job.id = held.job_id
WHERE held.unique_key = ANY(%(keys)s::text[])
"""

_END_WINDOWS = """
DELETE FROM background_unique_windows
WHERE unique_key = ANY(ARRAY(
        SELECT held.unique_key
        FROM unnest(%(keys)s::text[], %(ids)s::bigint[]) AS over (key, id)
        JOIN background_unique_windows AS held ON held.unique_key = over.key AND held.job_id = over.id
        ORDER BY held.unique_key
        FOR UPDATE OF held
    ))
    AND job_id = ANY(%(ids)s::bigint[])
"""


def window_holders(cursor: Cursor, keys: Sequence[str]) -> dict[str, Holder]:
    """The jobs whose windows hold these keys. Windows that hold them no longer are deleted."""
    cursor.execute(_WINDOWS, {"keys": list(keys)})
    rows = cursor.fetchall()
    over = [(key, id) for key, id, _, is_over in rows if is_over]
    if over:
        cursor.execute(_END_WINDOWS, {"keys": [key for key, _ in over], "ids": [id for _, id in over]})
    return {key: Holder(id, waits) for key, id, waits, is_over in rows if not is_over}


# --- what becomes of them ---------------------------------------------------------------------------------------------

# Locked in one order, so that two who change the same jobs wait for each other, and never in a circle. Whoever had to
# wait looks at the row anew: what was claimed by then waits no longer. One that lost its key holds none. The ids are
# said twice, for as an array they are looked up, and joined they might be sought through the whole table.
_WAITING = """
SELECT job.id, {columns}
FROM {given}
JOIN background_jobs AS job ON job.id = given.id
WHERE job.id = ANY(%(ids)s::bigint[])
    AND job.state IN ('scheduled', 'available')
    AND job.cancel_asked_at IS NULL
    AND job.unique_key IS NOT DISTINCT FROM given.key
ORDER BY job.id
FOR UPDATE OF job
"""

_HELD = "unnest(%(ids)s::bigint[], %(keys)s::text[]) AS given (id, key)"

_DUE = """
    run_at = coalesce(%(run_at)s::timestamptz, now() + make_interval(secs => %(delay)s::float8)),
    state = CASE
        WHEN coalesce(%(run_at)s::timestamptz, now() + make_interval(secs => %(delay)s::float8)) > now()
            THEN 'scheduled'
        ELSE 'available'
    END"""

_EXPIRES = """
    expires_at = coalesce(
        %(expires_at)s::timestamptz,
        coalesce(%(run_at)s::timestamptz, now() + make_interval(secs => %(delay)s::float8))
            + make_interval(secs => %(expires)s::float8)
    ),"""

_DUE_PARAMETERS = ("run_at", "delay", "expires", "expires_at")

_CHANGED = """
RETURNING
    job.id,
    job.queue,
    job.state = 'available',
    job.state = 'scheduled' AND job.run_at < now() + interval '2 seconds'
"""

_REPLACE = f"""
WITH waiting AS (
    {
    _WAITING.format(
        columns="given.data, given.exclusive_key",
        given='''
        ROWS FROM (
            unnest(%(ids)s::bigint[]),
            unnest(%(keys)s::text[]),
            jsonb_array_elements(%(data)s::jsonb),
            unnest(%(exclusive_keys)s::text[])
        ) AS given (id, key, data, exclusive_key)
    ''',
    )
}
)
UPDATE background_jobs AS job
SET
    data = waiting.data,
    queue = %(queue)s::text,
    priority = %(priority)s::smallint,
    options = %(options)s::jsonb,
    exclusive_key = waiting.exclusive_key,
    retries = 0,{_EXPIRES}{_DUE}
FROM waiting
WHERE job.id = waiting.id
    AND job.id = ANY(%(ids)s::bigint[])
{_CHANGED}"""

_EXTEND = f"""
WITH waiting AS (
    {_WAITING.format(columns="given.key", given=_HELD)}
)
UPDATE background_jobs AS job
SET{_EXPIRES}{_DUE}
FROM waiting
WHERE job.id = waiting.id
    AND job.id = ANY(%(ids)s::bigint[])
{_CHANGED}"""


def replace(cursor: Cursor, waiting: Mapping[int, str | None], data: Sequence[str], new: New) -> list[Changed]:
    """Give these jobs, by id with the key on their rows, other data, and what else new jobs have.

    Those that wait no longer are left alone. `data` are JSON objects in the order of the jobs.
    """
    document = "[" + ",".join(data) + "]"
    keys = new.exclusive_keys(data)
    cursor.execute(_REPLACE, {**new.parameters, **_held(waiting), "data": document, "exclusive_keys": keys})
    return [Changed._make(row) for row in cursor.fetchall()]


def extend(cursor: Cursor, waiting: Mapping[int, str | None], new: New) -> list[Changed]:
    """Let these jobs run, and expire, when new ones would; those that wait no longer are left alone."""
    cursor.execute(_EXTEND, {**_held(waiting), **{name: new.parameters[name] for name in _DUE_PARAMETERS}})
    return [Changed._make(row) for row in cursor.fetchall()]


_READ_WAITING = _WAITING.format(columns="job.data::text", given=_HELD)

_WRITE_DATA = """
UPDATE background_jobs AS job
SET
    data = merged.data,
    exclusive_key = merged.exclusive_key
FROM ROWS FROM (
    unnest(%(ids)s::bigint[]),
    jsonb_array_elements(%(data)s::jsonb),
    unnest(%(exclusive_keys)s::text[])
) AS merged (id, data, exclusive_key)
WHERE job.id = merged.id
    AND job.id = ANY(%(ids)s::bigint[])
"""


def merge(cursor: Cursor, waiting: Mapping[int, str | None], merged: Callable[[int, str], str], new: New) -> list[int]:
    """Give these jobs the data that `merged` makes of their id and of what they have; returns whom.

    Their rows are locked meanwhile, in the caller's transaction, or in one for this alone. Those that wait no longer
    are left alone. What `merged` raises undoes it.
    """
    if cursor.connection.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE:
        with atomic(cursor.connection):
            return _merge(cursor, waiting, merged, new)
    return _merge(cursor, waiting, merged, new)


def _merge(cursor: Cursor, waiting: Mapping[int, str | None], merged: Callable[[int, str], str], new: New) -> list[int]:
    cursor.execute(_READ_WAITING, _held(waiting))
    data = {id: merged(id, text) for id, text in cursor.fetchall()}
    if data:
        document = "[" + ",".join(data.values()) + "]"
        keys = new.exclusive_keys(list(data.values()))
        cursor.execute(_WRITE_DATA, {"ids": list(data), "data": document, "exclusive_keys": keys})
    return list(data)


def _held(waiting: Mapping[int, str | None]) -> dict[str, Any]:
    return {"ids": list(waiting), "keys": list(waiting.values())}
