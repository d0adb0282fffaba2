"""Look at the jobs in the table, and in the history, and change what becomes of them: retry, cancel, discard, prune.

    from greenjobs import jobs

    for job in jobs.find(state="failed", job_type="send_email", newer_than="2h"):
        print(job.id, job.error)
    jobs.retry(state="failed", error="connection refused")
    jobs.discard(17, 18)

Which jobs are meant is said by ids, by filters, or both, and all that is said must hold. The filters are those of
`Filters`. What is done is done in batches, each of them committed, so that a large number holds nobody up for long; and
it is fenced: a job that has moved on since it was chosen is left alone, and the outcome says so.

Inside a job this is about the database of its runner, elsewhere about that of the settings. Every function raises
OptionError for a filter that cannot be, DatabaseUnavailable, SchemaError where the tables are missing, and
AccessDenied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from psycopg2 import errors

from greenjobs import config, history, inspection, storage
from greenjobs.current import lender
from greenjobs.durations import DURATION_FORMS, duration
from greenjobs.errors import OptionError
from greenjobs.handle import JobHandle
from greenjobs.history import FinishedJob
from greenjobs.inspection import JobFilter, StoredJob
from greenjobs.refusals import explained

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from typing_extensions import Unpack

__all__ = ["Filters", "FinishedJob", "Outcome", "Plan", "StoredJob", "cancel", "count", "discard", "find", "get"]
__all__ += ["handle", "plan", "prune", "retry"]

Action = Literal["retry", "cancel", "discard", "prune"]

STATES = ("scheduled", "available", "running", "failed")
KEPT_OUTCOMES = history.KEPT_OUTCOMES
"""What jobs are that ended and are kept in the history."""

# The states whose jobs each action takes; and those where neither a state nor an id is named: to have tomorrow's mails
# sent today, or deleted, should take more than the name of their queue.
_TAKES: Mapping[Action, tuple[str, ...]] = {
    "retry": ("failed", "scheduled"),
    "cancel": ("scheduled", "available", "running"),
    "discard": ("failed", "scheduled", "available"),
    "prune": ("failed", *KEPT_OUTCOMES),
}
_TAKES_UNASKED: Mapping[Action, tuple[str, ...]] = {
    **_TAKES,
    **dict.fromkeys(("retry", "discard", "prune"), ("failed",)),
}

# What jobs that wait become in the history; pruned ones do not go there.
_OUTCOMES: Mapping[Action, Literal["discarded", "cancelled"]] = {"cancel": "cancelled", "discard": "discarded"}

# A batch locks its jobs for some tens of milliseconds.
_BATCH = 1000

_LARGEST_ID = 2**63 - 1


class Filters(TypedDict, total=False):
    """What jobs can be told by; each is a keyword argument, and None is the same as leaving it out.

    `queue`, `job_type` and `state` are a name or several. `error` is a part of the last error as `StoredJob.error` has
    it, in any case. `older_than` and `newer_than` are seconds, a timedelta, or a text such as "7 days" or "12h": since
    the job failed, if it is failed, since it ended, if it is in the history, else since it was enqueued.
    """

    queue: str | Iterable[str] | None
    job_type: str | Iterable[str] | None
    state: str | Iterable[str] | None
    error: str | None
    older_than: float | timedelta | str | None
    newer_than: float | timedelta | str | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the jobs that were meant, by id.

    `ids` are those that it was done to, `asked` those that run and were asked to end. `left_alone` says why for all
    others: those that were named by id and could not be taken, and those that moved on in the meantime.
    """

    ids: tuple[int, ...] = ()
    asked: tuple[int, ...] = ()
    left_alone: Mapping[int, str] = field(default_factory=dict)


def find(*ids: int, limit: int | None = 100, **filters: Unpack[Filters]) -> list[StoredJob | FinishedJob]:
    """The jobs that are meant, all without ids and filters: the newest first, up to `limit`, which may be None.

    Those of the history are meant where ids are given, or a state that is an outcome, such as "done".
    """
    meant = _meant(ids, filters, takes=(*STATES, *KEPT_OUTCOMES), unasked=None)
    limit = _checked_limit(limit)
    found: list[StoredJob | FinishedJob] = []
    with _connection() as connection:
        if _are_in_table(meant):
            found += inspection.find_jobs(connection, meant, limit=limit)
        if _are_in_history(meant):
            found += history.find_jobs(connection, meant, limit=limit)
    return sorted(found, key=lambda job: job.id, reverse=True)[:limit]


def get(id: int) -> StoredJob | FinishedJob | None:
    """The job of that id, from the history perhaps; None when it is gone, for it ended and is not kept, or never was.

    Whether it is a FinishedJob, its `state` tells.
    """
    found = find(id)
    return found[0] if found else None


def count(*ids: int, **filters: Unpack[Filters]) -> int:
    """How many jobs are meant, all without ids and filters; those of the history as for `find`."""
    meant = _meant(ids, filters, takes=(*STATES, *KEPT_OUTCOMES), unasked=None)
    with _connection() as connection:
        counted = inspection.count_jobs(connection, meant) if _are_in_table(meant) else 0
        return counted + (inspection.count_jobs(connection, meant, finished=True) if _are_in_history(meant) else 0)


