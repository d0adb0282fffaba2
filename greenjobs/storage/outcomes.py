"""What became of claimed jobs: done, failed, put off, or given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from psycopg2.extensions import cursor as TupleCursor  # whatever kind a caller's connection makes by itself

from greenjobs.statement import Statement
from greenjobs.storage.contest import to_waiting
from greenjobs.storage.fence import FENCE_TYPES, FENCED, Fence, fence_parameters
from greenjobs.storage.history import tell_watchers

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


# Errors of the last attempts kept on the row; more would make every later change of the row dearer.
KEPT_ERRORS = 10


class Failure(NamedTuple):
    """A failed attempt: seconds until the next, or None for never again; and the error, to be kept as a JSON object."""

    fence: Fence
    retry_in: float | None
    error: Mapping[str, Any]


class Snoozed(NamedTuple):
    """An attempt that is to be made again, as if it had not been made, in so many seconds."""

    fence: Fence
    seconds: float


_ACKNOWLEDGE = Statement(
    "acknowledge",
    f"""
DELETE FROM background_jobs AS job
USING {FENCED}
RETURNING job.id, {tell_watchers("job", "'done'")}
""",
    **FENCE_TYPES,
)


def acknowledge(connection: Connection, runners: Sequence[int], done: Sequence[Fence]) -> set[int]:
    """Delete finished jobs of a process that registered as these runners; returns the ids of those still held.

    The others are left as they are. On a connection that is not in autocommit it is part of the caller's transaction,
    as when a job completes in its own: what it does, it has to do in the statement, or in that transaction.
    """
    with connection.cursor(cursor_factory=TupleCursor) as cursor:
        _ACKNOWLEDGE.run(cursor, fence_parameters(runners, done))
        return {row[0] for row in cursor.fetchall()}


_FAIL = f"""
UPDATE background_jobs AS job
SET
    state = CASE WHEN failure.retry_in IS NULL THEN 'failed' ELSE 'scheduled' END,
    retries = job.retries + 1,
    last_retry = now(),
    run_at = now() + make_interval(secs => coalesce(failure.retry_in, 0)),
    claimed_by = NULL,
    claimed_at = NULL,
    expires_at = NULL,
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
RETURNING
    job.id,
    CASE WHEN job.state = 'failed' THEN {tell_watchers("job", "'failed'")} END
"""


def fail(connection: Connection, runners: Sequence[int], failures: Sequence[Failure]) -> set[int]:
    """Write down failed attempts: each job waits for its next, or stays as failed. Returns the ids still held."""
    document = orjson.dumps(
        [{**failure.fence._asdict(), "retry_in": failure.retry_in, "error": failure.error} for failure in failures]
    ).decode()
    held = [failure.fence.id for failure in failures]
    return to_waiting(connection, held, _FAIL, {"failures": document, "runners": list(runners), "kept": KEPT_ERRORS})


_GIVE_BACK = f"""
UPDATE background_jobs AS job
SET
    state = 'available',
    claimed_by = NULL,
    claimed_at = NULL,
    expires_at = CASE WHEN NOT %(has_started)s THEN job.expires_at END
FROM {FENCED}
RETURNING job.id
"""


def give_back(
    connection: Connection, runners: Sequence[int], unfinished: Sequence[Fence], *, has_started: bool = False
) -> set[int]:
    """Make claimed jobs available again without counting anything; returns the ids still held.

    What `has_started` does not expire any more.
    """
    held = [fence.id for fence in unfinished]
    parameters = {**fence_parameters(runners, unfinished), "has_started": has_started}
    return to_waiting(connection, held, _GIVE_BACK, parameters)


_SNOOZE = """
UPDATE background_jobs AS job
SET
    state = 'scheduled',
    run_at = now() + make_interval(secs => snoozed.seconds),
    claimed_by = NULL,
    claimed_at = NULL,
    expires_at = NULL
FROM unnest(%(ids)s::bigint[], %(attempts)s::int[], %(seconds)s::float8[]) AS snoozed (id, attempt, seconds)
WHERE job.id = snoozed.id
    AND job.attempt = snoozed.attempt
    AND job.claimed_by = ANY(%(runners)s::int[])
RETURNING job.id
"""


def snooze(connection: Connection, runners: Sequence[int], snoozed: Sequence[Snoozed]) -> set[int]:
    """Put claimed jobs off without counting anything; returns the ids still held."""
    fences = [each.fence for each in snoozed]
    parameters = {**fence_parameters(runners, fences), "seconds": [each.seconds for each in snoozed]}
    return to_waiting(connection, [fence.id for fence in fences], _SNOOZE, parameters)
