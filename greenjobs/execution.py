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

from greenjobs.errors import JobInterrupted, PayloadMismatch
from greenjobs.job import Attempt, Job, Place, enter_attempt
from greenjobs.retry import exponential_delay
from greenjobs.storage import ClaimedJob, Failure, Fence, claim_order

if TYPE_CHECKING:
    from greenjobs.acknowledger import Acknowledger

logger = logging.getLogger(__name__)

# Jobs that never wait leave the event loop a turn this often.
_SLICE_SECONDS = 0.001

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
        self._runner_name = runner_name
        self._done = acknowledger.done.add
        self._failed = acknowledger.failed.add
        self._unfinished = acknowledger.unfinished.add
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

    def _raise_in(self, attempt: Attempt, error: BaseException) -> None:
        if self.running.get(attempt.row.id) is attempt:
            attempt.interrupted_by = error
            attempt.greenlet.throw(error)

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
        try:
            args, kwargs = job.codec.decode(row.data)
            job.function(*args, **kwargs)
        except BaseException as error:  # a job may raise anything; SystemExit and GreenletExit are failures, too
            self._settle_raised(attempt, error)
        else:
            self._done(Fence(row.id, row.attempt))
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("job %s (%s) done", row.id, row.job_type, extra=_log_keys(attempt))
        finally:
            del self.running[row.id]
            self.finished += 1
            self.busy_seconds += time.perf_counter() - started
            self._on_room()

    def _settle_raised(self, attempt: Attempt, error: BaseException) -> None:
        fence = Fence(attempt.row.id, attempt.row.attempt)
        if isinstance(attempt.interrupted_by, JobInterrupted):
            # Whatever came out: psycopg2 wraps what is raised while it waits, and tidying up may fail.
            logger.warning(
                "job %s (%s) was interrupted and is given back", *(fence.id, attempt.job.name), extra=_log_keys(attempt)
            )
            self._unfinished(fence)
        else:
            self._failed(self._failure(attempt, fence, error))

    def _failure(self, attempt: Attempt, fence: Fence, error: BaseException) -> Failure:
        row, job = attempt.row, attempt.job
        may_retry = row.retries < job.max_retries and not isinstance(error, PayloadMismatch)
        retry_in = exponential_delay(row.retries + 1) if may_retry else None
        # The first frame is this module's, which tells nobody anything.
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        if retry_in is None:
            logger.error(
                "job %s (%s) failed on attempt %s and is not tried again",
                *(row.id, row.job_type, attempt.number),
                exc_info=error,
                extra=_log_keys(attempt),
            )
        else:
            logger.warning(
                "job %s (%s) failed on attempt %s of %s; retrying in %.0f s",
                *(row.id, row.job_type, attempt.number, row.crashes + job.max_retries + 1, retry_in),
                exc_info=error,
                extra=_log_keys(attempt),
            )
        return Failure(fence, retry_in, _error_record(error, attempt.number, self._runner_name))


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
    summary = traceback.TracebackException.from_exception(error)
    return {
        "at": datetime.now(timezone.utc).isoformat(),
        "attempt": attempt,
        "error": type(error).__qualname__,
        "message": _storable(str(summary))[:_LONGEST_MESSAGE],  # also for errors whose own __str__ fails
        "traceback": _storable("".join(summary.format()))[-_LONGEST_TRACEBACK:],
        "runner": runner_name,
    }


def _storable(text: str) -> str:
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
