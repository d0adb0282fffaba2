"""The job under a task, with its name and its parameters."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from greenjobs import config
from greenjobs.call import Call, CallOptions
from greenjobs.contrib.celery import options as opts
from greenjobs.errors import JobDefinitionError
from greenjobs.job import Job, JobSchedule
from greenjobs.keeping import ResultCodec
from greenjobs.surroundings import Enqueue, around_enqueues, surround_enqueue
from greenjobs.uniqueness import Uniqueness

if TYPE_CHECKING:
    from greenjobs.contrib.celery.task import Task
    from greenjobs.handle import JobHandle

_UNLIMITED_RETRIES = 2**31 - 1

# The later tasks of a chain wait under their ids, with nothing in them, until the one before gives them arguments and
# makes them due. If none ever does, they fail after a year, and so are pruned one day.
_PARKED_SECONDS = 365 * 24 * 60 * 60.0

# Any will do that is not 0: whether a row is kept, and how long, is said by the call that made it.
_KEPT = "1 day"

#: How often this attempt's task may be retried, where it said so itself.
_limit: ContextVar[int | None] = ContextVar("greenjobs_celery_limit", default=None)

_carried: ContextVar[Mapping[str, str] | None] = ContextVar("greenjobs_celery_headers", default=None)


@contextmanager
def _carry(enqueue: Enqueue) -> Iterator[Mapping[str, str] | None]:
    """The headers of the call that is being made."""
    yield _carried.get()


def limit_retries(limit: int | None) -> None:
    """Let the task of this attempt be retried so often at most, whatever it says otherwise; None for ever."""
    _limit.set(_UNLIMITED_RETRIES if limit is None else limit)


@contextmanager
def carrying(headers: Mapping[str, str]) -> Iterator[None]:
    """What is enqueued inside the block has these headers."""
    if headers and _carry not in around_enqueues:  # most applications never need it
        surround_enqueue(_carry)
    token = _carried.set(headers or None)
    try:
        yield
    finally:
        _carried.reset(token)


class TaskJob(Job[..., Any]):
    """The job under a task. What is said of every call is asked for with each: the settings may come later."""

    def __init__(self, function: Callable[..., Any], *, name: str, bind: bool, find_task: Callable[[], Task]) -> None:
        self._find_task = find_task
        plain = _plain_function(function, name, bind, find_task)
        super().__init__(
            plain, name=name, keep=_KEPT, keep_result=True, retry_on=(), backoff=lambda _, __: self._retry_delay()
        )

    @property
    def queue(self) -> str:
        """That of the task, or of its route."""
        task = self._find_task()
        routed = opts.routed(task.app.conf, task, (), {}, task.own_options())
        return routed.get("queue") or routed.get("routing_key") or config.current().default_queue

    @property
    def max_retries(self) -> int:
        """As the task has it; in an attempt that asked for a retry, as it said there."""
        limit = _limit.get()
        if limit is None:
            limit = self._find_task().max_retries
        return _UNLIMITED_RETRIES if limit is None else limit

    def options(self, **given: Any) -> Call[...]:
        """As for other jobs; what is left out is as the task and its application say."""
        task = self._find_task()
        own = {name: value for name, value in task.own_options().items() if value is not None}
        defaults = opts.job_options(task, opts.routed(task.app.conf, task, (), {}, own), keep=task.keep_seconds())
        return super().options(**defaults | {name: value for name, value in given.items() if value is not None})

    def delay(self, *args: Any, **kwargs: Any) -> JobHandle:
        """As for other jobs, with what the task says."""
        return self.options().delay(*args, **kwargs)

    def delay_many(self, calls: Any) -> list[JobHandle]:
        """As for other jobs, with what the task says."""
        return self.options().delay_many(calls)

    async def adelay(self, *args: Any, **kwargs: Any) -> JobHandle:
        """As for other jobs, with what the task says."""
        return await self.options().adelay(*args, **kwargs)

    async def adelay_many(self, calls: Any) -> list[JobHandle]:
        """As for other jobs, with what the task says."""
        return await self.options().adelay_many(calls)

    def schedules(self) -> Iterator[JobSchedule]:
        """Those of `beat_schedule` that are about this task: of its application, and of the current one."""
        from greenjobs.contrib.celery.app import current_app

        for app in dict.fromkeys((self._find_task().app, current_app())):
            yield from app.schedules_of(self)

    def park(self, key: str, *, connection: Any, independent: bool) -> JobHandle:
        """Enqueue a call that another one is going to complete, by `unique_key=key` and on_conflict="replace"."""
        options = CallOptions(
            delay_seconds=_PARKED_SECONDS,
            connection=connection,
            independent=independent,
            uniqueness=Uniqueness(lambda _: json.dumps(key), False, None, "keep", None),
        )
        call: Call[...] = Call(self, options)
        return call.enqueue_data("{}")

    def _retry_delay(self) -> float:
        return self._find_task().default_retry_delay


def _plain_function(function: Callable[..., Any], name: str, bind: bool, find_task: Callable[[], Task]) -> Any:
    """What a runner calls: it has the parameters of the task, and makes an attempt of a call."""
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise JobDefinitionError(f"the task {name!r} is a coroutine or a generator; declare it with def, without yield")
    signature = inspect.signature(function)
    if bind:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])

    @functools.wraps(function)
    def perform(*args: Any, **kwargs: Any) -> Any:
        return find_task().perform(args, kwargs)

    perform.__signature__ = signature  # type: ignore[attr-defined]
    try:
        ResultCodec(perform, job_name=name)
    except JobDefinitionError:
        # Celery does not read it; a result that is no JSON is found out, and said, when there is one.
        perform.__signature__ = signature.replace(return_annotation=Any)  # type: ignore[attr-defined]
    return perform
