"""Every statement that only reads: what waits, what runs, who lives."""

from greenjobs.inspection.care import Chores, chores, failed_count
from greenjobs.inspection.due import Work, look, seconds_until_due
from greenjobs.inspection.liveness import RunnerStatus, dead_runners, held_jobs, live_runners
from greenjobs.inspection.readiness import DatabaseState, database_state
from greenjobs.inspection.said_of_queues import UNCHANGED, QueueSetting, queue_settings
from greenjobs.inspection.served_queues import Queue, QueueServer, QueueStatus, known_queues, queue_statuses, queues
from greenjobs.inspection.stored_jobs import (
    HISTORY_IS_MEANT,
    JobFilter,
    StoredJob,
    UnknownJobType,
    choose_jobs,
    count_jobs,
    find_jobs,
    job_states,
    unknown_job_types,
)
from greenjobs.inspection.timetables import DueSchedule, Schedule, due_schedules, schedules, seconds_until_tick
from greenjobs.inspection.transactions import has_written, is_unfinished, now

__all__ = [
    "HISTORY_IS_MEANT",
    "UNCHANGED",
    "Chores",
    "DatabaseState",
    "DueSchedule",
    "JobFilter",
    "Queue",
    "QueueServer",
    "QueueSetting",
    "QueueStatus",
    "RunnerStatus",
    "Schedule",
    "StoredJob",
    "UnknownJobType",
    "Work",
    "choose_jobs",
    "chores",
    "count_jobs",
    "database_state",
    "dead_runners",
    "due_schedules",
    "failed_count",
    "find_jobs",
    "has_written",
    "held_jobs",
    "is_unfinished",
    "job_states",
    "known_queues",
    "live_runners",
    "look",
    "now",
    "queue_settings",
    "queue_statuses",
    "queues",
    "schedules",
    "seconds_until_due",
    "seconds_until_tick",
    "unknown_job_types",
]
