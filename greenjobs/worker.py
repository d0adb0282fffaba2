"""One queue in one runner: how much is claimed, and when.

Claiming overlaps execution: while jobs run, the next are claimed. How many are claimed ahead follows the rate at which
jobs finish: about 50 ms of work, none where jobs are slow. What was claimed ahead and cannot run soon is given back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event

from greenjobs import storage
from greenjobs.annex import Annex
from greenjobs.current import Attempt, Place
from greenjobs.execution import Executor, Meter
from greenjobs.job import Job
from greenjobs.pace import Pace
from greenjobs.storage import ClaimCursor, ClaimedJob
from greenjobs.tally import Tally

if TYPE_CHECKING:
    from greenjobs.acknowledger import Acknowledger
    from greenjobs.service import Service, Spawn
    from greenjobs.share import Share

# After saying that it waits, a worker looks again at once and once more after this: an enqueue that began before it
# said so, and committed after it had looked, wakes nobody. Such a window is one commit long.
_SECOND_LOOK_SECONDS = 0.05

# Jobs that were claimed ahead and none of which started for so long are stuck behind slow ones: they are given back.
_STALE_SECONDS = 0.2

# A claim from the top of the index sees what the cursor hides: higher priorities, late commits, what was given back.
# It happens at least this often, or less where it is slow, so that it takes no more than a tenth of the time.
_TOP_SECONDS = 0.025
_TOP_SHARE = 10


class Worker:
    """One queue in one runner. It claims under the id that `claim_as` gave it, and nothing without one.

    In a `share`, which it joins with its `weight`, the share says how many of its jobs run at a time: `pool` at most.
    """

    def __init__(
        self,
        place: Place,
        *,
        pool: int,
        poll_interval: float,
        read_ahead: int,
        jobs: Mapping[str, Job[Any, Any]],
        service: Service,
        acknowledger: Acknowledger,
        runner_name: str,
        spawn: Spawn,
        share: Share | None = None,
        weight: float | None = None,
    ) -> None:
        self._spawn = spawn
        self.queue = place.queue
        self.pool = self.configured_pool = pool
        self.is_paused = False
        self.poll_interval = poll_interval
        self._most_ahead = read_ahead
        self._job_types: Sequence[str] = sorted(jobs)
        self._lanes: dict[Annex, list[str]] = {}
        """The job types that run elsewhere: they are claimed by themselves, as far as there is room for them there."""
        self._lanes_are_next = False
        self._service = service
        self._acknowledger = acknowledger
        self._runner: int | None = None
        self._executor = Executor(
            pool=pool if share is None else 0,
            jobs=jobs,
            place=place,
            runner_name=runner_name,
            acknowledger=acknowledger,
            on_room=self._note_room,
        )
        self._pace = Pace()
        self._cursor: ClaimCursor | None = None
        self.exclusive_keys: dict[int, str] = {}
        """Of the jobs that were claimed here and have no outcome yet, those that exclude others, with their keys."""
        self._knows_exclusive = any(job.exclusion is not None for job in jobs.values())
        self._saw_exclusive = False
        self._exclusive_due_at = 0.0
        self._is_saturated = False
        self._top_due_at = 0.0
        self._claims_under_way = 0
        self._is_stopping = False
        self._woken = Event()
        self._room_made = Event()
        self._emptied = Event()
        self._holds_ready = Event()
        self._stake = None
        if share is not None:
            self._stake = share.join(self._executor, limit=pool, weight=weight, on_room=self._room_made.set)
        self._claiming: gevent.Greenlet[..., None] | None = None
        self._watching: gevent.Greenlet[..., None] | None = None

    # --- what the runner says to it -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to claim, as soon as there is a runner id to claim under."""
        if self._stake is not None:
            self._stake.share.distribute()
        self._claiming = self._spawn(self._claim_until_stopped)
        self._watching = self._spawn(self._give_back_stale)

    def run_elsewhere(self, job_types: Sequence[str], annex: Annex) -> None:
        """Run the jobs of these types there from now on, as far as they have not started."""
        self._executor.elsewhere.update(dict.fromkeys(job_types, annex))
        self._lanes = {}
        for job_type, its_annex in self._executor.elsewhere.items():
            self._lanes.setdefault(its_annex, []).append(job_type)
        annex.join(self)

    def count_waiting(self, annex: Annex) -> int:
        """How many jobs are here that are going to run there, and have not started."""
        return self._executor.count_waiting(annex)

    def note_room_elsewhere(self) -> None:
        """Start, or claim, what there was no room for. Returns at once."""
        self._executor.try_aside()
        self._woken.set()

    def claim_as(self, runner: int | None) -> None:
        """Claim under this id from now on; with None, claim nothing, and give back what has not started."""
        self._runner = runner
        if runner is None:
            self._give_back(self._executor.take_back())
        self._woken.set()
        self._room_made.set()

    def wake(self) -> None:
        """There may be work: look now. Returns at once."""
        self._top_due_at = 0.0
        self._exclusive_due_at = 0.0
        self._woken.set()
        if self._stake is not None:  # so that the wake-up is passed on where there is no room for it
            self._room_made.set()

    def adjust(self, *, paused: bool, pool: int | None) -> None:
        """Start nothing while it is paused, and run so many jobs at a time; None: as configured. Returns at once."""
        was_paused, self.is_paused = self.is_paused, paused
        self.pool = self.configured_pool if pool is None else pool
        if self._stake is None:
            self._executor.resize(self.pool)
        else:
            self._stake.limit = 0 if paused else self.pool
        if paused:
            self._give_back(self._executor.take_back())
        elif was_paused:
            self.wake()
        self._note_room()

    def show_exclusive(self) -> None:
        """There is work that excludes other work, which is new to a worker that knows no such jobs. Returns at once."""
        self._saw_exclusive = True
        self.wake()

    def stop_claiming(self) -> None:
        """Begin no further claim, and start no further job: what has not started is given back. Returns at once."""
        self._is_stopping = True
        self._give_back(self._executor.take_back())
        self._woken.set()
        self._room_made.set()

    def wait_claimed(self) -> None:
        """Block until the claim that was under way, if one was, is answered."""
        if self._claiming is not None:
            self._claiming.join()

    def end(self) -> None:
        """End at once, a claim that is under way included."""
        gevent.killall([greenlet for greenlet in (self._claiming, self._watching) if greenlet is not None])

    def wait_until_done(self) -> None:
        """Block until no job is here any more."""
        while self._executor.held:
            self._emptied.clear()
            self._emptied.wait()

    @property
    def running(self) -> Mapping[int, Attempt]:
        """The jobs that run here at this moment, by id."""
        return self._executor.running

    @property
    def ready(self) -> int:
        """How many jobs were claimed here and have not started."""
        return self._executor.ready

    @property
    def finished(self) -> int:
        """How many jobs have run to their end here, well or not."""
        return self._executor.finished

    @property
    def tallies(self) -> Mapping[str, Tally]:
        """What ended here and how, by job type, for the runner to take and write."""
        return self._executor.tallies

    def measure(self, meters: Mapping[str, Meter] | None) -> None:
        """Have the attempts measured by these, which are by job type; None: by nobody."""
        self._executor.meters = meters

    @property
    def is_idle(self) -> bool:
        """Whether it neither runs nor holds nor is claiming anything."""
        return not (self._executor.held or self._claims_under_way)

    @property
    def has_room(self) -> bool:
        """Whether it could run more jobs than it has, or, in a share, would if it knew of any."""
        executor, stake = self._executor, self._stake
        if self.is_paused or executor.held >= self.pool:
            return False
        return stake is None or not stake.is_hungry or executor.held < executor.pool

    def held_rows(self) -> list[ClaimedJob]:
        """The jobs that were claimed here and are not finished."""
        return self._executor.held_rows()

    def interrupt_all(self, error: Callable[[], BaseException]) -> None:
        """Raise an error in every running job; returns at once."""
        for attempt in list(self._executor.running.values()):
            self._executor.interrupt(attempt, error())

    def cancel(self, job_id: int) -> None:
        """End this job, if it is here."""
        self._executor.cancel(job_id)

    def claim_suspect(self) -> int | None:
        """Take one job whose runner died, if one waits here and there is room for it; returns its id."""
        if self._is_stopping or self._runner is None or not self._has_room_for_suspect():
            return None
        claimed = self._claim(self._runner, 1, suspects=True)
        return claimed[0].id if claimed else None

    def claim_next(self, keys: Sequence[str]) -> set[str]:
        """Take the job that is next in line here for each of these exclusive keys, where there is room; returns the
        keys of those that were taken."""
        room = 0 if self._is_stopping or self.is_paused else self._room()
        if self._runner is None or room <= 0:
            self._exclusive_due_at = 0.0
            return set()
        return {str(row.exclusive_key) for row in self._claim_exclusive(self._runner, room, keys=keys)}

    def _has_room_for_suspect(self) -> bool:
        if self.is_paused or self._executor.held >= self.pool:
            return False
        # In a share it may wait here for the next free slot: on a busy day there is none just when it is looked for.
        stake = self._stake
        return stake is None or (not self._executor.ready and stake.share.is_next(stake))

    # --- claim --------------------------------------------------------------------------------------------------------

    def _claim_until_stopped(self) -> None:
        while not self._is_stopping:
            room = self._room()
            runner = self._runner
            if room <= 0 or runner is None:
                self._room_made.clear()
                if self._stake is not None and self._woken.is_set():
                    self._pass_wake_up_on()
                self._room_made.wait()
                continue
            # Arm the wake-up before claiming: a row committed between the two would otherwise wait for the next poll.
            self._woken.clear()
            if len(self._claim_available(runner, room)) < room:
                if self._stake is not None:
                    self._stake.set_hungry(False)
                self._wait_for_work(runner)
                if self._stake is not None:
                    self._stake.set_hungry(True)

    def _pass_wake_up_on(self) -> None:
        """It was woken, but others have all slots of the share: another runner that waits may have room."""
        self._woken.clear()
        if not (self.is_paused or self._is_stopping):
            self._service.call(storage.wake, [self.queue])

    def _wait_for_work(self, runner: int) -> None:
        if self._woken.is_set():
            return
        self._service.call(storage.say_waiting, runner, [self.queue])
        if self._look_again() or self._woken.wait(_SECOND_LOOK_SECONDS):
            return
        if not self._look_again():
            self._woken.wait()

    def _look_again(self) -> bool:
        runner, room = self._runner, self._executor.pool - self._executor.held
        if self._stake is not None and self._executor.held < self._stake.limit:
            # Others may have all slots by now; one job too many tells that there is something to wait for.
            room = max(room, 1)
        if self.is_paused:
            return False
        return runner is not None and room > 0 and bool(self._claim_available(runner, room))

    def _room(self) -> int:
        """How many jobs to claim: the free slots of the pool, and what to have ready beyond them."""
        executor, stake = self._executor, self._stake
        if self.is_paused:
            return 0
        ahead = min(self._pace.measure(executor), self._most_ahead)
        if stake is not None and not stake.may_read_ahead:
            ahead = 0
        room = executor.pool + ahead - executor.held
        # With enough ready for half of that time no slot stays empty, and fewer, larger claims are cheaper.
        return 0 if ahead and executor.ready > ahead // 2 else room

    def _claim_available(self, runner: int, limit: int) -> list[ClaimedJob]:
        if not self._lanes:
            return self._claim_here(runner, limit)
        # By turns, as either may take all that there is room for.
        self._lanes_are_next = not self._lanes_are_next
        rows: list[ClaimedJob] = []
        for claim in (self._claim_lanes, self._claim_here)[:: 1 if self._lanes_are_next else -1]:
            if len(rows) < limit:
                rows += claim(runner, limit - len(rows))
        return rows

    def _claim_lanes(self, runner: int, limit: int) -> list[ClaimedJob]:
        rows: list[ClaimedJob] = []
        for annex, job_types in tuple(self._lanes.items()):
            room = min(limit - len(rows), annex.room)
            if room > 0:
                with annex.reserved(room):
                    rows += self._take(storage.claim, runner, may_exclude=False, limit=room, job_types=job_types)
        return rows

    def _claim_here(self, runner: int, limit: int) -> list[ClaimedJob]:
        if not (self._knows_exclusive or self._saw_exclusive):
            return self._claim_plain(runner, limit)
        rows: list[ClaimedJob] = []
        # While there are always more jobs than room, those that exclude others come in when it is their turn among all.
        if self._is_saturated and time.monotonic() >= self._exclusive_due_at:
            rows = self._claim_exclusive(runner, limit, before=self._cursor)
        if len(rows) < limit:
            plain = self._claim_plain(runner, limit - len(rows))
            self._is_saturated = len(plain) == limit - len(rows)
            rows += plain
        if len(rows) < limit:
            self._saw_exclusive = False
            rows += self._claim_exclusive(runner, limit - len(rows))
        return rows

    def _claim_plain(self, runner: int, limit: int) -> list[ClaimedJob]:
        """Claim behind the cursor; from the top when that is due, or when there is not enough behind the cursor."""
        if self._cursor is not None and time.monotonic() < self._top_due_at:
            rows = self._claim(runner, limit, after=self._cursor)
            if len(rows) == limit:
                return rows
            return rows + self._claim_from_top(runner, limit - len(rows))
        return self._claim_from_top(runner, limit)

    def _claim_from_top(self, runner: int, limit: int) -> list[ClaimedJob]:
        started = time.monotonic()
        rows = self._claim(runner, limit)
        ended = time.monotonic()
        self._top_due_at = ended + max(_TOP_SECONDS, _TOP_SHARE * (ended - started))
        return rows

    def _claim(
        self, runner: int, limit: int, *, suspects: bool = False, after: ClaimCursor | None = None
    ) -> list[ClaimedJob]:
        which = {"job_types": self._types(with_lanes=suspects), "limit": limit, "suspects": suspects, "after": after}
        if not which["job_types"]:
            return []
        rows = self._take(storage.claim, runner, may_exclude=suspects, **which)
        if rows and not suspects:
            self._cursor = storage.claim_order(rows[-1])
        return rows

    def _claim_exclusive(
        self, runner: int, limit: int, *, before: ClaimCursor | None = None, keys: Sequence[str] | None = None
    ) -> list[ClaimedJob]:
        started = time.monotonic()
        rows: list[ClaimedJob] = []
        places = [(None, self._types(with_lanes=False)), *self._lanes.items()]
        for annex, job_types in places[:: -1 if self._lanes_are_next else 1]:
            room = limit - len(rows) if annex is None else min(limit - len(rows), annex.room)
            if room <= 0 or not job_types:
                continue
            which = {"job_types": job_types, "limit": room, "before": before, "keys": keys}
            with contextlib.nullcontext() if annex is None else annex.reserved(room):
                rows += self._take(storage.claim_exclusive, runner, may_exclude=True, **which)
        ended = time.monotonic()
        if keys is None:
            is_all = len(rows) < limit
            self._exclusive_due_at = ended + max(_TOP_SECONDS, _TOP_SHARE * (ended - started)) if is_all else 0.0
        return rows

    def _types(self, *, with_lanes: bool) -> Sequence[str]:
        """The job types to claim: those that run here, and `with_lanes` those for which there is room elsewhere."""
        if not self._lanes:
            return self._job_types
        elsewhere = self._executor.elsewhere
        return [
            job_type
            for job_type in self._job_types
            if job_type not in elsewhere or (with_lanes and elsewhere[job_type].room > 0)
        ]

    def _take(
        self, claim: Callable[..., list[ClaimedJob]], runner: int, *, may_exclude: bool, **which: Any
    ) -> list[ClaimedJob]:
        self._claims_under_way += 1
        try:
            rows = self._service.call(claim, runner=runner, queue=self.queue, **which)
            if may_exclude:
                self.exclusive_keys.update((row.id, row.exclusive_key) for row in rows if row.exclusive_key is not None)
            if self._runner == runner and not (self._is_stopping or self.is_paused):
                self._executor.add(rows)
                if self._stake is not None:
                    self._stake.share.distribute()
            else:  # it is to stop or paused, or the session was lost meanwhile, and with it the right to start them
                self._give_back([storage.Fence(row.id, row.attempt) for row in rows])
        finally:
            self._claims_under_way -= 1
        if self._executor.ready:
            self._holds_ready.set()
        return rows

    def _note_room(self) -> None:
        executor = self._executor
        if not executor.held:
            self._emptied.set()
        if self._stake is not None:
            self._stake.share.distribute()
        self._room_made.set()

    # --- give back ----------------------------------------------------------------------------------------------------

    def _give_back(self, unstarted: Sequence[storage.Fence]) -> None:
        for fence in unstarted:
            self._acknowledger.unfinished.add(fence)
        self._note_room()

    def _give_back_stale(self) -> None:
        """Give back what was claimed ahead when jobs turn slow, so that others can have it."""
        executor = self._executor
        while True:
            self._holds_ready.wait()
            self._holds_ready.clear()
            finished, aside = executor.finished, executor.next_aside
            gevent.sleep(_STALE_SECONDS)
            if not executor.ready:
                continue
            if executor.finished == finished and len(executor.running) >= executor.pool:
                self._pace.reset()
                self._give_back(executor.take_back())
                continue
            if aside is not None and executor.next_aside is aside:  # those count as held here, and keep others out
                self._give_back(executor.take_aside())
            self._holds_ready.set()
