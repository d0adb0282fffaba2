"""One queue in one runner: claims jobs, executes each in a greenlet and a context of its own, acknowledges in groups.

The worker promises that it never runs more than `pool` jobs at once, that a job it claimed is executed or given back,
and that an outcome is written under the fence of the claim it belongs to. It knows nothing of signals and sessions.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import gevent
from gevent.event import Event

from greenjobs import storage
from greenjobs.errors import PayloadMismatch
from greenjobs.job import Attempt, Job, enter_attempt
from greenjobs.retry import exponential_delay
from greenjobs.storage import ClaimedJob, Failure, Fence

if TYPE_CHECKING:
    from greenjobs.service import Service

logger = logging.getLogger(__name__)

# An outcome may find up to this many others in its statement: about a millisecond of the server's time.
_LARGEST_GROUP = 500

# A carrier that runs jobs which never wait lets the event loop turn this often.
_SLICE_SECONDS = 0.001

# After saying that it waits, a worker looks again at once and once more after this: an enqueue that began before it
# said so, and committed after it had looked, wakes nobody. Such a window is one commit long.
_SECOND_LOOK_SECONDS = 0.05

_LONGEST_MESSAGE = 2_000
_LONGEST_TRACEBACK = 8_000

Item = TypeVar("Item")


class Group(Generic[Item]):
    """Gathers items and writes them together: while one statement is under way, the next ones gather."""

    def __init__(self, write: Callable[[Sequence[Item]], None]) -> None:
        self._write = write
        self._gathered: list[Item] = []
        self._in_writing: list[Item] = []
        self._arrived = Event()
        self.drained = Event()
        self.drained.set()
        self._greenlet = gevent.spawn(self._write_for_ever)

    def add(self, item: Item) -> None:
        """Hand over one item; returns at once."""
        self._gathered.append(item)
        self._arrived.set()

    @property
    def pending(self) -> list[Item]:
        """What was handed over and is not written yet."""
        return self._in_writing + self._gathered

    def wait_empty(self) -> None:
        """Block until all that was handed over is written."""
        while self.pending:
            self.drained.clear()
            self.drained.wait()

    def stop(self) -> None:
        """End it; what is not written by then is not going to be."""
        self._greenlet.kill()

    def _write_for_ever(self) -> None:
        while True:
            self._arrived.wait()
            self._arrived.clear()
            while self._gathered:
                self._in_writing, self._gathered = self._gathered[:_LARGEST_GROUP], self._gathered[_LARGEST_GROUP:]
                self._write(self._in_writing)
                self._in_writing = []
            self.drained.set()


class Acknowledger:
    """Writes outcomes for all workers of a runner: finished jobs in one kind of group, failures in another."""

    def __init__(self, service: Service, *, on_settled: Callable[[set[int]], None]) -> None:
        self._service = service
        self._on_settled = on_settled
        self.done: Group[Fence] = Group(self._write_done)
        self.failed: Group[Failure] = Group(self._write_failed)

    def pending_ids(self) -> set[int]:
        """The jobs that are finished, which the database does not know yet."""
        return {fence.id for fence in self.done.pending} | {failure.fence.id for failure in self.failed.pending}

    def wait_empty(self) -> None:
        """Block until every outcome so far is in the database."""
        self.done.wait_empty()
        self.failed.wait_empty()

    def stop(self) -> None:
        """End it; see Group.stop."""
        self.done.stop()
        self.failed.stop()

    def _write_done(self, done: Sequence[Fence]) -> None:
        self._settle(self._service.call(storage.acknowledge, done), done)

    def _write_failed(self, failures: Sequence[Failure]) -> None:
        self._settle(self._service.call(storage.fail, failures), [failure.fence for failure in failures])

    def _settle(self, held: set[int], fences: Sequence[Fence]) -> None:
        for fence in fences:
            if fence.id not in held:
                logger.warning(
                    "job %s is no longer held by runner %s (attempt %s): its outcome changes nothing",
                    *(fence.id, fence.runner, fence.attempt),
                    extra={"job_id": fence.id, "attempt": fence.attempt, "runner": fence.runner},
                )
        self._on_settled({fence.id for fence in fences})


class Worker:
    """One queue in one runner. `runner` is the id under which it claims; None stops it from claiming."""

    def __init__(
        self,
        queue: str,
        *,
        pool: int,
        poll_interval: float,
        jobs: Mapping[str, Job[Any, Any]],
        service: Service,
        acknowledger: Acknowledger,
        runner_name: str,
        context: Any,
        enqueue_pool: Any,
    ) -> None:
        self.queue = queue
        self.pool = pool
        self.poll_interval = poll_interval
        self.runner: int | None = None
        self.running: dict[int, Attempt] = {}
        self._jobs = jobs
        self._job_types = sorted(jobs)
        self._service = service
        self._acknowledger = acknowledger
        self._runner_name = runner_name
        self._context = context
        self._enqueue_pool = enqueue_pool
        self._ready: deque[tuple[ClaimedJob, int]] = deque()
        self._carriers = 0
        self._next_carrier_is_coming = False
        self._is_claiming = False
        self._is_stopping = False
        self._woken = Event()
        self._room_made = Event()
        self._emptied = Event()
        self._greenlet: gevent.Greenlet[..., None] | None = None

    # --- what the runner says to it -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to claim, as soon as there is a runner id to claim under."""
        self._greenlet = gevent.spawn(self._claim_until_stopped)

    def claim_as(self, runner: int | None) -> None:
        """Claim under this id from now on; with None, claim nothing, and give back what has not started."""
        self.runner = runner
        if runner is None:
            gevent.spawn(self.give_back_unstarted)
        self._woken.set()
        self._room_made.set()

    def wake(self) -> None:
        """There may be work: look now. Returns at once."""
        self._woken.set()

    def stop_claiming(self) -> None:
        """Claim no more, and give back what was claimed and has not started; blocks until both are so."""
        self._is_stopping = True
        self._woken.set()
        self._room_made.set()
        if self._greenlet is not None:
            self._greenlet.join()
        self.give_back_unstarted()

    def give_back_unstarted(self) -> None:
        """Make what was claimed and has not started available to others again."""
        unstarted = [Fence(row.id, row.attempt, runner) for row, runner in self._ready]
        self._ready.clear()
        if unstarted:
            self._service.call(storage.give_back, unstarted)

    def wait_until_done(self) -> None:
        """Block until no job runs here."""
        while self.running or self._ready:
            self._emptied.clear()
            self._emptied.wait()

    @property
    def is_idle(self) -> bool:
        """Whether it neither runs nor holds nor is claiming anything."""
        return not (self.running or self._ready or self._is_claiming)

    @property
    def is_waiting(self) -> bool:
        """Whether it has room for more jobs than it found."""
        return self._room() > 0

    def held_rows(self) -> list[ClaimedJob]:
        """The jobs that were claimed here and are not finished."""
        return [attempt.row for attempt in self.running.values()] + [row for row, _ in self._ready]

    def claim_suspect(self) -> int | None:
        """Take one job whose runner died, if one waits here and there is room for it; returns its id."""
        if self._is_stopping or self._room() <= 0:
            return None
        claimed = self._claim(1, suspects=True)
        return claimed[0].id if claimed else None

    # --- claim --------------------------------------------------------------------------------------------------------

    def _claim_until_stopped(self) -> None:
        while not self._is_stopping:
            room = self._room()
            if room <= 0 or self.runner is None:
                self._room_made.clear()
                self._room_made.wait()
                continue
            # Arm the wake-up before claiming: a row committed between the two would otherwise wait for the next poll.
            self._woken.clear()
            if len(self._claim(room)) < room:
                self._wait_for_work()

    def _wait_for_work(self) -> None:
        if self._woken.is_set() or self.runner is None or self._is_stopping:
            return
        self._service.call(storage.say_waiting, self.runner, [self.queue])
        if self._claim(self._room()) or self._woken.wait(_SECOND_LOOK_SECONDS):
            return
        if not self._claim(self._room()):
            self._woken.wait()

    def _claim(self, limit: int, *, suspects: bool = False) -> list[ClaimedJob]:
        runner = self.runner
        if runner is None or limit <= 0:
            return []
        self._is_claiming = True
        try:
            rows = self._service.call(
                storage.claim,
                runner=runner,
                queue=self.queue,
                job_types=self._job_types,
                limit=limit,
                suspects=suspects,
            )
            self._ready.extend([(row, runner) for row in rows])
        finally:
            self._is_claiming = False
        self._send_carrier()
        return rows

    def _room(self) -> int:
        return self.pool - len(self.running) - len(self._ready)

    # --- execute ------------------------------------------------------------------------------------------------------

    def _send_carrier(self) -> None:
        """Have one more greenlet on its way to the ready jobs, if there is one to be had.

        One at a time: it sends the next when it arrives. So jobs that never wait are run by the first one in a row, and
        jobs that do wait each find their own.
        """
        if self._ready and not self._next_carrier_is_coming and self._carriers < self.pool:
            self._next_carrier_is_coming = True
            self._carriers += 1
            gevent.spawn(self._carry)

    def _carry(self) -> None:
        """Run ready jobs, one after the other, in this greenlet; each in a context of its own."""
        self._next_carrier_is_coming = False
        self._send_carrier()
        try:
            if self._ready:
                row, runner = self._ready.popleft()
                Context().run(self._execute, row, runner)
        finally:
            self._carriers -= 1
            self._send_carrier()
            self._room_made.set()
            if not self.running and not self._ready:
                self._emptied.set()

    def _execute(self, row: ClaimedJob, runner: int) -> None:
        job = self._jobs[row.job_type]
        attempt = Attempt(job, row, self.queue, runner, self._context, self._enqueue_pool)
        enter_attempt(attempt)
        self.running[row.id] = attempt
        attempt.started = time.perf_counter()
        fence = Fence(row.id, row.attempt, runner)
        try:
            args, kwargs = job.codec.decode(row.data)
            job.function(*args, **kwargs)
        except BaseException as error:  # a job may raise anything; SystemExit and GreenletExit are failures, too
            self._acknowledger.failed.add(self._failure(attempt, fence, error))
        else:
            self._acknowledger.done.add(fence)
            if logger.isEnabledFor(logging.DEBUG):
                seconds = time.perf_counter() - attempt.started
                logger.debug("job %s (%s) done in %.3f s", row.id, row.job_type, seconds, extra=_log_keys(attempt))
        finally:
            del self.running[row.id]

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


def _log_keys(attempt: Attempt) -> dict[str, Any]:
    row = attempt.row
    return {
        "job_id": row.id,
        "job_type": row.job_type,
        "queue": attempt.queue,
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
