"""The job that runs in this greenlet, what it can ask about itself, and the connections it enqueues on.

Nothing here needs gevent. The worker says which attempt runs, in a context variable; `current_job` shows it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

from greenjobs import config
from greenjobs.errors import NoCurrentJob

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from greenjobs.policy import Policy
    from greenjobs.pool import ConnectionPool
    from greenjobs.storage import ClaimedJob


@dataclass(frozen=True, slots=True)
class JobRow:
    """The row of a running job, as it was claimed. `data` is the JSON object as Python has it."""

    id: int
    job_type: str
    data: Any
    queue: str
    priority: int
    retries: int
    crashes: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Place:
    """Where jobs run: the queue, what the runner was given as context, the connections for jobs to enqueue on, and what
    is entered around each attempt.
    """

    queue: str
    context: Any
    pool: ConnectionPool
    surroundings: tuple[Callable[[], AbstractContextManager[Any]], ...] = ()


class Declaration(Protocol):
    """What an attempt asks its job: `@job` makes these."""

    name: str
    policy: Policy

    @property
    def max_retries(self) -> int:
        """How often it is tried again after a failure."""


class Attempt:
    """One attempt of one job, while it runs. Made by the worker; shown by `current_job`."""

    __slots__ = ("greenlet", "interrupted_by", "job", "place", "row", "started")

    def __init__(self, job: Declaration, row: ClaimedJob, place: Place, greenlet: Any) -> None:
        self.job = job
        self.row = row
        self.place = place
        self.greenlet = greenlet
        self.started = 0.0
        self.interrupted_by: BaseException | None = None

    @property
    def max_retries(self) -> int:
        """How often the job may fail and be tried again; the call that enqueued it may have said otherwise than it."""
        if self.row.options is None:
            return self.job.max_retries
        return int(json.loads(self.row.options).get("max_retries", self.job.max_retries))

    def timeouts(self) -> tuple[float | None, float | None] | None:
        """The soft and the hard timeout in seconds; None when there is neither."""
        policy = self.job.policy
        soft, hard = policy.timeout, policy.hard_timeout
        if self.row.options is not None:
            overrides = json.loads(self.row.options)
            soft, hard = overrides.get("timeout", soft), overrides.get("hard_timeout", hard)
        return None if soft is None and hard is None else (soft, hard)

    @property
    def number(self) -> int:
        """1 for the first time the job runs, and one more for every failure and every death of its runner since."""
        return self.row.retries + self.row.crashes + 1


_attempt: ContextVar[Attempt] = ContextVar("greenjobs_attempt")

#: For the worker, which calls it first thing in the greenlet and the context of the job.
enter_attempt = _attempt.set


class CurrentJob:
    """What a job can ask about itself. Every attribute raises NoCurrentJob outside a job; bool(current_job) tells."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return _attempt.get(None) is not None

    def __repr__(self) -> str:
        attempt = _attempt.get(None)
        return "<no current job>" if attempt is None else f"<current job {attempt.row.id} ({attempt.job.name})>"

    @property
    def id(self) -> int:
        """The id of the row."""
        return _running().row.id

    @property
    def name(self) -> str:
        """The name of the job type."""
        return _running().job.name

    @property
    def queue(self) -> str:
        """The queue it was claimed from."""
        return _running().place.queue

    @property
    def attempt(self) -> int:
        """1 for the first time it runs, and one more for every failure and every death of its runner since."""
        return _running().number

    @property
    def retries(self) -> int:
        """How often it has failed so far."""
        return _running().row.retries

    @property
    def max_retries(self) -> int:
        """How often it may fail and be tried again."""
        return _running().max_retries

    @property
    def is_last_attempt(self) -> bool:
        """Whether a failure now is final."""
        attempt = _running()
        return attempt.row.retries >= attempt.max_retries

    @property
    def context(self) -> Any:
        """What the runner was given as `context`."""
        return _running().place.context

    @property
    def row(self) -> JobRow:
        """The row of this job as it was claimed."""
        import orjson

        attempt = _running()
        row = attempt.row
        return JobRow(
            id=row.id,
            job_type=row.job_type,
            data=orjson.loads(row.data),
            queue=attempt.place.queue,
            priority=row.priority,
            retries=row.retries,
            crashes=row.crashes,
            created_at=datetime.fromtimestamp(row.created_at, timezone.utc),
        )


current_job = CurrentJob()


def _running() -> Attempt:
    attempt = _attempt.get(None)
    if attempt is None:
        raise NoCurrentJob("current_job is only there while a job runs; bool(current_job) tells whether one does")
    return attempt


# --- what to enqueue on -----------------------------------------------------------------------------------------------


@functools.cache
def database_rooms() -> tuple[Any, Any]:
    """`greenjobs.pool` and `greenjobs.storage`, which need psycopg2: loaded with the first job that is enqueued."""
    from greenjobs import pool, storage

    return pool, storage


ambient: Callable[[str, str], Any] | None = None
"""Set by greenjobs.contrib: given the database URL and the name of a job, what a call that names no connection is to be
enqueued on, as for `.options(connection=…)`; None for a connection of ours."""


def lender(settings: config.Settings) -> ConnectionPool:
    """The connections to enqueue on: those of the runner inside a job, else those of the process."""
    attempt = _attempt.get(None)
    if attempt is not None:
        return attempt.place.pool
    pool, _ = database_rooms()
    shared: ConnectionPool = pool.shared_pool(settings)
    return shared
