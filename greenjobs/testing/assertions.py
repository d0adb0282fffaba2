"""What was enqueued: to look at, and to assert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import orjson

from greenjobs import config, inspection
from greenjobs.current import lender
from greenjobs.errors import OptionError
from greenjobs.inspection import JobFilter, StoredJob
from greenjobs.job import Job
from greenjobs.testing.modes import memory
from greenjobs.testing.records import (
    EnqueuedJob,
    describe_call,
    expected_arguments,
    fits,
    known_job,
    options_of_call,
    readable_arguments,
    require_no_clash,
)
from greenjobs.testing.tables import tables_needed

_WAITING = ["scheduled", "available"]

# Between the clock of who enqueues and the one that the test has looked at.
_TOLERANCE = timedelta(seconds=1)

# A failure shows so many of the jobs that were enqueued instead.
_SHOWN = 30


def enqueued_jobs(job: Job[..., Any] | str | None = None) -> list[EnqueuedJob]:
    """The jobs that wait in the database, those for later and those to be tried again included, the oldest first; with
    `job`, those of that job only. It may be a name.

    In inline mode, and while calls are recorded, these are the jobs that were enqueued in that block instead.
    """
    meant = None if job is None else known_job(job)
    names = None if job is None else [job] if isinstance(job, str) else []
    if names is not None and meant is not None:
        names = [meant.name, *meant.aliases]
    mode = memory()
    if mode is not None:
        return [each for each in mode.jobs if names is None or each.job_type in names]
    with tables_needed(), lender(config.current()).connection() as connection:
        stored = inspection.find_jobs(connection, JobFilter(job_types=names, states=_WAITING), limit=None)
    return [_of_row(row) for row in sorted(stored, key=lambda row: row.id)]


def assert_enqueued(
    job: Job[..., Any] | str,
    /,
    *args: Any,
    queue: str | None = None,
    priority: int | None = None,
    run_at: datetime | None = None,
    count: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> list[EnqueuedJob]:
    """Assert that this job was enqueued with these arguments, and perhaps others; returns those that were.

    At least one, or exactly `count`. An argument that was left to its default counts as passed. `run_at` is met to the
    second. A job with a parameter that has the name of an option here gets it in `arguments`. The message of a failure
    shows what was enqueued instead. Raises TypeError when the job takes no such arguments.
    """
    __tracebackhide__ = True
    wanted = _Wanted(job, args, {**kwargs, **(arguments or {})}, queue=queue, priority=priority, run_at=run_at)
    wanted.require_no_clash(count=count)
    if count is not None and (type(count) is not int or count < 0):
        raise OptionError(f"assert_enqueued: count is {count!r}; allowed: 0 and more")
    everything = enqueued_jobs()
    found = [each for each in everything if wanted.is_met_by(each)]
    if len(found) != count if count is not None else not found:
        expected = "" if count is None else f", {count} times"
        raise AssertionError(
            f"{wanted} was expected{expected}, and {_times(len(found))} enqueued.\n{_listed(wanted, everything)}"
        )
    return found


def assert_not_enqueued(
    job: Job[..., Any] | str,
    /,
    *args: Any,
    queue: str | None = None,
    priority: int | None = None,
    run_at: datetime | None = None,
    arguments: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Assert that this job was not enqueued with these arguments, whatever the others; see assert_enqueued."""
    __tracebackhide__ = True
    wanted = _Wanted(job, args, {**kwargs, **(arguments or {})}, queue=queue, priority=priority, run_at=run_at)
    wanted.require_no_clash()
    found = [each for each in enqueued_jobs() if wanted.is_met_by(each)]
    if found:
        raise AssertionError(f"{wanted} was not expected, and {_times(len(found))} enqueued.\n{_lines(found)}")


class _Wanted:
    """What a test expects of an enqueued job; what it leaves open is None."""

    def __init__(
        self,
        job: Job[..., Any] | str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        queue: str | None,
        priority: int | None,
        run_at: datetime | None,
    ) -> None:
        self._job = known_job(job)
        self.names = (str(job),) if self._job is None else (self._job.name, *self._job.aliases)
        if run_at is not None and (not isinstance(run_at, datetime) or run_at.utcoffset() is None):
            raise OptionError(f"run_at is {run_at!r}; allowed: an aware datetime")
        self._options: dict[str, Any] = {"queue": queue, "priority": priority, "run_at": run_at}
        self._arguments = expected_arguments(self._job, args, kwargs)

    def __str__(self) -> str:
        options = [f"{name} {value}" for name, value in self._options.items() if value is not None]
        return " with ".join(
            [describe_call(self.names[0], self._arguments), *([", ".join(options)] if options else [])]
        )

    def require_no_clash(self, **more: Any) -> None:
        options = {**self._options, **more}
        require_no_clash(self._job, [name for name, value in options.items() if value is not None])

    def is_met_by(self, enqueued: EnqueuedJob) -> bool:
        queue, priority, run_at = self._options.values()
        return (
            enqueued.job_type in self.names
            and (queue is None or enqueued.queue == queue)
            and (priority is None or enqueued.priority == priority)
            and (run_at is None or abs(enqueued.run_at - run_at) <= _TOLERANCE)
            and fits(self._job, enqueued.args, self._arguments)
        )


def _of_row(row: StoredJob) -> EnqueuedJob:
    return EnqueuedJob(
        id=row.id,
        job_type=row.job_type,
        args=readable_arguments(known_job(row.job_type), orjson.dumps(row.data).decode()),
        queue=row.queue,
        priority=row.priority,
        run_at=row.run_at,
        state="scheduled" if row.state == "scheduled" else "available",
        options=options_of_call(known_job(row.job_type), row.options),
    )


def _times(count: int) -> str:
    return "was not" if not count else "was once" if count == 1 else f"was {count} times"


def _listed(wanted: _Wanted, everything: Sequence[EnqueuedJob]) -> str:
    """All that was enqueued, the jobs that were meant first."""
    if not everything:
        return "Nothing was enqueued."
    of_type = [each for each in everything if each.job_type in wanted.names]
    others = [each for each in everything if each.job_type not in wanted.names]
    return f"Enqueued:\n{_lines([*of_type, *others])}"


def _lines(jobs: Iterable[EnqueuedJob]) -> str:
    lines = [f"  {each}" for each in jobs]
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join(lines[:_SHOWN] + more)
