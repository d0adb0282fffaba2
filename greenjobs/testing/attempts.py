"""One attempt of a job, in the calling thread: encoded, decoded, run and judged as in a runner."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, cast

from greenjobs import config, current, events, lending, surroundings
from greenjobs.call import Call
from greenjobs.control import Retry
from greenjobs.current import Attempt, Place, database_rooms, enter_attempt
from greenjobs.errors import JobControl, JobExpired, OptionError
from greenjobs.events import Outcome
from greenjobs.job import Job
from greenjobs.policy import Verdict, judge
from greenjobs.storage import ClaimedJob, NewJobs
from greenjobs.testing.records import describe_call, readable_arguments, require_no_clash

# What is not in a database has an id all the same, one that no row of a test's database has.
_ids = itertools.count(9_000_000_000_001)


def next_id() -> int:
    """The id of a job that is nowhere stored."""
    return next(_ids)


@dataclass(frozen=True, slots=True)
class Ran:
    """One attempt that was made. `args` are the job's arguments by name, `value` is what it returned.

    `outcome` is that of a runner: "done", "retried" (it failed, and is tried again in `retry_in` seconds), "failed" for
    good, "snoozed" for `retry_in` seconds, "discarded", "cancelled" or "interrupted". `error` is what it raised.
    """

    id: int
    job_type: str
    args: Mapping[str, Any]
    queue: str
    attempt: int
    outcome: Outcome
    value: Any = None
    retry_in: float | None = None
    error: BaseException | None = None

    def __str__(self) -> str:
        return f"{describe_call(self.job_type, self.args)}, attempt {self.attempt}: {self.outcome}"

    def raise_error(self) -> None:
        """Raise the error of an attempt that failed, unless the job asked to be tried again with Retry, and is."""
        if self.error is not None and (self.outcome == "failed" or self._failed_by_accident):
            raise self.error

    @property
    def _failed_by_accident(self) -> bool:
        return self.outcome == "retried" and not isinstance(self.error, Retry)


def perform(
    job: Job[..., Any] | Call[...],
    /,
    *args: Any,
    attempt: int | None = None,
    context: Any = None,
    raise_errors: bool = True,
    arguments: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Ran:
    """Run one attempt of a job with these arguments, here and now, and say what would become of it in a runner.

    Nothing is enqueued or stored. `attempt` is the number that the job sees: 3 means that it failed twice before.
    `context` is that of the runner. A failure is raised, unless `raise_errors` is False; see Ran.raise_error. Options
    of a call are given as `perform(job.options(max_retries=2), …)`. A job with a parameter that has the name of an
    option here gets it in `arguments`. Raises what `.delay` does for arguments that cannot be stored.
    """
    if not isinstance(job, (Call, Job)):
        raise OptionError(f"perform: the job is {job!r}; allowed: a function with @job, or its .options(…)")
    call = job if isinstance(job, Call) else job.options()
    if attempt is not None and (type(attempt) is not int or attempt < 1):
        raise OptionError(f"perform: attempt is {attempt!r}; allowed: 1 and more")
    given = [name for name, value in (("attempt", attempt), ("context", context)) if value is not None]
    given += ["raise_errors"] * (not raise_errors)
    performed, new = call.prepare(*args, **{**kwargs, **(arguments or {})})
    require_no_clash(performed, given)
    ran = run_attempt(performed, new_row(new, new.data[0], retries=(attempt or 1) - 1), new.queue, context)
    if raise_errors:
        ran.raise_error()
    return ran


def run_attempt(job: Job[..., Any], row: ClaimedJob, queue: str, context: Any) -> Ran:
    """Make an attempt of a job that is nowhere stored; see `make`."""
    return make(new_attempt(job, row, queue, context))


def new_attempt(
    job: Job[..., Any], row: ClaimedJob, queue: str, context: Any, *, runner_ids: Sequence[int] = ()
) -> Attempt:
    """An attempt, surrounded as in a runner of the application that is active here, or of the one that was set up last.

    `runner_ids` are those that may have claimed it: none where it is not stored.
    """
    of_application = surroundings.of_application
    around = (*surroundings.everywhere, *(of_application() if of_application is not None else ()))
    place = Place(queue, context, cast("Any", AMBIENT), runner_ids, surroundings=around, lends=_job_pool)
    return Attempt(job, row, place, None)


def make(attempt: Attempt) -> Ran:
    """Make it, in a context of its own, and tell whom it may concern; writes nothing.

    Timeouts are not enforced: only a runner can interrupt a job. What ends the test and not the job, such as
    KeyboardInterrupt and pytest's own, is raised.
    """
    return Context().run(_run, attempt)


def new_row(new: NewJobs, data: str, *, id: int | None = None, retries: int = 0) -> ClaimedJob:
    """The row that a runner would claim after so many failures."""
    return ClaimedJob(
        id=next_id() if id is None else id,
        job_type=new.job_type,
        data=data,
        attempt=retries + 1,
        retries=retries,
        priority=new.priority,
        crashes=0,
        created_at=time.time(),
        waited=0.0,
        options=new.options,
        start_by=None,
        exclusive_key=None,
    )


def _run(attempt: Attempt) -> Ran:
    job, row = cast("Job[..., Any]", attempt.job), attempt.row
    enter_attempt(attempt)
    attempt.started = time.perf_counter()
    events.publish(events.AttemptStarted(row.id, row.job_type, attempt.place.queue, attempt.number, row.waited))
    value, error, verdict = None, None, Verdict("done")
    try:
        if row.start_by is not None and time.monotonic() >= row.start_by:
            raise JobExpired("it had not started when it expired")
        args, kwargs = job.codec.decode(row.data)
        value = surroundings.call_within(attempt.place.surroundings, job.function, args, kwargs)
        if attempt.completion is not None:
            attempt.completion.end()
    # A runner takes every other BaseException for a failure of the job, too; here it is the end of the test.
    except (Exception, JobControl, SystemExit) as raised:
        error = raised
        if attempt.completion is not None:
            attempt.completion.abandon()
    if error is not None and (attempt.completion is None or not attempt.completion.is_committed):
        verdict = judge(job.policy, error, failures=row.retries + 1, max_retries=attempt.max_retries)
    _publish(attempt, verdict, error)
    return Ran(
        id=row.id,
        job_type=row.job_type,
        args=readable_arguments(job, row.data),
        queue=attempt.place.queue,
        attempt=attempt.number,
        outcome=verdict.outcome,
        value=value,
        retry_in=verdict.retry_in,
        error=error,
    )


def _publish(attempt: Attempt, verdict: Verdict, error: BaseException | None) -> None:
    row, policy = attempt.row, attempt.job.policy
    hooks = {"failed": policy.on_failure, "discarded": policy.on_discard, "expired": policy.on_discard}
    hook = hooks.get(verdict.outcome)
    ended = events.AttemptEnded(
        outcome=verdict.outcome,
        id=row.id,
        job_type=row.job_type,
        queue=attempt.place.queue,
        attempt=attempt.number,
        run_seconds=time.perf_counter() - attempt.started,
        waited_seconds=row.waited,
        retry_in=verdict.retry_in,
        error=error,
    )
    events.publish(ended, *([hook] if hook is not None else []))


class _Ambient:
    """What jobs of a test enqueue on: whatever the test itself does."""

    @property
    def database_url(self) -> str:
        return config.current().require_database_url()

    def connection(self) -> Any:
        settings = config.current()
        if current.stage is not None:
            return current.stage.lender(settings).connection()
        pool, _ = database_rooms()
        return pool.shared_pool(settings).connection()


def _job_pool() -> lending.JobPool:
    settings = config.current()
    return lending.job_pool(settings) if current.stage is None else current.stage.job_pool(settings)


AMBIENT = _Ambient()