def handle(id: int) -> JobHandle:
    """The handle of a job that was enqueued earlier, elsewhere perhaps: to ask its status, wait for it, or cancel it.

    Asks nothing of the database: its `job_type` is "", and an id that no job has is "gone".
    """
    return JobHandle(_checked_id(id), "")


def retry(*ids: int, limit: int | None = None, **filters: Unpack[Filters]) -> Outcome:
    """Make jobs available now: failed ones, and, where they are named by id or state, scheduled ones.

    A failed job has all its retries before it again, and keeps the errors that it had. One with a unique key is left
    alone while another job has that key.
    """
    return plan("retry", *ids, limit=limit, **filters).carry_out()


def cancel(*ids: int, limit: int | None = None, **filters: Unpack[Filters]) -> Outcome:
    """End jobs that are not done: those that wait are deleted, those that run are asked to end."""
    return plan("cancel", *ids, limit=limit, **filters).carry_out()


def discard(*ids: int, limit: int | None = None, **filters: Unpack[Filters]) -> Outcome:
    """Delete jobs that do not run: failed ones, and, where they are named by id or state, waiting ones."""
    return plan("discard", *ids, limit=limit, **filters).carry_out()


def prune(*, limit: int | None = None, **filters: Unpack[Filters]) -> Outcome:
    """Delete jobs that failed longer ago than `older_than`, which is `keep_failed` of the settings if not given; or,
    where their state is named, such as "done", those of the history that ended longer ago than `older_than`."""
    return plan("prune", limit=limit, **filters).carry_out()


def plan(action: Action, *ids: int, limit: int | None = None, **filters: Unpack[Filters]) -> Plan:
    """Choose jobs for an action and do nothing yet; see the function of that name. With `limit`, the newest ones."""
    if action == "prune":
        if ids:
            raise OptionError("prune takes no ids; discard does")
        named = _names("state", filters.get("state"))
        filters["state"] = named
        if filters.get("older_than") is None:
            filters["older_than"] = _keep_failed(named or ())
    elif not ids and all(value is None for value in filters.values()):
        raise OptionError(
            f"{action} which jobs? Name them by id, or by at least one of {', '.join(Filters.__annotations__)}"
        )
    limit = _checked_limit(limit)
    meant = _meant(ids, filters, takes=_TAKES[action], unasked=_TAKES_UNASKED[action], action=action)
    finished: list[storage.Fence] = []
    with _connection() as connection:
        chosen = [storage.Fence(*each) for each in inspection.choose_jobs(connection, meant, limit=limit)]
        if action == "prune" and _are_in_history(meant):
            finished = [
                storage.Fence(*each) for each in inspection.choose_jobs(connection, meant, limit=limit, finished=True)
            ]
            finished = finished if limit is None else finished[: limit - len(chosen)]
        missed = set(ids).difference(fence.id for fence in chosen)
        states = inspection.job_states(connection, sorted(missed)) if missed else {}
    assert meant.states is not None
    unfit = "does not fit the filters" if limit is None else "does not fit the filters, or is beyond the limit"
    left_alone = {id: _why_not_taken(states.get(id), meant.states, unfit) for id in sorted(missed)}
    return Plan(action, tuple(meant.states), tuple(chosen), left_alone, tuple(finished))


