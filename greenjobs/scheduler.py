"""Enqueues the ticks of schedules, each once over all runners, and keeps the declared ones in the database.

Every runner does it, and none of them leads. Who sees a tick that is due moves the schedule on to the next and enqueues
the job, in one transaction that begins by claiming exactly the tick that was seen: of any number one succeeds, and when
it dies before the commit nothing has happened. What is due is decided by the clock of the database.

A schedule of code or settings belongs to the runner that declared it last, and its ticks are enqueued by those that
declare it, too. A runner that starts takes its own over, changed or not, and goes on from where they were. What belongs
to a runner that has ended is taken over by any other that declares it, and deleted a minute later, if there was none,
by one that knows the job. So in a rolling deploy the newest word counts; what only the old runners declare goes on
until the last of them has ended; and when the new ones are taken back, the word of the old ones counts again.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import gevent

from greenjobs import inspection, storage
from greenjobs.cron import Timetable
from greenjobs.errors import ConfigError, OptionError, PayloadError, UniquenessError
from greenjobs.schedules import declared

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from greenjobs.inspection import DueSchedule
    from greenjobs.job import Job
    from greenjobs.service import Service

logger = logging.getLogger(__name__)

# How soon a schedule that somebody made or changed is noticed.
_LOOK_SECONDS = 1.0

# How often it looks after what other runners declared.
_DECLARE_SECONDS = 10.0

# Missed ticks are enqueued in transactions of this size.
_TICKS_AT_ONCE = 100


class Scheduler:
    """Looks after the schedules of a runner's jobs; `lines` are those of the settings."""

    def __init__(self, jobs: Mapping[str, Job[Any, Any]], lines: Iterable[str], service: Service) -> None:
        self._jobs = jobs
        self._declared = declared(jobs, lines)
        self._own = {"job_types": sorted(jobs), "declared": sorted(self._declared)}
        self._service = service
        self._broken: set[str] = set()
        self._greenlet: gevent.Greenlet[..., None] | None = None

    def start(self) -> None:
        """Declare the runner's schedules, enqueue what was missed, and go on beside it.

        Raises ConfigError when a schedule of the same name was made at run time.
        """
        self.declare(takes_all=True)
        self.enqueue_due()
        self._greenlet = gevent.spawn(self._run)

    def stop(self) -> None:
        """End, wherever it is; a tick is enqueued or it is not."""
        if self._greenlet is not None:
            self._greenlet.kill()

    def declare(self, *, takes_all: bool = False) -> None:
        """Write down the schedules that are declared here and belong to nobody alive, or with `takes_all` all of them;
        delete those that nobody declares any more."""
        now = self._service.call(inspection.now)
        known = {schedule.name: schedule for schedule in self._service.call(inspection.schedules)}
        runner = self._service.runner_ids[-1]
        for declaration in self._declared.values():
            row = known.get(declaration.name)
            if not takes_all and row is not None and (row.declarer_lives or row.source == "api"):
                continue
            is_ours = self._service.call(storage.keep_schedule, declaration.begun(now), declared_by=runner)
            if not is_ours and takes_all:
                raise ConfigError(
                    f"the schedule {declaration.name!r} of {declaration.job.name} is declared in {declaration.source}, "
                    f"but one of that name was made at run time; type `greenjobs schedules remove '{declaration.name}'`"
                )
        for row in known.values():
            if row.name in self._declared or row.job_type not in self._jobs or not row.is_orphaned:
                continue
            if self._service.call(storage.drop_schedule, row.name, declared_by=row.declared_by):
                logger.info("deleted the schedule %r of %s, which nobody declares any more", row.name, row.job_type)

    def enqueue_due(self) -> bool:
        """Enqueue every tick that is due; False when there are some that cannot be worked out here."""
        due = self._service.call(inspection.due_schedules, **self._own)
        outcomes = [self._enqueue_ticks(schedule) for schedule in due]
        return all(outcomes)

    def _run(self) -> None:
        declared_at = time.monotonic()
        while True:
            if time.monotonic() - declared_at > _DECLARE_SECONDS:
                declared_at = time.monotonic()
                self.declare()
            seconds = self._service.call(inspection.seconds_until_tick, **self._own)
            is_clear = seconds is None or seconds > 0 or self.enqueue_due()
            if not is_clear or seconds is None or seconds > _LOOK_SECONDS:
                seconds = _LOOK_SECONDS
            gevent.sleep(max(seconds, 0.001))

    def _enqueue_ticks(self, due: DueSchedule) -> bool:
        try:
            timetable = Timetable(due.cron, due.timezone, due.catch_up)
        except ValueError as error:
            # Such as a time zone that is known on the host where the schedule was made, and not on this one.
            self._note_broken(due, "the ticks of the schedule %r (%s) cannot be worked out: %s", error)
            return False
        pending = timetable.due_ticks(due.next_tick_at, due.now)
        is_ours, tick = True, next(pending, None)
        while is_ours:
            ticks = [] if tick is None else [tick, *itertools.islice(pending, _TICKS_AT_ONCE - 1)]
            tick = next(pending, None)
            following = tick if tick is not None else timetable.next_after(due.now)
            try:
                is_ours = self._service.call(self._take, due, ticks, following) and tick is not None
            except (UniquenessError, PayloadError) as error:
                # Its arguments are older than the job is now, or the job's own functions have failed. Nothing was done.
                self._note_broken(due, "the ticks of the schedule %r (%s) cannot be enqueued: %s", error)
                return False
            due = due._replace(next_tick_at=following)
        return True

    def _note_broken(self, due: DueSchedule, message: str, error: Exception) -> None:
        if due.name not in self._broken:
            self._broken.add(due.name)
            logger.error(message, due.name, due.job_type, error)

    def _take(self, connection: Connection, due: DueSchedule, ticks: Sequence[datetime], following: datetime) -> bool:
        """In one transaction: move the schedule on, and enqueue a job for each tick; False when somebody else has."""
        definition = {"job_type": due.job_type, "cron": due.cron, "timezone": due.timezone, "catch_up": due.catch_up}
        schedule = {"name": due.name, "cron": due.cron, "timezone": due.timezone}
        with storage.atomic(connection):
            taken = storage.take_ticks(connection, due.name, **definition, seen=due.next_tick_at, next=following)
            if taken is None:
                return False
            job = self._jobs[due.job_type]
            last_job, last_tick = taken.last_job_id, None
            for tick in ticks:
                if not taken.overlap and last_job is not None and inspection.is_unfinished(connection, last_job):
                    logger.info("left out the tick of %r at %s: job %s has not finished", due.name, tick, last_job)
                    continue
                call = job.options(queue=taken.queue, priority=taken.priority, run_at=tick, connection=connection)
                try:
                    last_job, last_tick = call.enqueue_tick(taken.data, tick_at=tick, schedule=schedule).id, tick
                except OptionError as error:  # an overlap_key that fails for these arguments
                    logger.error("the tick of %r (%s) at %s cannot be enqueued: %s", due.name, job.name, tick, error)
            if last_job is not None and last_tick is not None:
                storage.note_tick(connection, due.name, tick=last_tick, job=last_job)
        return True
