"""Results: Celery's class over a handle."""

from __future__ import annotations

import ast
import builtins
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from greenjobs.contrib.celery import states
from greenjobs.contrib.celery.exceptions import TaskRevokedError, TimeoutError, Unsupported, no_attribute
from greenjobs.contrib.celery.request import attempt_here
from greenjobs.errors import JobFailed, JobNotEnded, NoResult, OptionError
from greenjobs.handle import JobHandle

if TYPE_CHECKING:
    from greenjobs.contrib.celery.app import Celery
    from greenjobs.history import FinishedJob
    from greenjobs.inspection import StoredJob

__all__ = ["AsyncResult", "EagerResult", "GroupResult"]

_STATES = {
    "done": states.SUCCESS,
    "failed": states.FAILURE,
    "cancelled": states.REVOKED,
    "expired": states.REVOKED,
}

_CHAINS = "`.parent` has the result of the task before, and `link` and chain enqueue what comes next"
_NOT_HERE = {
    **dict.fromkeys(
        ("children", "collect", "iterdeps", "get_leaf", "graph", "build_graph", "as_list", "as_tuple"), _CHAINS
    ),
    **dict.fromkeys(("args", "kwargs", "queue", "worker"), "greenjobs.jobs.get(int(result.id)) has all of the job"),
    **dict.fromkeys(("then", "on_ready"), "use link=…, or on_success of the task"),
    **dict.fromkeys(("backend", "supports_native_join"), "results are rows in PostgreSQL: greenjobs.jobs"),
}

_WAITING_INSIDE = (
    "a task waits for another one, which may never get a place to run in: enqueue what comes next with link=… or a "
    "chain; or, where the other one has a queue of its own, get(disable_sync_subtasks=False)"
)