@dataclass(frozen=True, slots=True)
class Plan:
    """The jobs that an action is going to take, as they were when they were chosen; `finished` are of the history."""

    action: Action
    states: Sequence[str]
    chosen: Sequence[storage.Fence]
    left_alone: Mapping[int, str]
    finished: Sequence[storage.Fence] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the jobs to take."""
        return tuple(fence.id for fence in (*self.chosen, *self.finished))

    def carry_out(self) -> Outcome:
        """Do it. What moves on before its turn comes is left alone."""
        done: list[int] = []
        asked: list[int] = []
        left_alone = dict(self.left_alone)
        for start in range(0, len(self.chosen), _BATCH):
            batch = self.chosen[start : start + _BATCH]
            outcome = self._carry_out(batch)
            done.extend(outcome.ids)
            asked.extend(outcome.asked)
            left_alone.update(outcome.left_alone)
        for start in range(0, len(self.finished), _BATCH):
            batch = self.finished[start : start + _BATCH]
            with _connection() as connection:
                forgotten = storage.forget(connection, batch)
            done.extend(fence.id for fence in batch if fence.id in forgotten)
            left_alone.update((fence.id, "has moved on: is gone") for fence in batch if fence.id not in forgotten)
        return Outcome(tuple(done), tuple(asked), left_alone)

    def _carry_out(self, batch: Sequence[storage.Fence]) -> Outcome:
        if self.action == "retry":
            return _retry(batch, self.states)
        asked: list[int] = []
        with _connection() as connection:
            if "running" in self.states:
                removed, asked = storage.cancel(connection, [fence.id for fence in batch])
                done = set(removed)
            else:
                outcome = _OUTCOMES.get(self.action)
                done = storage.discard(connection, batch, states=self.states, outcome=outcome)
        return _outcome(batch, done, asked)


def _retry(batch: Sequence[storage.Fence], states: Sequence[str]) -> Outcome:
    """Retry them, but for those whose unique key another one has: they are found by halving."""
    try:
        with _connection() as connection:
            queues = storage.retry(connection, batch, states=states)
    except errors.UniqueViolation:
        if len(batch) == 1:
            return Outcome(left_alone={batch[0].id: "another job has its unique key"})
        middle = len(batch) // 2
        one, other = _retry(batch[:middle], states), _retry(batch[middle:], states)
        return Outcome(one.ids + other.ids, left_alone={**one.left_alone, **other.left_alone})
    named = sorted({queue for queue in queues.values() if queue is not None})
    if named:
        with _connection() as connection:
            storage.wake(connection, named)
    return _outcome(batch, queues, [])


def _outcome(batch: Sequence[storage.Fence], done: Iterable[int], asked: Sequence[int]) -> Outcome:
    done = set(done)
    touched = done.union(asked)
    missed = [fence.id for fence in batch if fence.id not in touched]
    left_alone: dict[int, str] = {}
    if missed:
        with _connection() as connection:
            states = inspection.job_states(connection, missed)
        left_alone = {id: _why_moved_on(states.get(id)) for id in missed}
    return Outcome(tuple(fence.id for fence in batch if fence.id in done), tuple(asked), left_alone)


def _why_not_taken(state: str | None, takes: Sequence[str], unfit: str) -> str:
    if state is None:
        return "is gone"
    return unfit if state in takes else f"is {state}"


def _why_moved_on(state: str | None) -> str:
    return "has moved on: is gone" if state is None else f"has moved on: is {state}"


# --- what is meant ----------------------------------------------------------------------------------------------------


def _meant(
    ids: Sequence[int],
    filters: Filters,
    *,
    takes: Sequence[str],
    unasked: Sequence[str] | None,
    action: str = "find",
) -> JobFilter:
    unknown = sorted(set(filters) - Filters.__annotations__.keys())
    if unknown:
        raise TypeError(f"there is no filter {unknown[0]!r}; there are {', '.join(Filters.__annotations__)}")
    for id in ids:
        _checked_id(id)
    states = _names("state", filters.get("state"))
    for state in states or ():
        if state not in STATES and state not in KEPT_OUTCOMES:
            raise OptionError(f"state is {state!r}; allowed: {', '.join((*STATES, *KEPT_OUTCOMES))}")
        if state not in takes:
            raise OptionError(f"{action} does not take {state} jobs; it takes those that are {' or '.join(takes)}")
    if states is None and unasked is not None:
        states = list(takes if ids else unasked)
    error = filters.get("error")
    if error is not None and (not isinstance(error, str) or not error.strip() or "\0" in error):
        raise OptionError(f"error is {error!r}; allowed: a part of the text of an error")
    return JobFilter(
        ids=list(ids) or None,
        queues=_names("queue", filters.get("queue")),
        job_types=_names("job_type", filters.get("job_type")),
        states=states,
        error=error,
        older_than=_seconds("older_than", filters.get("older_than")),
        newer_than=_seconds("newer_than", filters.get("newer_than")),
    )


def _are_in_table(meant: JobFilter) -> bool:
    return meant.states is None or not set(STATES).isdisjoint(meant.states)


def _are_in_history(meant: JobFilter) -> bool:
    if meant.states is None:
        return meant.ids is not None
    return not set(KEPT_OUTCOMES).isdisjoint(meant.states)


def _checked_id(id: int) -> int:
    if type(id) is not int or not 1 <= id <= _LARGEST_ID:
        raise OptionError(f"{id!r} is not the id of a job; allowed: a whole number from 1")
    return id


def _names(filter: str, given: str | Iterable[str] | None) -> list[str] | None:
    if given is None:
        return None
    names: list[Any] = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    for name in names:
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise OptionError(f"{filter} is {given!r}; allowed: a name, or a list of names")
    return names


def _seconds(filter: str, given: float | timedelta | str | None) -> float | None:
    if given is None:
        return None
    try:
        return duration(given)
    except (ValueError, OverflowError):
        raise OptionError(f"{filter} is {given!r}; allowed: {DURATION_FORMS}") from None


def _checked_limit(limit: int | None) -> int | None:
    if limit is not None and (type(limit) is not int or not 1 <= limit <= _LARGEST_ID):
        raise OptionError(f"limit is {limit!r}; allowed: a whole number from 1")
    return limit


def _keep_failed(states: Sequence[str]) -> float:
    if set(states).intersection(KEPT_OUTCOMES):
        raise OptionError("prune finished jobs that ended how long ago? Name older_than; 0 is all of them")
    seconds = config.current().keep_failed
    if not seconds:
        raise OptionError("prune jobs that failed how long ago? Name older_than, for keep_failed is forever")
    return seconds


@contextlib.contextmanager
def _connection() -> Iterator[Connection]:
    """A transaction in which statements may take their time."""
    with explained(), lender(config.current()).connection() as connection, storage.patiently(connection):
        yield connection
