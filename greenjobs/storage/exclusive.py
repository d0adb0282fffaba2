"""Jobs that exclude one another: of those with one exclusive key, one at most runs at any time.

An index over running jobs makes a second one impossible, whoever tries. What is here finds those whose turn it is: in
each queue the first of each key, if no job of the key runs. Such a claim never takes two of a key, for it looks at the
keys first and at one job of each then.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from greenjobs.statement import Statement
from greenjobs.storage.claims import CLAIMED, ClaimCursor, ClaimedJob, take

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


# How many waiting jobs a claim looks at, in their order, to find keys: so many for each that it may take, and so many
# more for those whose key is taken. Behind a customer with ten thousand jobs in a row they may find no other; then so
# many keys are looked at, wherever their jobs stand: the first of all, and as many from a place that chance chooses.
_WINDOW_FOR_EACH = 2
_WINDOW_AT_LEAST = 200
_SAMPLED_KEYS = 50

# More keys than jobs to take: others may be faster with some, and a suspect may be in front of others.
_SPARE_KEYS = 10

# A subquery in place of NOT EXISTS: the planner always looks for the one key in the index of those that run, and never
# reads all of them; see the migration for the condition.
_IS_FREE = """(
    SELECT rival.id
    FROM background_jobs AS rival
    WHERE rival.claimed_by IS NOT NULL
        AND rival.exclusive_key = {key}
        AND rival.exclusive_key IS NOT NULL
) IS NULL"""

_KEYS_IN_ORDER = f"""
    waiting AS (
        SELECT exclusive_key, ARRAY[(-priority)::bigint, id] AS place
        FROM background_jobs
        WHERE queue = %(queue)s
            AND state = 'available'
            AND crashes = 0
            AND exclusive_key IS NOT NULL
            AND job_type = ANY(%(job_types)s)
        ORDER BY (-priority), id
        LIMIT %(window)s
    ),
    front AS (
        SELECT exclusive_key
        FROM (
            SELECT exclusive_key, min(place) AS place
            FROM waiting
            GROUP BY exclusive_key
            ORDER BY min(place)
        ) AS first
        WHERE {_IS_FREE.format(key="first.exclusive_key")}
        ORDER BY place
        LIMIT 2 * %(limit)s + {_SPARE_KEYS}
    ),
    sampled AS (
        SELECT begun.exclusive_key, 1 AS count
        FROM unnest(ARRAY['', %(sampled_from)s::text]) AS start (key)
        CROSS JOIN LATERAL (
            SELECT exclusive_key
            FROM background_jobs
            WHERE queue = %(queue)s
                AND state = 'available'
                AND exclusive_key >= start.key
            ORDER BY exclusive_key
            LIMIT 1
        ) AS begun
        WHERE (SELECT count(*) FROM waiting) = %(window)s
            AND (SELECT count(*) FROM front) < %(limit)s
        UNION ALL
        SELECT following.exclusive_key, sampled.count + 1
        FROM sampled
        CROSS JOIN LATERAL (
            SELECT exclusive_key
            FROM background_jobs
            WHERE queue = %(queue)s
                AND state = 'available'
                AND exclusive_key > sampled.exclusive_key
            ORDER BY exclusive_key
            LIMIT 1
        ) AS following
        WHERE sampled.count < {_SAMPLED_KEYS}
    ),
    line AS (
        SELECT exclusive_key FROM front
        UNION
        SELECT exclusive_key FROM sampled
    )
"""

_KEYS_GIVEN = """
    line AS (
        SELECT DISTINCT key AS exclusive_key
        FROM unnest(%(keys)s::text[]) AS key
    )
