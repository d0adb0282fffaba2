"""Runs claimed jobs of one queue in greenlets, at most so many at once, each in a greenlet and a context of its own.

Making a greenlet costs ten times what switching to one does, so a carrier, the greenlet that runs a job, takes the next
job too, but only when nothing can tell it from a fresh one: no reference to it is left behind, no link, no attribute,
no thread-local value. Contexts are always fresh.
"""

from __future__ import annotations

import logging
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from itertools import chain
from types import FrameType
from typing import TYPE_CHECKING, Any

import gevent

from greenjobs import config, events
from greenjobs.annex import Annex
from greenjobs.current import Attempt, Place, enter_attempt
from greenjobs.error_record import error_record
from greenjobs.errors import (
    JobCancelled,
    JobControl,
    JobExpired,
    JobHardTimeout,
    JobInterrupted,
    JobLost,
    JobTimeout,
)
from greenjobs.job import Job
from greenjobs.keeping import keep_seconds
from greenjobs.policy import Verdict, judge
from greenjobs.storage import ClaimedJob, Ended, Failure, Fence, Snoozed, claim_order
from greenjobs.surroundings import call_within
from greenjobs.tally import Tally

if TYPE_CHECKING:
    from greenjobs.acknowledger import Acknowledger

logger = logging.getLogger(__name__)

# Apart from the outcomes of attempts, which those who report them from events do not want to have twice.
_stuck_logger = logging.getLogger(f"{__name__}.stuck")

Meter = Callable[[events.Outcome, float, float], None]
"""Called with the outcome of an attempt, how long it ran, and how long it had waited; must neither raise nor wait."""

# Jobs that never wait leave the event loop a turn this often.
_SLICE_SECONDS = 0.001

# A job that was told to end and goes on for so long is reported as stuck.
_OBEDIENCE_SECONDS = 5.0


