"""Schedules, for people and for those who keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from greenjobs.inspection.liveness import LIVES
from greenjobs.statement import Statement

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


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
    WHERE {LIVES}
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