"""

# A suspect at the head of its line is claimed as suspects are; those behind it wait for that. The rows are changed in
# the order of their keys, so that claims of two queues that meet in several keys wait for one another, and not in a
# circle.
_CLAIM = f"""
WITH RECURSIVE {{keys}},
heads AS (
    SELECT head.id, head.rank
    FROM line
    CROSS JOIN LATERAL (
        SELECT id, (-priority) AS rank
        FROM background_jobs
        WHERE queue = %(queue)s
            AND state = 'available'
            AND exclusive_key = line.exclusive_key
            AND exclusive_key IS NOT NULL
            AND job_type = ANY(%(job_types)s)
        ORDER BY (-priority), id
        LIMIT 1
    ) AS head
    WHERE (head.rank, head.id) < (%(before_rank)s, %(before_id)s)
        AND {_IS_FREE.format(key="line.exclusive_key")}
),
locked AS (
    SELECT waiting_job.id, waiting_job.exclusive_key
    FROM heads
    JOIN background_jobs AS waiting_job ON waiting_job.id = heads.id
    WHERE waiting_job.state = 'available'
        AND waiting_job.crashes = 0
    ORDER BY heads.rank, heads.id
    LIMIT %(limit)s
    FOR UPDATE OF waiting_job SKIP LOCKED
),
chosen AS (
    SELECT id AS chosen_id
    FROM locked
    ORDER BY exclusive_key
)
UPDATE background_jobs
SET
    state = 'running',
    attempt = attempt + 1,
    claimed_by = %(runner)s,
    claimed_at = now()
FROM chosen
WHERE id = chosen_id
RETURNING {CLAIMED}
"""

_TYPES = {
    "runner": "int",
    "queue": "text",
    "job_types": "text[]",
    "limit": "int",
    "before_rank": "int",
    "before_id": "bigint",
}

_CLAIM_IN_ORDER = Statement(
    "claim_exclusive",
    _CLAIM.format(keys=_KEYS_IN_ORDER.strip()),
    **_TYPES,
    window="int",
    sampled_from="text",
)

_CLAIM_NEXT = Statement("claim_next", _CLAIM.format(keys=_KEYS_GIVEN.strip()), **_TYPES, keys="text[]")

_LAST_PLACE = ClaimCursor(2**31 - 1, 2**63 - 1)


def claim_exclusive(
    connection: Connection,
    *,
    runner: int,
    queue: str,
    job_types: Sequence[str],
    limit: int,
    before: ClaimCursor | None = None,
    keys: Sequence[str] | None = None,
) -> list[ClaimedJob]:
    """Take up to `limit` available jobs that have an exclusive key, the first in line of keys of which no job runs.

    Highest priority first, then oldest. With `before`, only jobs in front of that place are taken; with `keys`, only
    those with one of these.
    """
    place = before or _LAST_PLACE
    parameters: dict[str, Any] = {
        "runner": runner,
        "queue": queue,
        "job_types": job_types,
        "limit": limit,
        "before_rank": place.negative_priority,
        "before_id": place.id,
    }
    if keys is not None:
        return take(connection, _CLAIM_NEXT, {**parameters, "keys": list(keys)})
    parameters["window"] = _WINDOW_AT_LEAST + _WINDOW_FOR_EACH * limit
    parameters["sampled_from"] = f"{random.getrandbits(32):08x}"
    return take(connection, _CLAIM_IN_ORDER, parameters)


# Woken is who waits where a job is next in line; who has room elsewhere looks by itself before it waits.
_WAKE_NEXT = Statement(
    "wake_next",
    f"""
WITH freed AS (
    SELECT key
    FROM unnest(%(keys)s::text[]) AS key
    WHERE {_IS_FREE.format(key="key")}
),
woken AS (
    DELETE FROM background_waiting AS waiting
    WHERE EXISTS (
        SELECT
        FROM freed
        JOIN background_jobs AS job ON job.exclusive_key = freed.key
        WHERE job.queue = waiting.queue
            AND job.state = 'available'
            AND job.exclusive_key IS NOT NULL
    )
    RETURNING queue, runner
)
SELECT NULL AS queue, pg_notify('greenjobs', runner || ':' || queue) IS NULL
FROM woken
UNION ALL
SELECT asked.queue, true
FROM unnest(%(queues)s::text[]) AS asked (queue)
WHERE EXISTS (
    SELECT
    FROM freed
    JOIN background_jobs AS job ON job.exclusive_key = freed.key
    WHERE job.queue = asked.queue
        AND job.state = 'available'
        AND job.crashes > 0
        AND job.exclusive_key IS NOT NULL
)
""",
    keys="text[]",
    queues="text[]",
)


def wake_next(connection: Connection, keys: Sequence[str], *, queues: Sequence[str]) -> list[str]:
    """Wake every worker that waits where a job is next in line for one of these keys, if none of the key runs.

    Returns those of `queues` where suspects are, which nobody is woken for.
    """
    with connection.cursor() as cursor:
        _WAKE_NEXT.run(cursor, {"keys": list(keys), "queues": list(queues)})
        return [queue for queue, _ in cursor.fetchall() if queue is not None]