class AsyncResult:
    """A task that was enqueued, by its id. What is asked of it is asked of the database each time."""

    def __init__(
        self,
        id: str | int | JobHandle,
        backend: Any = None,
        task_name: str | None = None,
        app: Celery | None = None,
        parent: AsyncResult | None = None,
    ) -> None:
        self._handle = id if isinstance(id, JobHandle) else JobHandle(_number(id), "")
        self.app = app
        self.parent = parent

    @property
    def id(self) -> str:
        """The id of the job, as a text."""
        return str(self._handle.id)

    task_id = id

    @property
    def handle(self) -> JobHandle:
        """The same as greenjobs has it."""
        return self._handle

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncResult) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self._handle.id)

    def __getattr__(self, name: str) -> NoReturn:
        no_attribute(self, name, _NOT_HERE)

    # --- looking ------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """PENDING, STARTED (with task_track_started), RETRY, SUCCESS, FAILURE, REVOKED, IGNORED, or what the task said
        with update_state. A task that is not kept is PENDING again when it has ended, as one that never was.
        """
        status = self._handle.status()
        if status in _STATES:
            return _STATES[status]
        if status == "scheduled":
            stored = self._stored()
            return states.RETRY if stored is not None and stored.retries else states.PENDING
        if status in ("running", "discarded"):
            said = self._said()
            if said is not None:
                return str(said["state"])
            if status == "discarded":
                return states.IGNORED
            return states.STARTED if self._is_told_of_starts() else states.PENDING
        return states.PENDING

    status = state

    @property
    def result(self) -> Any:
        """What the task returned; the exception, if it failed; what it said last with update_state, if it runs."""
        status = self._handle.status()
        if status == "done":
            try:
                return self._handle.result(0)
            except NoResult:  # not kept, or no JSON
                return None
        if status == "failed":
            return self._error()
        if status in ("cancelled", "expired"):
            return TaskRevokedError(f"task {self.id} was {status}")
        said = self._said() if status in ("running", "discarded") else None
        return None if said is None else said["meta"]

    info = result

    @property
    def traceback(self) -> str | None:
        """That of the last error."""
        stored = self._stored()
        return str(stored.errors[-1].get("traceback")) if stored is not None and stored.errors else None

    @property
    def name(self) -> str | None:
        """The name of the task; None when it is gone."""
        stored = self._stored()
        return self._handle.job_type or (None if stored is None else stored.job_type)

    @property
    def retries(self) -> int | None:
        """How often it was retried; None when it is gone."""
        stored = self._stored()
        return None if stored is None else stored.retries

    @property
    def date_done(self) -> datetime | None:
        """When it ended; None of one that has not, or is gone."""
        stored = self._stored()
        if stored is None or stored.state in ("scheduled", "available", "running"):
            return None
        ended: datetime | None = getattr(stored, "ended_at", None)  # that of one that has failed is with its error
        return ended or next((datetime.fromisoformat(each["at"]) for each in stored.errors[-1:]), None)

    def ready(self) -> bool:
        """Whether it has ended: done, failed for good, revoked or ignored."""
        return self.state in (*states.READY_STATES, states.IGNORED)

    def successful(self) -> bool:
        """Whether it is done."""
        return self.state == states.SUCCESS

    def failed(self) -> bool:
        """Whether it has failed for good."""
        return self.state == states.FAILURE

    # --- waiting ------------------------------------------------------------------------------------------------------

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        no_ack: bool = True,
        follow_parents: bool = True,
        callback: Callable[[str, Any], None] | None = None,
        on_message: None = None,
        on_interval: None = None,
        disable_sync_subtasks: bool = True,
        **_: Any,
    ) -> Any:
        """Wait until it has ended, and return what it returned.

        An error of a builtin class is raised as such, others as JobFailed, with the name of the class; with
        propagate=False errors are returned. Raises TimeoutError, TaskRevokedError, and NoResult where results are not
        kept. Of a chain, a task that failed raises here, too.
        """
        if disable_sync_subtasks and attempt_here() is not None:
            raise RuntimeError(_WAITING_INSIDE)
        deadline = None if timeout is None else time.monotonic() + timeout
        if follow_parents and propagate and self.parent is not None:
            self.parent._wait_out(deadline)
        try:
            value = self._handle.result(_left(deadline))
        except JobNotEnded as error:
            raise TimeoutError(f"task {self.id} has not ended in time: {error}") from None
        except JobFailed as error:
            return _raised(_rebuilt(error, self.traceback), propagate)
        except NoResult as error:
            if error.outcome in ("cancelled", "expired"):
                return _raised(TaskRevokedError(f"task {self.id} was {error.outcome}"), propagate)
            raise NoResult(
                f"{error}; for a task of Celery that is so where a result backend is named, as in "
                f"Celery(backend='postgresql://…'), and the result is not ignored (ignore_result)",
                id=error.id,
                outcome=error.outcome,
            ) from None
        if callback is not None:
            callback(self.id, value)
        return value

    wait = get

    def maybe_throw(self, propagate: bool = True, callback: Any = None) -> Any:
        """Raise its error, if it has failed; return its result, as far as there is one."""
        return self.get() if propagate and self.failed() else self.result

    maybe_reraise = maybe_throw

    def _wait_out(self, deadline: float | None) -> None:
        """Wait for this one and those before it; raises what they failed with."""
        if self.parent is not None:
            self.parent._wait_out(deadline)
        try:
            ended_as = self._handle.wait(_left(deadline))
        except JobNotEnded as error:
            raise TimeoutError(f"task {self.id} has not ended in time: {error}") from None
        if ended_as not in ("done", "gone"):
            self.get()

    # --- changing -----------------------------------------------------------------------------------------------------

    def revoke(self, connection: Any = None, terminate: bool = False, **_: Any) -> None:
        """Remove the task if it waits; with `terminate`, end it if it runs."""
        if terminate:
            self._handle.cancel()
        else:
            from greenjobs import jobs

            jobs.cancel(self._handle.id, state=["scheduled", "available"])

    def forget(self) -> None:
        """Delete what is kept of a task that has ended; of one that has not, nothing."""
        from greenjobs import jobs, storage

        stored = self._stored()
        if stored is None or stored.state in ("scheduled", "available", "running"):
            return
        fence = (storage.Fence(stored.id, stored.attempt),)
        is_failed = stored.state == "failed"
        jobs.Plan("prune", ("failed",), fence if is_failed else (), {}, () if is_failed else fence).carry_out()

    # --- the row ------------------------------------------------------------------------------------------------------

    def _stored(self) -> StoredJob | FinishedJob | None:
        from greenjobs import jobs  # it needs psycopg2

        if type(self._handle) is not JobHandle:  # that of a test, whose job is in no database
            return None
        return jobs.get(self._handle.id)

    def _said(self) -> dict[str, Any] | None:
        stored = self._stored()
        message = None if stored is None or stored.progress is None else stored.progress.message
        try:
            said = json.loads(message or "")
        except ValueError:  # of the application's own
            return None
        return said if isinstance(said, dict) and said.keys() == {"state", "meta"} else None

    def _is_told_of_starts(self) -> bool:
        from greenjobs.contrib.celery.app import current_app, tasks

        said = getattr(tasks.get(self.name or ""), "track_started", None)
        return bool((self.app or current_app()).conf.task_track_started if said is None else said)

    def _error(self) -> BaseException:
        try:
            self._handle.result(0)
        except JobFailed as error:
            return _rebuilt(error, self.traceback)
        except (JobNotEnded, NoResult) as error:  # somebody has retried it
            return error
        return TaskRevokedError(f"task {self.id} is done by now")


class EagerResult(AsyncResult):
    """What apply() returns: a task that has run, and is in no database."""

    def __init__(self, id: str, value: Any, state: str, traceback: str | None = None) -> None:
        self._id = id
        self._value = value
        self._state = state
        self._traceback = traceback
        self.app = None
        self.parent = None

    @property
    def id(self) -> str:
        """A random one."""
        return self._id

    task_id = id

    def __hash__(self) -> int:
        return hash(self._id)

    @property
    def state(self) -> str:
        """How it ended."""
        return self._state

    status = state

    @property
    def result(self) -> Any:
        """What it returned, or the exception."""
        return self._value

    info = result

    @property
    def traceback(self) -> str | None:
        """That of the exception."""
        return self._traceback

    @property
    def date_done(self) -> None:
        """Not kept."""

    def ready(self) -> bool:
        """It is."""
        return True

    def get(self, timeout: float | None = None, propagate: bool = True, *_: Any, **__: Any) -> Any:
        """What it returned; raises what it raised."""
        return _raised(self._value, propagate) if self._state == states.FAILURE else self._value

    wait = get

    def _wait_out(self, deadline: float | None) -> None:
        self.get()

    def revoke(self, *_: Any, **__: Any) -> None:
        """It has ended already."""

    def forget(self) -> None:
        """Nothing is kept."""


class GroupResult:
    """The results of several tasks, in order."""

    def __init__(self, id: str | None = None, results: Sequence[AsyncResult] = ()) -> None:
        self.id = id or str(uuid.uuid4())
        self.results = list(results)

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[AsyncResult]:
        return iter(self.results)

    def __getitem__(self, place: int) -> AsyncResult:
        return self.results[place]

    def __repr__(self) -> str:
        return f"<GroupResult: [{', '.join(each.id for each in self.results)}]>"

    @property
    def children(self) -> list[AsyncResult]:
        """The results."""
        return self.results

    def ready(self) -> bool:
        """Whether all have ended."""
        return all(each.ready() for each in self.results)

    def successful(self) -> bool:
        """Whether all are done."""
        return all(each.successful() for each in self.results)

    def failed(self) -> bool:
        """Whether one has failed for good."""
        return any(each.failed() for each in self.results)

    def waiting(self) -> bool:
        """Whether one has not ended."""
        return not self.ready()

    def completed_count(self) -> int:
        """How many are done."""
        return sum(each.successful() for each in self.results)

    def get(self, timeout: float | None = None, propagate: bool = True, **options: Any) -> list[Any]:
        """Wait for all of them, `timeout` seconds in all, and return what they returned."""
        deadline = None if timeout is None else time.monotonic() + timeout
        return [each.get(timeout=_left(deadline), propagate=propagate, **options) for each in self.results]

    join = get

    def revoke(self, **options: Any) -> None:
        """Revoke all."""
        for each in self.results:
            each.revoke(**options)

    def forget(self) -> None:
        """Delete what is kept of those that have ended."""
        for each in self.results:
            each.forget()

    def save(self, *_: Any) -> None:
        """Not in greenjobs."""
        raise Unsupported("groups are not stored; store the ids of their results: [result.id for result in group]")

    delete = restore = save


def _number(id: object) -> int:
    try:
        number = int(str(id))
        if not 0 < number < 2**63:
            raise ValueError
    except ValueError:
        raise OptionError(
            f"{id!r} is not the id of a task: in greenjobs they are whole numbers from 1, as texts"
        ) from None
    return number


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


def _raised(error: Any, propagate: bool) -> Any:
    if propagate:
        raise error
    return error


def _rebuilt(error: JobFailed, traceback: str | None) -> BaseException:
    """The error of a task, where its class is one of Python's; else what says which it was."""
    known = getattr(builtins, error.error or "", None)
    if not isinstance(known, type) or not issubclass(known, Exception):
        return error
    # Others have classes of these names, too, as requests has: only the traceback tells in which module it was.
    if traceback is not None and re.findall(rf"^([\w.]*\b){error.error}(?::|$)", traceback, re.MULTILINE)[-1:] != [""]:
        return error
    message: Any = error.message
    try:
        if known is KeyError:  # the text of which is the repr of the key
            message = ast.literal_eval(str(message))
        rebuilt: Exception = known(message)
    except (SyntaxError, ValueError, TypeError):  # such as UnicodeError and ExceptionGroup, which are made of more
        return error
    rebuilt.__cause__ = error
    return rebuilt
