"""Schedules, and the ticks that enqueue their jobs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


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
