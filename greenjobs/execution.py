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

from greenjobs.errors import PayloadMismatch
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
        self._on_room = on_room
        self._ready: deque[tuple[ClaimedJob, int]] = deque()
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

    def add(self, rows: Sequence[ClaimedJob], runner: int) -> None:
        """Run these jobs, in this order, which were claimed under this runner's id; returns at once."""
        if rows and self._ready and rows[0].priority > self._ready[-1][0].priority:
            newcomers = [(row, runner) for row in rows]
            self._ready = deque(sorted(chain(self._ready, newcomers), key=lambda ready: claim_order(ready[0])))
        else:
            self._ready.extend([(row, runner) for row in rows])
        self._send_carrier()

    def take_back(self, *, leave: int = 0) -> list[Fence]:
        """Take away the jobs that have not started, but the `leave` next ones; they are the caller's to give back."""
        taken = []
        while len(self._ready) > leave:
            row, runner = self._ready.pop()
            taken.append(Fence(row.id, row.attempt, runner))
        return taken

    def held_rows(self) -> list[ClaimedJob]:
        """The jobs that are here and not finished."""
        return [attempt.row for attempt in self.running.values()] + [row for row, _ in self._ready]

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
                row, runner = self._ready.popleft()
                Context().run(self._execute, row, runner)
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

    def _execute(self, row: ClaimedJob, runner: int) -> None:
        job = self._jobs[row.job_type]
        attempt = Attempt(job, row, runner, self._place)
        enter_attempt(attempt)
        self.running[row.id] = attempt
        fence = Fence(row.id, row.attempt, runner)
        attempt.started = started = time.perf_counter()
        try:
            args, kwargs = job.codec.decode(row.data)
            job.function(*args, **kwargs)
        except BaseException as error:  # a job may raise anything; SystemExit and GreenletExit are failures, too
            self._failed(self._failure(attempt, fence, error))
        else:
            self._done(fence)
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("job %s (%s) done", row.id, row.job_type, extra=_log_keys(attempt))
        finally:
            del self.running[row.id]
            self.finished += 1
            self.busy_seconds += time.perf_counter() - started
            self._on_room()

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
        "runner": attempt.runner,
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
