"""How many jobs ended how, by minute, queue and type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson

from greenjobs.statement import Statement

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


# `counted` of the runner is the number of its last writing. Tried again because nobody answered, the same writing finds
# its own number there if it had been committed, and adds nothing; one that is still on its way then waits for this one
# at the runner's row, and finds the number, too.
#
# All runners go through the rows in one order, so that no two wait for each other.
_ADD = Statement(
    "add_counts",
    """
WITH turn AS (
    UPDATE background_runners
    SET counted = %(turn)s
    WHERE id = %(runner)s
        AND counted < %(turn)s
    RETURNING id
)
INSERT INTO background_counts AS known (
    minute,
    queue,
    job_type,
    done,
    retried,
    failed,
    discarded,
    cancelled,
    snoozed,
    run_seconds,
    waited_seconds
)
SELECT
    date_trunc('minute', now()),
    queue,
    job_type,
    done,
    retried,
    failed,
    discarded,
    cancelled,
    snoozed,
    run_seconds,
    waited_seconds
FROM turn
CROSS JOIN jsonb_to_recordset(%(counts)s) AS added (
    queue text,
    job_type text,
    done bigint,
    retried bigint,
    failed bigint,
    discarded bigint,
    cancelled bigint,
    snoozed bigint,
    run_seconds float8,
    waited_seconds float8
)
ORDER BY queue, job_type
ON CONFLICT (minute, queue, job_type) DO UPDATE
SET
    done = known.done + excluded.done,
    retried = known.retried + excluded.retried,
    failed = known.failed + excluded.failed,
    discarded = known.discarded + excluded.discarded,
    cancelled = known.cancelled + excluded.cancelled,
    snoozed = known.snoozed + excluded.snoozed,
    run_seconds = known.run_seconds + excluded.run_seconds,
    waited_seconds = known.waited_seconds + excluded.waited_seconds
""",
    runner="int",
    turn="int",
    counts="jsonb",
)


def add_counts(connection: Connection, runner: int, turn: int, counts: Sequence[Mapping[str, Any]]) -> None:
    """Add to the counts of this minute: one object for each queue and type, with all columns but the minute.

    `turn` numbers the writings of a runner, from 1; one that was done already is not done again.
    """
    with connection.cursor() as cursor:
        _ADD.run(cursor, {"runner": runner, "turn": turn, "counts": orjson.dumps(counts).decode()})


_PRUNE = """
DELETE FROM background_counts
WHERE (minute, queue, job_type) IN (
    SELECT minute, queue, job_type
    FROM background_counts
    WHERE minute < now() - make_interval(secs => %(age)s)
    ORDER BY minute
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
)
"""


def prune_counts(connection: Connection, *, age_seconds: float, limit: int) -> int:
    """Delete up to `limit` counts of minutes that began that long ago, the oldest first; returns how many."""
    with connection.cursor() as cursor:
        cursor.execute(_PRUNE, {"age": age_seconds, "limit": limit})
        return cursor.rowcount


# Parameters are put in as literals, so the planner sees only the conditions that were given.
_BEGINNING = "date_trunc('minute', coalesce(%(since)s::timestamptz, now() - make_interval(secs => %(age)s)))"

_MEANT = f"""
FROM background_counts
WHERE minute >= {_BEGINNING}
    AND (%(queues)s::text[] IS NULL OR queue = ANY(%(queues)s::text[]))
    AND (%(job_types)s::text[] IS NULL OR job_type = ANY(%(job_types)s::text[]))
"""

_MINUTES = f"""
SELECT
    done,
    retried,
    failed,
    discarded,
    cancelled,
    snoozed,
    run_seconds,
    waited_seconds,
    minute,
    queue,
    job_type
{_MEANT}
ORDER BY minute, queue, job_type
"""

# The minute that is asked for may have begun just now.
_TOTALS = f"""
SELECT
    sum(done)::bigint,
    sum(retried)::bigint,
    sum(failed)::bigint,
    sum(discarded)::bigint,
    sum(cancelled)::bigint,
    sum(snoozed)::bigint,
    sum(run_seconds),
    sum(waited_seconds),
    queue,
    {{job_type}} AS type,
    greatest(extract(epoch FROM now() - {_BEGINNING})::float8, 1)
{_MEANT}
GROUP BY queue, type
ORDER BY queue, type
"""

_TOTALS_BY_TYPE = _TOTALS.format(job_type="job_type")
_TOTALS_BY_QUEUE = _TOTALS.format(job_type="NULL::text")


def read_counts(
    connection: Connection,
    *,
    since: datetime | None,
    age_seconds: float | None,
    queues: Sequence[str] | None,
    job_types: Sequence[str] | None,
) -> list[tuple[Any, ...]]:
    """The counts from the minute on in which `since` is, or that many seconds ago: outcomes, seconds, and the key."""
    return _read(connection, _MINUTES, since, age_seconds, queues, job_types)


def total_counts(
    connection: Connection,
    *,
    since: datetime | None,
    age_seconds: float | None,
    queues: Sequence[str] | None,
    job_types: Sequence[str] | None,
    by_type: bool,
) -> list[tuple[Any, ...]]:
    """The sums of what `read_counts` finds, for each queue, and type if asked, with the seconds that they are about."""
    sql = _TOTALS_BY_TYPE if by_type else _TOTALS_BY_QUEUE
    return _read(connection, sql, since, age_seconds, queues, job_types)


def _read(
    connection: Connection,
    sql: str,
    since: datetime | None,
    age_seconds: float | None,
    queues: Sequence[str] | None,
    job_types: Sequence[str] | None,
) -> list[tuple[Any, ...]]:
    parameters = {
        "since": since,
        "age": age_seconds,
        "queues": None if queues is None else list(queues),
        "job_types": None if job_types is None else list(job_types),
    }
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchall()
