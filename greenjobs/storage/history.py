"""Jobs that end: they leave the table for the history, or for good, and whoever waits for their end is told.

Both happen in the one statement that ends the job, so that there is no moment at which a job is in both tables or, if
it is kept, in neither; and nobody is told of an end that was not committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from greenjobs.statement import Statement
from greenjobs.storage.fence import FENCE_TYPES, Fence, fence_parameters, int_array
from greenjobs.storage.windows import END_WINDOWS_OF_REMOVED

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class Ended(NamedTuple):
    """A claimed job that ended other than by failing, and is not just to be deleted.

    `outcome` is one of the history's. It is kept for so many seconds, or not at all with 0; `result` is JSON text, or
    None where there is none to keep; `error` says why it ended, as a JSON object.
    """

    fence: Fence
    outcome: str
    keep_seconds: float = 0.0
    result: str | None = None
    error: Mapping[str, Any] | None = None
    run_seconds: float | None = None
    waited_seconds: float | None = None


# A channel for each job, so that nobody is woken for another one's; with the table, for the ids of two schemas are the
# same. Runners listen to none of them.
_CHANNEL = "greenjobs_ended_"


def tell_watchers(row: str, outcome: str) -> str:
    """SQL that tells whoever watches this row of background_jobs that it ended so; both are SQL, too."""
    channel = f"'{_CHANNEL}' || 'background_jobs'::regclass::oid || '_' || {row}.id"
    return f"CASE WHEN {row}.is_watched THEN pg_notify({channel}, {outcome}) END"


_COLUMNS = (
    *("id", "job_type", "queue", "data", "priority", "attempt", "retries", "crashes", "outcome", "result", "errors"),
    *("progress", "log", "created_at", "started_at", "ended_at", "run_seconds", "waited_seconds", "runner"),
    "keep_until",
)

# An id is there already when the sequence of ids was set back: the newer job counts.
_ENDED = f"""
{{ended}},
kept AS (
    INSERT INTO background_history ({", ".join(_COLUMNS)})
    SELECT
        ended.id,
        ended.job_type,
        ended.queue,
        ended.data,
        ended.priority,
        ended.attempt,
        ended.retries,
        ended.crashes,
        ended.outcome,
        ended.result::jsonb,
        CASE WHEN ended.error IS NULL THEN ended.errors ELSE coalesce(ended.errors, '[]') || ended.error::jsonb END,
        ended.progress,
        ended.log,
        ended.created_at,
        now() - make_interval(secs => ended.run_seconds),
        now(),
        ended.run_seconds,
        ended.waited_seconds,
        runner.hostname || ':' || runner.pid,
        now() + make_interval(secs => ended.keep_seconds)
    FROM ended
    LEFT JOIN background_runners AS runner ON runner.id = ended.claimed_by
    WHERE ended.keep_seconds > 0
    ON CONFLICT (id) DO UPDATE
    SET ({", ".join(_COLUMNS)}) = ROW ({", ".join(f"excluded.{column}" for column in _COLUMNS)})
)
SELECT
    ended.id,
    {tell_watchers("ended", "ended.outcome")}
FROM ended
"""

_LONGEST_KEEP_SECONDS = 36_500 * 86_400


def removal(outcome: str, which: str, *, after: str = "WITH") -> str:
    """SQL that ends those rows of background_jobs, alias `job`, that `which` names: a USING or WHERE clause.

    It returns their ids. They are nobody's, so what their calls said about being kept is all there is to know. `after`
    is what stands before: WITH, or that and other queries.
    """
    return _ENDED.format(
        ended=f"""{after}
ended AS (
    DELETE FROM background_jobs AS job
    {which}
    RETURNING
        job.*,
        '{outcome}'::text AS outcome,
        CASE jsonb_typeof(job.options -> 'keep')
            WHEN 'number' THEN least((job.options ->> 'keep')::float8, {_LONGEST_KEEP_SECONDS})
        END AS keep_seconds,
        NULL::text AS result,
        NULL::text AS error,
        NULL::float8 AS run_seconds,
        NULL::float8 AS waited_seconds
),
{END_WINDOWS_OF_REMOVED.format(removed="ended")}"""
    )


_END = Statement(
    "end",
    _ENDED.format(
        ended="""WITH