class Executor:
    """Runs the jobs of one queue, `pool` at a time, which may change.

    `on_room` is called when there may be room for more. `finished` counts jobs and `busy_seconds` adds up how long they
    ran; both only grow. `tallies` count by job type, for whoever takes from them. `meters` measure, if there are any:
    that of its job type is called at the end of an attempt.
    """

    def __init__(
        self,
        *,
        pool: int,
        jobs: Mapping[str, Job[Any, Any]],
        place: Place,
        runner_name: str,
        acknowledger: Acknowledger,
        on_room: Callable[[], None],
    ) -> None:
        self.pool = pool
        self.running: dict[int, Attempt] = {}
        self.finished = 0
        self.busy_seconds = 0.0
        self.tallies = {job_type: Tally() for job_type in jobs}
        self.meters: Mapping[str, Meter] | None = None
        self._jobs = jobs
        self._place = place
        self._surroundings = place.surroundings
        self._runner_name = runner_name
        self._done = acknowledger.done.add
        self._ended = acknowledger.ended.add
        self._failed = acknowledger.failed.add
        self._interrupted = acknowledger.interrupted.add
        self._snoozed = acknowledger.snoozed.add
        self._completed = acknowledger.note_completed
        self._on_room = on_room
        self._ready: deque[ClaimedJob] = deque()
        self._carriers = 0
        self._next_carrier_is_coming = False
        self.elsewhere: dict[str, Annex] = {}
        """Where jobs of these types run, if not in a greenlet here."""
        self._aside: deque[ClaimedJob] = deque()

    @property
    def ready(self) -> int:
        """How many jobs are here and have not started."""
        return len(self._ready) + len(self._aside)

    @property
    def held(self) -> int:
        """How many jobs are here: those that run, and those that have not started."""
        return len(self.running) + len(self._ready) + len(self._aside)

    def add(self, rows: Sequence[ClaimedJob]) -> None:
        """Run these claimed jobs, in this order, higher priorities before what is here already; returns at once."""
        if rows and self._ready and rows[0].priority > self._ready[-1].priority:
            self._ready = deque(sorted(chain(self._ready, rows), key=claim_order))
        else:
            self._ready.extend(rows)
        self._send_carrier()

    def resize(self, pool: int) -> None:
        """Run so many at a time from now on: more at once, or fewer when some of those that run have ended."""
        self.pool = pool
        self._send_carrier()

    def take_back(self) -> list[Fence]:
        """Take away the jobs that have not started; they are the caller's to give back."""
        taken = [Fence(row.id, row.attempt) for row in chain(self._ready, self._aside)]
        self._ready.clear()
        self._aside.clear()
        return taken

    @property
    def next_aside(self) -> ClaimedJob | None:
        """The first of the jobs for which there is no room elsewhere; None without any."""
        return self._aside[0] if self._aside else None

    def take_aside(self) -> list[Fence]:
        """Take away those; they are the caller's to give back."""
        taken = [Fence(row.id, row.attempt) for row in self._aside]
        self._aside.clear()
        return taken

    def count_waiting(self, annex: Annex) -> int:
        """How many jobs are here that are going to run there, and have not started."""
        return sum(self.elsewhere.get(row.job_type) is annex for row in chain(self._ready, self._aside))

    def try_aside(self) -> None:
        """What was put aside, because there was no room for it, may start now; returns at once."""
        if self._aside:
            self._ready.extendleft(reversed(self._aside))
            self._aside.clear()
            self._send_carrier()

    def interrupt(self, attempt: Attempt, error: BaseException) -> None:
        """Raise this error in a running job, wherever it waits; returns at once. Again, it is raised again.

        What the job raises then, whatever it is, is taken for this error.
        """
        # In the hub, so that no job is hit that the same greenlet runs next, and none is switched away from half-way.
        gevent.get_hub().loop.run_callback(self._raise_in, attempt, error)

    def cancel(self, job_id: int) -> None:
        """End this job, if it is here: a running one is interrupted, one that has not started is dropped."""
        attempt = self.running.get(job_id)
        if attempt is not None:
            if not isinstance(attempt.interrupted_by, JobCancelled):
                self.interrupt(attempt, JobCancelled("the job was cancelled"))
                self._watch_obedience(attempt)
            return
        for row in (*self._ready, *self._aside):
            if row.id == job_id:
                (self._ready if row in self._ready else self._aside).remove(row)
                keep = keep_seconds(self._jobs[row.job_type].keep, row.options)
                self._ended(Ended(Fence(row.id, row.attempt), "cancelled", keep))
                self.tallies[row.job_type].cancelled += 1
                self._on_room()
                return

    def _raise_in(self, attempt: Attempt, error: BaseException) -> None:
        if self.running.get(attempt.row.id) is attempt:
            # What ends the job for good is not taken back by a timeout that comes later.
            if not isinstance(attempt.interrupted_by, JobControl) or isinstance(error, JobControl):
                attempt.interrupted_by = error
            if attempt.elsewhere is not None:
                attempt.elsewhere.interrupt(error)
            else:
                attempt.greenlet.throw(error)

    def _watch_obedience(self, attempt: Attempt) -> None:
        """Report a job that goes on running although it was told to end."""

        def report() -> None:
            if self.running.get(attempt.row.id) is attempt:
                _stuck_logger.error(
                    "job %s (%s) is stuck: it was told to end (%r) %.0f s ago, and stands in\n%s",
                    *(attempt.row.id, attempt.job.name, attempt.interrupted_by, _OBEDIENCE_SECONDS, attempt.stack()),
                    extra=_log_keys(attempt),
                )

        gevent.spawn_later(_OBEDIENCE_SECONDS, report)

    def _start_timers(self, attempt: Attempt, timeout: float | None, hard_timeout: float | None) -> list[Any]:
        """Timers of the event loop, for the caller to close."""
        timers = []

        def expire(error: BaseException) -> None:
            self._raise_in(attempt, error)
            if isinstance(error, JobHardTimeout):
                self._watch_obedience(attempt)

        for seconds, error_type in ((timeout, JobTimeout), (hard_timeout, JobHardTimeout)):
            if seconds is not None:
                timer = gevent.get_hub().loop.timer(seconds)
                timer.start(expire, error_type(f"{attempt.job.name} ran for more than {seconds:g} s"))
                timers.append(timer)
        return timers

    def held_rows(self) -> list[ClaimedJob]:
        """The jobs that are here and not finished."""
        return [attempt.row for attempt in self.running.values()] + list(chain(self._ready, self._aside))

    # --- carriers -----------------------------------------------------------------------------------------------------

    def _send_carrier(self) -> None:
        """Have one more carrier on its way to the ready jobs, if there may be one.

        One at a time: it sends the next when it arrives. So jobs that never wait are run by one carrier in a row, and
        jobs that do wait each find their own.
        """
        if self._ready and not self._next_carrier_is_coming and self._carriers < self.pool:
            self._next_carrier_is_coming = True
            self._carriers += 1
            # From the hub, because a greenlet is remembered by those that it spawns.
            gevent.get_hub().loop.run_callback(gevent.spawn, self._carry)

    def _carry(self) -> None:
        self._next_carrier_is_coming = False
        carrier = gevent.getcurrent()
        assert isinstance(carrier, gevent.Greenlet)
        fresh = _traces(carrier)
        slice_ends = time.perf_counter() + _SLICE_SECONDS
        try:
            while self._ready and self._carriers <= self.pool:
                if not self._next_carrier_is_coming:
                    self._send_carrier()
                row = self._ready.popleft()
                if self.elsewhere and not self._has_place(row):
                    self._aside.append(row)
                    continue
                Context().run(self._execute, row, carrier)
                if _traces(carrier) != fresh:
                    return
                if time.perf_counter() > slice_ends:
                    gevent.sleep(0)
                    slice_ends = time.perf_counter() + _SLICE_SECONDS
        finally:
            self._carriers -= 1
            self._send_carrier()
            self._on_room()

    def _has_place(self, row: ClaimedJob) -> bool:
        """Whether the job can start; if so, its place is taken."""
        annex = self.elsewhere.get(row.job_type)
        if annex is None:
            return True
        if annex.free <= 0:
            return False
        annex.busy += 1
        return True

    # --- one attempt --------------------------------------------------------------------------------------------------

    def _execute(self, row: ClaimedJob, carrier: gevent.Greenlet[..., None]) -> None:
        job = self._jobs[row.job_type]
        annex = self.elsewhere.get(row.job_type) if self.elsewhere else None
        attempt = Attempt(job, row, self._place, carrier)
        enter_attempt(attempt)
        self.running[row.id] = attempt
        attempt.started = started = time.perf_counter()
        timers: Sequence[Any] = ()
        outcome: events.Outcome = "done"
        try:
            if events.start_handlers:
                self._publish_start(attempt)  # which may wait, and be interrupted
            timeouts = attempt.timeouts()
            if timeouts is not None:
                timers = self._start_timers(attempt, *timeouts)
            if row.start_by is not None and time.monotonic() >= row.start_by:
                raise JobExpired("it had not started when it expired")
            if annex is not None:
                call = annex.call(attempt, self._surroundings)
                if call.error is not None:
                    raise call.error
                value = call.value
            else:
                args, kwargs = job.codec.decode(row.data)
                if self._surroundings:
                    value = call_within(self._surroundings, job.function, args, kwargs)
                else:
                    value = job.function(*args, **kwargs)
            if isinstance(attempt.interrupted_by, (JobCancelled, JobHardTimeout)):
                raise attempt.interrupted_by
            if attempt.completion is not None:
                attempt.completion.end()
        except BaseException as error:  # a job may raise anything; SystemExit and GreenletExit are failures, too
            # Without the first frame, which is this one.
            error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
            outcome = self._settle_raised(attempt, error)
        else:
            fence = Fence(row.id, row.attempt)
            if attempt.report is not None:
                attempt.report.end(stays=attempt.completion is None and bool(keep_seconds(job.keep, row.options)))
            if attempt.completion is not None:
                self._completed(fence)
            elif row.options is None and not job.keep:
                self._done(fence)
            else:
                self._keep_done(attempt, job, value)
            if events.handlers:
                self._publish(attempt, Verdict("done"), None)
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("job %s (%s) done", row.id, row.job_type, extra=_log_keys(attempt))
        finally:
            for timer in timers:
                timer.close()
            # Another attempt of the same job may have begun here, where this one was given to somebody else meanwhile.
            if self.running.get(row.id) is attempt:
                del self.running[row.id]
            self.finished += 1
            seconds = time.perf_counter() - started
            self.busy_seconds += seconds
            tally = self.tallies[row.job_type]
            if outcome == "done":
                tally.done += 1
                tally.run_seconds += seconds
                tally.waited_seconds += row.waited
            else:
                tally.add(outcome, seconds, row.waited)
            if self.meters is not None:
                self.meters[row.job_type](outcome, seconds, row.waited)
            if annex is not None:
                annex.leave()
            self._on_room()

    def _settle_raised(self, attempt: Attempt, error: BaseException) -> events.Outcome:
        # Whatever came out of a job that was told to end: psycopg2 wraps what is raised while it waits, and tidying up
        # may fail in its own ways.
        if isinstance(attempt.interrupted_by, JobControl):
            error = attempt.interrupted_by
        there = attempt.elsewhere if attempt.elsewhere is not None and attempt.elsewhere.error is error else None
        if attempt.completion is not None:
            attempt.completion.abandon()
        if attempt.completion is not None and attempt.completion.is_committed:
            verdict = Verdict("done")  # and whatever it raised afterwards changes nothing
        elif there is not None and there.verdict is not None:
            verdict = there.verdict
        else:
            policy, failures = attempt.job.policy, attempt.row.retries + 1
            verdict = judge(policy, error, failures=failures, max_retries=attempt.max_retries)
        fence = Fence(attempt.row.id, attempt.row.attempt)
        record = there.record if there is not None else None
        try:
            _log(attempt, verdict, error)
        except Exception:  # a filter or a handler of the application's
            sys.stderr.write(f"job {attempt.row.id} ({attempt.job.name}): {verdict.outcome}; logging it failed\n")
        if attempt.report is not None:
            # One that has completed in its own transaction is gone; what else has ended may be kept.
            is_kept = bool(keep_seconds(self._jobs[attempt.row.job_type].keep, attempt.row.options))
            has_ended = verdict.outcome in ("discarded", "cancelled", "expired")
            attempt.report.end(stays=is_kept if has_ended else verdict.outcome != "done")
        if verdict.outcome in ("failed", "retried"):
            record = record or error_record(error, attempt.number, self._runner_name)
            self._failed(Failure(fence, verdict.retry_in, record))
        elif verdict.outcome == "done":
            self._completed(fence)
        elif verdict.outcome == "snoozed" or verdict.retry_in is not None:
            self._snoozed(Snoozed(fence, verdict.retry_in or 0.0))
        elif verdict.outcome == "interrupted":
            self._interrupted(fence)
        else:  # discarded, expired or cancelled
            reason = None
            if verdict.outcome != "cancelled":
                reason = record or error_record(error, attempt.number, self._runner_name)
            self._keep(attempt, verdict.outcome, error=reason)
        policy = attempt.job.policy
        hooks = {"failed": policy.on_failure, "discarded": policy.on_discard, "expired": policy.on_discard}
        hook = hooks.get(verdict.outcome)
        if events.handlers or hook is not None:
            self._publish(attempt, verdict, error, *([hook] if hook is not None else []))
        return verdict.outcome

    def _keep_done(self, attempt: Attempt, job: Job[Any, Any], value: Any) -> None:
        """Hand over a job that is done and may be kept, with what it returned."""
        if not keep_seconds(job.keep, attempt.row.options):
            self._done(Fence(attempt.row.id, attempt.row.attempt))
        elif job.results is None:
            self._keep(attempt, "done")
        else:
            there = attempt.elsewhere
            result, complaint = (there and there.encoded) or job.results.encode(
                value, max_bytes=config.current().max_payload_bytes
            )
            # First of all, for a logger may wait, and be interrupted.
            self._keep(attempt, "done", result=result)
            if complaint is not None:
                logger.warning(
                    "job %s (%s) %s; such results are not kept, and this is not said again",
                    *(attempt.row.id, attempt.row.job_type, complaint),
                    extra=_log_keys(attempt),
                )

    def _keep(
        self, attempt: Attempt, outcome: str, *, result: str | None = None, error: Mapping[str, Any] | None = None
    ) -> None:
        row = attempt.row
        self._ended(
            Ended(
                Fence(row.id, row.attempt),
                outcome,
                keep_seconds(self._jobs[row.job_type].keep, row.options),
                result,
                error,
                time.perf_counter() - attempt.started,
                row.waited,
            )
        )

    def _publish_start(self, attempt: Attempt) -> None:
        row = attempt.row
        events.publish(events.AttemptStarted(row.id, row.job_type, self._place.queue, attempt.number, row.waited))

    def _publish(self, attempt: Attempt, verdict: Verdict, error: BaseException | None, *more: events.Handler) -> None:
        row = attempt.row
        events.publish(
            events.AttemptEnded(
                outcome=verdict.outcome,
                id=row.id,
                job_type=row.job_type,
                queue=self._place.queue,
                attempt=attempt.number,
                run_seconds=time.perf_counter() - attempt.started,
                waited_seconds=row.waited,
                retry_in=verdict.retry_in,
                error=error,
            ),
            *more,
        )


