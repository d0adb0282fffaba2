"""Runs claimed jobs of one queue in greenlets, at most so many at once, each in a greenlet and a context of its own.

Making a greenlet costs ten times what switching to one does, so a carrier, the greenlet that runs a job, takes the next
job too, but only when nothing can tell it from a fresh one: no reference to it is left behind, no link, no attribute,
no thread-local value. Contexts are always fresh.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from datetime import datetime, timezone
from itertools import chain
from typing import TYPE_CHECKING, Any

import gevent

from greenjobs import events
from greenjobs.current import Attempt, Place, enter_attempt
from greenjobs.errors import JobCancelled, JobControl, JobHardTimeout, JobTimeout
from greenjobs.job import Job
from greenjobs.policy import Verdict, judge
from greenjobs.storage import ClaimedJob, Failure, Fence, Snoozed, claim_order
from greenjobs.surroundings import call_within

if TYPE_CHECKING:
    from greenjobs.acknowledger import Acknowledger

logger = logging.getLogger(__name__)

# Jobs that never wait leave the event loop a turn this often.
_SLICE_SECONDS = 0.001

# A job that was told to end and goes on for so long is reported as stuck.
_OBEDIENCE_SECONDS = 5.0

_LONGEST_MESSAGE = 2_000
_LONGEST_TRACEBACK = 8_000


class Executor:
    """Runs the jobs of one queue, `pool` at a time.

    `on_room` is called when there may be room for more. `finished` counts jobs and `busy_seconds` adds up how long they
    ran; both only grow.
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
        self._jobs = jobs
        self._place = place
        self._surroundings = place.surroundings
        self._runner_name = runner_name
        self._done = acknowledger.done.add
        self._failed = acknowledger.failed.add
        self._unfinished = acknowledger.unfinished.add
        self._snoozed = acknowledger.snoozed.add
        self._on_room = on_room
        self._ready: deque[ClaimedJob] = deque()
        self._carriers = 0
        self._next_carrier_is_coming = False

    @property
    def ready(self) -> int:
        """How many jobs are here and have not started."""
        return len(self._ready)

    @property
    def held(self) -> int:
        """How many jobs are here: those that run, and those that have not started."""
        return len(self.running) + len(self._ready)

    def add(self, rows: Sequence[ClaimedJob]) -> None:
        """Run these claimed jobs, in this order, higher priorities before what is here already; returns at once."""
        if rows and self._ready and rows[0].priority > self._ready[-1].priority:
            self._ready = deque(sorted(chain(self._ready, rows), key=claim_order))
        else:
            self._ready.extend(rows)
        self._send_carrier()

    def take_back(self) -> list[Fence]:
        """Take away the jobs that have not started; they are the caller's to give back."""
        taken = [Fence(row.id, row.attempt) for row in self._ready]
        self._ready.clear()
        return taken

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
        for row in self._ready:
            if row.id == job_id:
                self._ready.remove(row)
                self._done(Fence(row.id, row.attempt))
                self._on_room()
                return

    def _raise_in(self, attempt: Attempt, error: BaseException) -> None:
        if self.running.get(attempt.row.id) is attempt:
            # What ends the job for good is not taken back by a timeout that comes later.
            if not isinstance(attempt.interrupted_by, JobControl) or isinstance(error, JobControl):
                attempt.interrupted_by = error
            attempt.greenlet.throw(error)

    def _watch_obedience(self, attempt: Attempt) -> None:
        """Report a job that goes on running although it was told to end."""

        def report() -> None:
            if self.running.get(attempt.row.id) is attempt:
                stack = "".join(traceback.format_stack(attempt.greenlet.gr_frame))
                logger.error(
                    "job %s (%s) is stuck: it was told to end (%r) %.0f s ago, and stands in\n%s",
                    *(attempt.row.id, attempt.job.name, attempt.interrupted_by, _OBEDIENCE_SECONDS, stack),
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
        return [attempt.row for attempt in self.running.values()] + list(self._ready)

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
            while self._ready:
                if not self._next_carrier_is_coming:
                    self._send_carrier()
                Context().run(self._execute, self._ready.popleft(), carrier)
                if _traces(carrier) != fresh:
                    return
                if time.perf_counter() > slice_ends:
                    gevent.sleep(0)
                    slice_ends = time.perf_counter() + _SLICE_SECONDS
        finally:
            self._carriers -= 1
            self._send_carrier()
            self._on_room()

    # --- one attempt --------------------------------------------------------------------------------------------------

    def _execute(self, row: ClaimedJob, carrier: gevent.Greenlet[..., None]) -> None:
        job = self._jobs[row.job_type]
        attempt = Attempt(job, row, self._place, carrier)
        enter_attempt(attempt)
        self.running[row.id] = attempt
        attempt.started = started = time.perf_counter()
        timeouts = attempt.timeouts()
        timers = self._start_timers(attempt, *timeouts) if timeouts is not None else ()
        try:
            args, kwargs = job.codec.decode(row.data)
            if self._surroundings:
                call_within(self._surroundings, job.function, args, kwargs)
            else:
                job.function(*args, **kwargs)
            if isinstance(attempt.interrupted_by, (JobCancelled, JobHardTimeout)):
                raise attempt.interrupted_by
        except BaseException as error:  # a job may raise anything; SystemExit and GreenletExit are failures, too
            # Without the first frame, which is this one.
            self._settle_raised(attempt, error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        else:
            self._done(Fence(row.id, row.attempt))
            if events.handlers:
                self._publish(attempt, Verdict("done"), None)
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("job %s (%s) done", row.id, row.job_type, extra=_log_keys(attempt))
        finally:
            for timer in timers:
                timer.close()
            del self.running[row.id]
            self.finished += 1
            self.busy_seconds += time.perf_counter() - started
            self._on_room()

    def _settle_raised(self, attempt: Attempt, error: BaseException) -> None:
        # Whatever came out of a job that was told to end: psycopg2 wraps what is raised while it waits, and tidying up
        # may fail in its own ways.
        if isinstance(attempt.interrupted_by, JobControl):
            error = attempt.interrupted_by
        verdict = judge(attempt.job.policy, error, failures=attempt.row.retries + 1, max_retries=attempt.max_retries)
        fence = Fence(attempt.row.id, attempt.row.attempt)
        try:
            _log(attempt, verdict, error)
        except Exception:  # a filter or a handler of the application's
            sys.stderr.write(f"job {attempt.row.id} ({attempt.job.name}): {verdict.outcome}; logging it failed\n")
        if verdict.outcome in ("failed", "retried"):
            record = _error_record(error, attempt.number, self._runner_name)
            self._failed(Failure(fence, verdict.retry_in, record))
        elif verdict.outcome == "snoozed":
            self._snoozed(Snoozed(fence, verdict.retry_in or 0.0))
        elif verdict.outcome == "interrupted":
            self._unfinished(fence)
        else:  # discarded or cancelled: the row has no further use, as that of a job that is done
            self._done(fence)
        policy = attempt.job.policy
        hook = {"failed": policy.on_failure, "discarded": policy.on_discard}.get(verdict.outcome)
        if events.handlers or hook is not None:
            self._publish(attempt, verdict, error, *([hook] if hook is not None else []))

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
    elif verdict.outcome == "interrupted":
        logger.warning("job %s (%s) was interrupted and is given back", row.id, row.job_type, extra=keys)
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


def _error_record(error: BaseException, attempt: int, runner_name: str) -> dict[str, Any]:
    """The error as it is kept on the row. PostgreSQL's JSON has no NUL and no lone surrogates; messages may."""
    try:
        summary = traceback.TracebackException.from_exception(error)
        message, trace = str(summary), "".join(summary.format())  # also for errors whose own __str__ fails
    except Exception as failure:  # for example a SyntaxError that does not say where
        message = f"the error cannot be shown: {type(failure).__name__}"
        trace = "".join(traceback.format_tb(error.__traceback__))
    return {
        "at": datetime.now(timezone.utc).isoformat(),
        "attempt": attempt,
        "error": type(error).__qualname__,
        "message": _storable(message)[:_LONGEST_MESSAGE],
        "traceback": _storable(trace)[-_LONGEST_TRACEBACK:],
        "runner": runner_name,
    }


def _storable(text: str) -> str:
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
