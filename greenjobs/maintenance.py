"""What every runner does beside running jobs: makes jobs available when they are due, looks for work that nobody was
woken for, and takes back what dead runners held.

All of it is done by every runner, in statements that any number of them may run at once; there is no leader.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import gevent
from gevent.event import Event

from greenjobs import inspection, storage

if TYPE_CHECKING:
    from greenjobs.inspection import QueueSetting
    from greenjobs.service import Service, Spawn
    from greenjobs.worker import Worker

logger = logging.getLogger(__name__)

# Due jobs are moved in statements of this size: some tens of milliseconds each.
_PROMOTE_AT_ONCE = 1000

# How soon a dead runner's jobs are found. The look is one query of the register and of pg_locks.
_CARE_SECONDS = 1.0

# A claim that was under way when its connection died may have been committed: a look this often finds such rows.
_AUDIT_SECONDS = 30.0
_AUDIT_AGE_SECONDS = 10.0

# What was kept long enough, failed jobs and counts, is looked for this often, by every runner; when there was as much
# as one statement deletes, again a turn later.
_PRUNE_SECONDS = 60.0
_PRUNE_AT_ONCE = 1000

# Finished jobs may be as many as jobs: so many statements a turn keep pace with what a runner finishes.
_PRUNE_HISTORY_ROUNDS = 10

# Entries of ended runners are kept for a day, for claims of theirs that arrived late and for people who ask.
_REMEMBER_RUNNERS_SECONDS = 24 * 60 * 60.0


class Fellow(Protocol):
    """What maintenance needs of its runner."""

    runner_id: int | None
    workers: Mapping[str, Worker]
    home_queues: Mapping[str, str]
    job_types: Sequence[str]
    max_crashes: int
    keep_failed_seconds: float
    keep_counts_seconds: float

    def cancel(self, job_id: int) -> None:
        """End this job, if it is here."""

    def held_ids(self) -> set[int]:
        """The jobs that were claimed here, the outcome of which is not in the database yet."""

    def claim_suspect(self, queue: str) -> None:
        """Take one job whose runner died from this queue, unless one is held here."""

    def note_failed(self, queue: str, job_type: str) -> None:
        """Count a job that failed because its runners died."""

    def adjust_queues(self, settings: Mapping[str, QueueSetting]) -> None:
        """Pause, resume and resize the queues as is said of them."""


class Maintenance:
    """Four loops beside the workers of a runner."""

    def __init__(self, fellow: Fellow, service: Service, *, spawn: Spawn) -> None:
        self._spawn = spawn
        self._fellow = fellow
        self._service = service
        self._due_sooner = Event()
        self._queues_changed = Event()
        self._looks_at_queues = 0
        self._look_that_counts = 0
        self.rescued = 0
        """How many jobs were taken back from dead runners so far."""
        self._greenlets: list[gevent.Greenlet[..., None]] = []
        self._audited_at = time.monotonic()
        self._prune_at = time.monotonic()
        self._prune_history_at = time.monotonic()
        self._prune_counts_at = time.monotonic()

    def start(self) -> None:
        """Begin all loops."""
        self._greenlets = [
            self._spawn(self._promote_for_ever),
            self._spawn(self._look_for_ever),
            self._spawn(self._care_for_ever),
            self._spawn(self._follow_queues_for_ever),
        ]

    def stop(self) -> None:
        """End all loops, wherever they are; each statement is whole or not at all."""
        gevent.killall(self._greenlets)

    def expect_due(self) -> None:
        """A job is due soon: look when. Returns at once."""
        self._due_sooner.set()

    def expect_changed_queues(self) -> None:
        """Something was said of a queue: read it. Returns at once."""
        self._queues_changed.set()

    # --- due jobs -----------------------------------------------------------------------------------------------------

    def promote_due(self) -> None:
        """Make every job available that is due."""
        while True:
            promoted = self._service.call(storage.promote, limit=_PROMOTE_AT_ONCE)
            self._wake([queue for queue in promoted if queue is not None])
            if None in promoted:
                self.route()
            if sum(promoted.values()) < _PROMOTE_AT_ONCE:
                return

    def _promote_for_ever(self) -> None:
        while True:
            self._due_sooner.clear()
            seconds = self._service.call(inspection.seconds_until_due)
            if seconds is not None and seconds <= 0:
                self.promote_due()
            if seconds is None or seconds > storage.PROMOTER_SECONDS:
                seconds = storage.PROMOTER_SECONDS
            self._due_sooner.wait(max(seconds, 0.001))

    # --- work that nobody was woken for -------------------------------------------------------------------------------

    def look(self, queues: Sequence[str]) -> bool:
        """Look for available jobs in these queues, and wake their workers; whether there were any."""
        fellow = self._fellow
        found = self._service.call(inspection.look, queues=queues, job_types=fellow.job_types)
        for queue, work in found.items():
            if work.has_innocents:
                fellow.workers[queue].wake()
            if work.has_exclusive:
                fellow.workers[queue].show_exclusive()
            if work.has_suspects:
                fellow.claim_suspect(queue)
        return any(map(any, found.values()))

    def _look_for_ever(self) -> None:
        looked_at = dict.fromkeys(self._fellow.workers, time.monotonic())
        while True:
            now = time.monotonic()
            workers = self._fellow.workers.values()
            gevent.sleep(max(min(looked_at[worker.queue] + worker.poll_interval for worker in workers) - now, 0.01))
            now = time.monotonic()
            queues = [
                worker.queue
                for worker in workers
                if looked_at[worker.queue] + worker.poll_interval <= now and worker.has_room
            ]
            looked_at.update(
                (worker.queue, now) for worker in workers if looked_at[worker.queue] + worker.poll_interval <= now
            )
            runner = self._fellow.runner_id
            if queues and runner is not None:
                self._service.call(storage.say_waiting, runner, queues)
                self.look(queues)

    # --- what is said of queues at run time ---------------------------------------------------------------------------

    def read_queues(self) -> None:
        """Read what is said of queues, and act on it."""
        look = self._begin_look_at_queues()
        self._adjust_queues(look, self._service.call(inspection.queue_settings))

    def _follow_queues_for_ever(self) -> None:
        while True:
            self._queues_changed.wait()
            self._queues_changed.clear()
            self.read_queues()

    def _begin_look_at_queues(self) -> int:
        self._looks_at_queues += 1
        return self._looks_at_queues

    def _adjust_queues(self, look: int, settings: Mapping[str, QueueSetting]) -> None:
        # The answer to an earlier look may come after that to a later one, and is out of date then.
        if look > self._look_that_counts:
            self._look_that_counts = look
            self._fellow.adjust_queues(settings)

    # --- the dead, the homeless, the lost -----------------------------------------------------------------------------

    def route(self) -> None:
        """Put jobs without a queue where their types are at home here."""
        self._wake(self._service.call(storage.route, self._fellow.home_queues))

    def rescue(self) -> None:
        """Take back what dead runners held."""
        self._rescue_from(self._service.call(inspection.dead_runners))

    def _rescue_from(self, dead: Sequence[int]) -> None:
        # Without its own former ids: what it still holds under them it adopts when it has a session again.
        own_ids = set(self._service.runner_ids)
        dead = [runner for runner in dead if runner not in own_ids]
        if not dead:
            return
        rescued = self._service.call(storage.rescue, dead, most_crashes=self._fellow.max_crashes)
        self.rescued += len(rescued)
        for job in rescued:
            level, outcome = (logging.ERROR, "failed") if job.has_failed else (logging.WARNING, "available again")
            logger.log(
                level,
                "job %s (%s) was held by a runner that died (%s times so far): %s",
                *(job.id, job.job_type, job.crashes, outcome),
                extra={"job_id": job.id, "job_type": job.job_type, "queue": job.queue},
            )
            if job.has_failed:
                self._fellow.note_failed(job.queue, job.job_type)
        queues = sorted({job.queue for job in rescued if not job.has_failed})
        self._wake(queues)
        keys = {job.exclusive_key for job in rescued if job.exclusive_key is not None}
        if keys:
            self._service.call(storage.wake_next, sorted(keys), queues=[])
        own = [queue for queue in queues if queue in self._fellow.workers]
        if own:
            self.look(own)

    def _do_chores(self) -> None:
        look = self._begin_look_at_queues()
        chores = self._service.call(inspection.chores, self._service.runner_ids)
        self._adjust_queues(look, chores.queues)
        if chores.has_homeless:
            self.route()
        self._rescue_from(chores.dead)
        # Cancelled here, and the notification was missed; or anywhere, and the job came back to waiting.
        for job_id in chores.cancelled:
            self._fellow.cancel(job_id)
        if chores.has_unwanted:
            self._service.call(storage.remove_cancelled)
        # All that are over go, but only when one has been so for a minute: so there is little to do but once a minute.
        if chores.has_past_windows:
            while self._service.call(storage.prune_windows, limit=_PRUNE_AT_ONCE) == _PRUNE_AT_ONCE:
                pass

    def audit(self) -> None:
        """Give back what the database says this runner holds, and it does not know of."""
        runners = self._service.runner_ids
        held = self._service.call(inspection.held_jobs, runners, age_seconds=_AUDIT_AGE_SECONDS)
        known = self._fellow.held_ids()
        unknown = [storage.Fence(id, attempt) for id, attempt in held if id not in known]
        if unknown:
            given_back = self._service.call(storage.give_back, runners, unknown)
            if given_back:
                logger.warning("gave back jobs %s, whose claim was never answered", sorted(given_back))

    def prune(self) -> None:
        """Delete some of the jobs that failed longer ago than they are kept, if it is time to look for them."""
        keep_seconds = self._fellow.keep_failed_seconds
        if not keep_seconds or time.monotonic() < self._prune_at:
            return
        pruned = self._service.call(storage.prune, age_seconds=keep_seconds, limit=_PRUNE_AT_ONCE)
        if pruned < _PRUNE_AT_ONCE:
            self._prune_at = time.monotonic() + _PRUNE_SECONDS
        if pruned:
            logger.info("pruned %s jobs that failed more than %.0f s ago", pruned, keep_seconds)

    def prune_history(self) -> None:
        """Delete some of the finished jobs that were kept long enough, if it is time to look for them."""
        if time.monotonic() < self._prune_history_at:
            return
        for _ in range(_PRUNE_HISTORY_ROUNDS):
            pruned = self._service.call(storage.prune_history, limit=_PRUNE_AT_ONCE)
            if pruned < _PRUNE_AT_ONCE:
                self._prune_history_at = time.monotonic() + _PRUNE_SECONDS
                return

    def prune_counts(self) -> None:
        """Delete some of the counts of minutes longer ago than they are kept, if it is time to look for them."""
        keep_seconds = self._fellow.keep_counts_seconds
        if not keep_seconds or time.monotonic() < self._prune_counts_at:
            return
        pruned = self._service.call(storage.prune_counts, age_seconds=keep_seconds, limit=_PRUNE_AT_ONCE)
        if pruned < _PRUNE_AT_ONCE:
            self._prune_counts_at = time.monotonic() + _PRUNE_SECONDS

    def _note_memory(self) -> None:
        runner = self._fellow.runner_id
        if runner is not None:
            self._service.call(storage.note_memory, runner, resident_memory())

    def _care_for_ever(self) -> None:
        while True:
            self._do_chores()
            self.prune()
            self.prune_history()
            self.prune_counts()
            if time.monotonic() - self._audited_at > _AUDIT_SECONDS:
                self._audited_at = time.monotonic()
                self.audit()
                self._note_memory()
                self._service.call(storage.forget_runners, age_seconds=_REMEMBER_RUNNERS_SECONDS)
            gevent.sleep(_CARE_SECONDS)

    def _wake(self, queues: Sequence[str]) -> None:
        """Wake the workers of these queues: our own at once, those of others through the database."""
        if not queues:
            return
        for queue in queues:
            if queue in self._fellow.workers:
                self._fellow.workers[queue].wake()
        self._service.call(storage.wake, queues)


def resident_memory() -> int:
    """The memory that this process holds, in bytes; where /proc is missing, the most that it ever held."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