def attempt_in(frame: FrameType | None) -> tuple[Attempt, FrameType] | None:
    """The attempt that a stack is of, by its innermost frame, and the frame that called its function; None for none."""
    while frame is not None:
        if frame.f_code is Executor._execute.__code__:
            attempt = frame.f_locals.get("attempt")
            return None if attempt is None else (attempt, frame)
        frame = frame.f_back
    return None


def _log(attempt: Attempt, verdict: Verdict, error: BaseException) -> None:
    row = attempt.row
    keys = _log_keys(attempt)
    if verdict.outcome == "failed":
        logger.error(
            "job %s (%s) failed on attempt %s and is not tried again",
            *(row.id, row.job_type, attempt.number),
            exc_info=error,
            extra=keys,
        )
    elif verdict.outcome == "retried":
        logger.warning(
            "job %s (%s) failed on attempt %s of %s; retrying in %.1f s",
            *(row.id, row.job_type, attempt.number, row.crashes + attempt.max_retries + 1, verdict.retry_in),
            exc_info=error,
            extra=keys,
        )
    elif verdict.outcome == "done" and not isinstance(error, (JobInterrupted, JobCancelled)):
        logger.error(
            "job %s (%s) raised after it had completed in its own transaction: it is done, and not tried again",
            *(row.id, row.job_type),
            exc_info=error,
            extra=keys,
        )
    elif isinstance(error, JobLost):
        logger.warning("%s", error, extra=keys)
    elif verdict.outcome == "interrupted":
        logger.warning("job %s (%s) was interrupted and is given back", row.id, row.job_type, extra=keys)
    elif verdict.outcome == "expired":
        logger.info(
            "job %s (%s) expired before it started, %.1f s after it was due",
            *(row.id, row.job_type, row.waited),
            extra=keys,
        )
    else:
        logger.info("job %s (%s) was %s: %s", row.id, row.job_type, verdict.outcome, error, extra=keys)


def _traces(carrier: gevent.Greenlet[..., None]) -> tuple[int, int, bool, int]:
    """All by which somebody could tell this greenlet from a fresh one: references, links, attributes.

    gevent's locals, which threading.local is here, hold a weak reference to it.
    """
    return sys.getrefcount(carrier), weakref.getweakrefcount(carrier), carrier.has_links(), len(vars(carrier))


def _log_keys(attempt: Attempt) -> dict[str, Any]:
    row = attempt.row
    return {
        "job_id": row.id,
        "job_type": row.job_type,
        "queue": attempt.place.queue,
        "attempt": attempt.number,
        "duration_ms": round((time.perf_counter() - attempt.started) * 1000, 3),
    }