ended AS (
    DELETE FROM background_jobs AS job
    USING unnest(
        %(ids)s::bigint[],
        %(attempts)s::int[],
        %(outcomes)s::text[],
        %(keep_seconds)s::float8[],
        %(results)s::text[],
        %(errors)s::text[],
        %(run_seconds)s::float8[],
        %(waited_seconds)s::float8[]
    ) AS fence (id, attempt, outcome, keep_seconds, result, error, run_seconds, waited_seconds)
    WHERE job.id = fence.id
        AND job.attempt = fence.attempt
        AND job.claimed_by = ANY(%(runners)s::int[])
    RETURNING
        job.*,
        fence.outcome,
        fence.keep_seconds,
        fence.result,
        fence.error,
        fence.run_seconds,
        fence.waited_seconds
)"""
    ),
    **FENCE_TYPES,
    outcomes="text[]",
    keep_seconds="float8[]",
    results="text[]",
    errors="text[]",
    run_seconds="float8[]",
    waited_seconds="float8[]",
)


def end(connection: Connection, runners: Sequence[int], ended: Sequence[Ended]) -> set[int]:
    """Delete jobs of a process that registered as these runners, and keep those that are to be kept, as they ended.

    Returns the ids of those still held; the others are left as they are.
    """
    parameters = {
        **fence_parameters(runners, [each.fence for each in ended]),
        "outcomes": [each.outcome for each in ended],
        "keep_seconds": [each.keep_seconds for each in ended],
        "results": [each.result for each in ended],
        "errors": [None if each.error is None else orjson.dumps(each.error).decode() for each in ended],
        "run_seconds": [each.run_seconds for each in ended],
        "waited_seconds": [each.waited_seconds for each in ended],
    }
    with connection.cursor() as cursor:
        _END.run(cursor, parameters)
        return {row[0] for row in cursor.fetchall()}


_PRUNE_HISTORY = """
DELETE FROM background_history
WHERE id = ANY(ARRAY(
    SELECT id
    FROM background_history
    WHERE keep_until < now()
    ORDER BY keep_until
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
"""


def prune_history(connection: Connection, *, limit: int) -> int:
    """Delete up to `limit` finished jobs that were kept long enough; returns how many."""
    with connection.cursor() as cursor:
        cursor.execute(_PRUNE_HISTORY, {"limit": limit})
        return cursor.rowcount


_FORGET = """
DELETE FROM background_history AS job
USING unnest(%(ids)s::bigint[], %(attempts)s::int[]) AS fence (id, attempt)
WHERE job.id = fence.id
    AND job.attempt = fence.attempt
RETURNING job.id
"""


def forget(connection: Connection, chosen: Sequence[Fence]) -> set[int]:
    """Delete finished jobs from the history, however long they were to be kept; returns the ids of those deleted."""
    parameters = {
        "ids": int_array(fence.id for fence in chosen),
        "attempts": int_array(fence.attempt for fence in chosen),
    }
    with connection.cursor() as cursor:
        cursor.execute(_FORGET, parameters)
        return {row[0] for row in cursor.fetchall()}


_TABLE = "SELECT 'background_jobs'::regclass::oid::bigint"


def listen_for_end(connection: Connection, id: int) -> None:
    """Let this autocommit connection be notified, with the outcome, of the end of a job that is watched."""
    with connection.cursor() as cursor:
        cursor.execute(_TABLE)
        (table,) = cursor.fetchone() or (0,)
        cursor.execute(f"LISTEN {_CHANNEL}{int(table)}_{int(id)}")


# Waits for whoever is changing the row. If that is its end, it finds nothing, and a look afterwards sees the end.
_WATCH = """
WITH watched AS (
    UPDATE background_jobs
    SET is_watched = true
    WHERE id = %(id)s
        AND state <> 'failed'
        AND NOT is_watched
    RETURNING id
)
SELECT id
FROM watched
UNION ALL
SELECT id
FROM background_jobs
WHERE id = %(id)s
    AND state <> 'failed'
    AND is_watched
"""


def watch(connection: Connection, id: int) -> bool:
    """Have whoever ends this job notify, unless it has ended; returns whether they will, or just have.

    Listen first, and look afterwards.
    """
    with connection.cursor() as cursor:
        cursor.execute(_WATCH, {"id": id})
        return cursor.fetchone() is not None
