"""What there is to do for a runner beside running jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from greenjobs.inspection.liveness import DEAD
from greenjobs.inspection.said_of_queues import QUEUE_SETTINGS, QueueSetting, as_settings
from greenjobs.statement import Statement

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


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


_CHORES = Statement(
    "chores",
    f"""
SELECT
    ARRAY(
        {DEAD}
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
    ({QUEUE_SETTINGS})
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
        return Chores._make([*others, as_settings(settings)])


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
