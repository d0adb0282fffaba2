"""Tasks: Celery's class, over a job of greenjobs that has its name.

A task decides by itself what becomes of an attempt, as Celery's do: an error is final unless the task asked for a
retry. So its job is tried again for nothing but that.
"""

from __future__ import annotations

import functools
import json
import logging
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from greenjobs import config, current
from greenjobs.contrib.celery import options as opts
from greenjobs.contrib.celery import states
from greenjobs.contrib.celery.exceptions import (
    Ignore,
    MaxRetriesExceededError,
    Reject,
    Retry,
    Unsupported,
    no_attribute,
)
from greenjobs.contrib.celery.request import Request, attempt_here, entered, request_of
from greenjobs.contrib.celery.retries import is_same_call, retry_by_itself
from greenjobs.contrib.celery.task_job import carrying, limit_retries
from greenjobs.control import Snooze
from greenjobs.current import current_job
from greenjobs.errors import OptionError
from greenjobs.progress import LONGEST_MESSAGE

if TYPE_CHECKING:
    from greenjobs.call import Call
    from greenjobs.contrib.celery.app import Celery
    from greenjobs.contrib.celery.canvas import Signature
    from greenjobs.contrib.celery.result import AsyncResult, EagerResult
    from greenjobs.contrib.celery.task_job import TaskJob
    from greenjobs.handle import JobHandle

logger = logging.getLogger(__name__)

# What Celery puts off with nothing said, in seconds.
_DEFAULT_RETRY_DELAY = 180

# A rejected task that is to be run again is not spun with.
_REQUEUE_SECONDS = 1

_OF_BROKERS = "the database is the broker here: greenjobs.connection(), greenjobs.jobs"
_NOT_HERE = {
    **dict.fromkeys(("backend", "send_event", "start_strategy", "Strategy", "add_trail"), _OF_BROKERS),
    **dict.fromkeys(("push_request", "pop_request", "request_stack"), "in tests, use task.apply(args, retries=…)"),
}

_MANY = "enqueue many with task.job.delay_many([(1,), (2,)]), or with group(…)"


@dataclass(frozen=True, slots=True)
class ExceptionInfo:
    """An error, as the methods on_failure and on_retry get it beside the exception."""

    exception: BaseException
    traceback: str

    @property
    def type(self) -> type[BaseException]:
        """Its class."""
        return type(self.exception)

    def __str__(self) -> str:
        return self.traceback


class Task:
    """A task. Subclass it for `base=` and `task_cls=`; the attributes are the defaults of the options."""

    app: Celery
    job: TaskJob
    name: str = ""
    max_retries: int | None = 3
    default_retry_delay: float = _DEFAULT_RETRY_DELAY
    autoretry_for: tuple[type[BaseException], ...] = ()
    dont_autoretry_for: tuple[type[BaseException], ...] = ()
    retry_kwargs: Mapping[str, Any] = {}
    retry_backoff: bool | float = False
    retry_backoff_max: int = 600
    retry_jitter: bool = True
    ignore_result: bool | None = None
    queue: str | None = None
    routing_key: str | None = None
    priority: int | None = None
    expires: Any = None
    time_limit: float | None = None
    soft_time_limit: float | None = None
    rate_limit: str | None = None
    track_started: bool | None = None
    serializer: str | None = None
    pydantic: bool = False

    MaxRetriesExceededError = MaxRetriesExceededError

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the task does."""
        raise NotImplementedError(f"the task {self.name} has no method run")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        if request.id is not None and not request.is_entered:  # by way of super() from a class of the application's
            request.is_entered = True
            return self.run(*args, **kwargs)
        with entered(self, Request(task=self.name, args=args, kwargs=kwargs)):
            return self.run(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<@task: {self.name} of {self.app.main}>"

    def __getattr__(self, name: str) -> NoReturn:
        no_attribute(self, name, _NOT_HERE)

    @property
    def request(self) -> Request:
        """The call that goes on here."""
        return request_of(self)

    # --- enqueuing ----------------------------------------------------------------------------------------------------

    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult | EagerResult:
        """Enqueue a call."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Any = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult | EagerResult:
        """Enqueue a call with these options; beside Celery's, `connection` and `independent` as for a job of greenjobs.

        Raises Unsupported and OptionError for an option that cannot be; and as `.delay` of a job.
        """
        from greenjobs.contrib.celery.result import AsyncResult

        args, kwargs = opts.positional(self.name, args), dict(kwargs or {})
        if self.app.conf.task_always_eager:
            # So that what could not be enqueued, or not be stored, is found out.
            self._call(args, kwargs, options)
            limit = config.current().max_payload_bytes
            args, kwargs = self.job.codec.decode(self.job.codec.encode(args, kwargs, max_bytes=limit))
            known = ("link", "headers", "retries")
            return self.apply(args, kwargs, **{name: options[name] for name in known if name in options})
        if current.stage is None or not current.stage.runs_at_once:
            return AsyncResult(self._enqueue(args, kwargs, options), app=self.app)
        # In a test that has jobs run inline there may be no database for what follows to be enqueued in.
        self._call(args, kwargs, options)
        link = options.pop("link", None)
        result = AsyncResult(self._enqueue(args, kwargs, options), app=self.app)
        for follower in _as_list(link) if result.successful() else ():
            follower.apply_async((result.result,))
        return result

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Enqueue a call when Django commits the transaction that is open here; at once where none is."""
        self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """As delay_on_commit, with options."""
        from django.db import transaction

        transaction.on_commit(functools.partial(self.apply_async, *args, **kwargs))

    def apply(
        self,
        args: Any = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        link: Any = None,
        retries: int = 0,
        throw: bool | None = None,
        headers: Mapping[str, str] | None = None,
        task_id: str | None = None,
        **_: Any,
    ) -> EagerResult:
        """Run the task here and now, retries without delay; the errors are in what is returned, or raised (`throw`)."""
        from greenjobs.contrib.celery.result import EagerResult

        throw = self.app.conf.task_eager_propagates if throw is None else throw
        id = task_id or str(uuid.uuid4())
        while True:
            request = Request(
                id=id,
                task=self.name,
                args=opts.positional(self.name, args),
                kwargs=dict(kwargs or {}),
                retries=retries,
                is_eager=True,
                called_directly=False,
                headers=headers or {},
            )
            try:
                value = self._trace(request)
            except Retry:
                retries += 1
                continue
            except (Ignore, Reject) as error:
                return EagerResult(id, error, states.IGNORED)
            except Exception as error:
                if throw:
                    raise
                return EagerResult(id, error, states.FAILURE, traceback.format_exc())
            for follower in _as_list(link):
                follower.apply((value,), throw=throw)
            return EagerResult(id, value, states.SUCCESS)

    def _enqueue(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        **job_options: Any,
    ) -> JobHandle:
        call, carried = self._call(args, kwargs, options, headers=headers, **job_options)
        with carrying(carried):
            return call.delay(*args, **kwargs)

    def _call(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        **job_options: Any,
    ) -> tuple[Call[...], dict[str, str]]:
        """A call of the job with these options, and the headers that it is to carry. Raises as apply_async."""
        from greenjobs.contrib.celery.canvas import followers_of

        options = dict(options)
        ignore_result, link = options.pop("ignore_result", None), options.pop("link", None)
        given = {name: value for name, value in {**self.own_options(), **options}.items() if value is not None}
        carried = {**opts.headers_of(self, given), **(headers or {})}
        followers = followers_of(self, link, carried.get(opts.FOLLOWERS))
        if followers:
            carried[opts.FOLLOWERS] = followers
        parent = attempt_here()
        if parent is not None:
            carried |= {opts.PARENT: str(parent.id), opts.ROOT: str(parent.root_id)}
        given = {name: given[name] for name in given.keys() - opts.TASKS_OWN}
        routed = opts.routed(self.app.conf, self, args, kwargs, given)
        given = opts.job_options(self, routed, keep=self.keep_seconds(ignore_result))
        return self.job.options(**given, **job_options), carried

    def own_options(self) -> dict[str, Any]:
        """What is said of every call, by the task or by the settings of its application."""
        conf = self.app.conf
        return {
            "queue": self.queue,
            "routing_key": self.routing_key,
            "priority": conf.task_default_priority if self.priority is None else self.priority,
            "expires": self.expires,
            "time_limit": conf.task_time_limit if self.time_limit is None else self.time_limit,
            "soft_time_limit": conf.task_soft_time_limit if self.soft_time_limit is None else self.soft_time_limit,
        }

    def keep_seconds(self, ignore_result: bool | None = None) -> float:
        """How long a call is kept after its end, 0 for not at all."""
        said = (ignore_result, self.ignore_result, self.app.conf.task_ignore_result)
        ignores = next(each for each in said if each is not None)
        return 0.0 if ignores or not self.app.conf.keeps_results else float(self.app.conf.result_seconds)

    # --- signatures ---------------------------------------------------------------------------------------------------

    def signature(self, args: Any = None, kwargs: Mapping[str, Any] | None = None, **options: Any) -> Signature:
        """A call that is not made yet."""
        from greenjobs.contrib.celery.canvas import Signature

        immutable = bool(options.pop("immutable", False))
        given = {**dict(options.pop("options", None) or {}), **options}
        return Signature(self, args, kwargs, options=given, immutable=immutable)

    subtask = signature

    def s(self, *args: Any, **kwargs: Any) -> Signature:
        """A call that is not made yet."""
        return self.signature(args, kwargs)

    def si(self, *args: Any, **kwargs: Any) -> Signature:
        """One that takes no result of another task."""
        return self.signature(args, kwargs, immutable=True)

    def map(self, *_: Any) -> NoReturn:
        """Not in greenjobs."""
        raise Unsupported(f"{self.name}: map, starmap and chunks are not in greenjobs; {_MANY}")

    starmap = chunks = map

    def AsyncResult(self, task_id: str | int, **_: Any) -> AsyncResult:
        """The result of that id."""
        from greenjobs.contrib.celery.result import AsyncResult

        return AsyncResult(task_id, app=self.app)

    # --- what the task may do while it runs ---------------------------------------------------------------------------

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: BaseException | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Retry:
        """Have this call run again, after `countdown` seconds, at `eta`, or after default_retry_delay: raises Retry.

        When it has been retried `max_retries` times: raises `exc`, or MaxRetriesExceededError. With throw=False the
        Retry is returned, and raised when the task returns.
        """
        request = self.request
        if request.called_directly:
            raise exc or Retry("Task can be retried")
        refused = [name for name, given in options.items() if given is not None]
        if not is_same_call(self, args, kwargs):
            refused = ["kwargs" if args is None else "args"]
        if refused:
            raise Unsupported(
                f"{self.name}: retry({refused[0]}=…) is not in greenjobs, where a job is retried as it is; enqueue "
                f"another one with apply_async(…), and return"
            ) from exc
        limit = self.max_retries if max_retries is None else max_retries
        if limit is not None and request.retries >= limit:
            if exc is not None:
                raise exc
            raise MaxRetriesExceededError(f"can't retry {self.name}[{request.id}]: it was retried {limit} times")
        if not request.is_eager:
            failures = current_job.retries
            limit_retries(None if limit is None else limit - request.retries + failures)
        when: float | datetime = self.default_retry_delay if countdown is None else countdown
        if eta is not None and countdown is None:
            when = opts.aware(self.app.conf, eta)
        retry = Retry(exc=exc, when=when)
        if throw:
            raise retry
        request.pending_retry = retry
        return retry

    def update_state(self, task_id: str | None = None, state: str | None = None, meta: Any = None, **_: Any) -> None:
        """Say how far the task is: `state` and `meta`, JSON of up to 500 characters, are what AsyncResult sees about a
        second later, and `current` and `total` of meta what `greenjobs jobs show` does. Raises OptionError.
        """
        request = self.request
        if task_id is not None and str(task_id) != request.id:
            raise Unsupported(f"{self.name}: update_state says something of the task that runs, not of others")
        if request.called_directly or request.is_eager:
            return
        try:
            text = json.dumps({"state": state, "meta": meta})
        except (TypeError, ValueError) as error:
            raise OptionError(f"{self.name}: update_state(meta=…) is stored as JSON, and {error}") from None
        if len(text) > LONGEST_MESSAGE:
            raise OptionError(
                f"{self.name}: update_state takes {LONGEST_MESSAGE} characters of JSON, not {len(text)}; keep what is "
                f"longer in a table of your own"
            )
        numbers = meta if isinstance(meta, Mapping) else {}
        current_job.progress(_count(numbers.get("current")) or 0, _count(numbers.get("total")), text)

    def replace(self, *_: Any) -> NoReturn:
        """Not in greenjobs."""
        raise Unsupported(f"{self.name}: replace(…) is not in greenjobs; enqueue the other task, and return")

    def before_start(self, task_id: str | None, args: Any, kwargs: Any) -> None:
        """Called before each attempt; an error fails it."""

    def on_success(self, retval: Any, task_id: str | None, args: Any, kwargs: Any) -> None:
        """Called when the task has returned; an error is logged."""

    def on_failure(self, exc: BaseException, task_id: str | None, args: Any, kwargs: Any, einfo: ExceptionInfo) -> None:
        """Called when the task has failed for good; an error is logged."""

    def on_retry(self, exc: BaseException, task_id: str | None, args: Any, kwargs: Any, einfo: ExceptionInfo) -> None:
        """Called when the task will be run again; an error is logged."""

    def after_return(
        self, status: str, retval: Any, task_id: str | None, args: Any, kwargs: Any, einfo: ExceptionInfo | None
    ) -> None:
        """Called after on_success and on_failure; an error is logged."""

    # --- running ------------------------------------------------------------------------------------------------------

    def perform(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One attempt, in a runner; elsewhere a call as any other."""
        if not current_job:
            return self(*args, **kwargs)
        from greenjobs.contrib.celery.canvas import complete

        headers = current_job.headers
        id = str(current_job.id)
        own = (opts.RETRIES, opts.FOLLOWERS, opts.ROOT, opts.PARENT)
        request = Request(
            id=id,
            task=self.name,
            args=args,
            kwargs=kwargs,
            retries=current_job.retries + int(headers.get(opts.RETRIES, 0)),
            called_directly=False,
            headers={name: value for name, value in headers.items() if name not in own},
            delivery_info={"routing_key": current_job.queue, "priority": current_job.row.priority},
            root_id=headers.get(opts.ROOT, id),
            parent_id=headers.get(opts.PARENT),
        )
        followers = headers.get(opts.FOLLOWERS)
        try:
            return self._trace(request, None if followers is None else functools.partial(complete, self, followers))
        except Reject as error:
            if error.requeue:
                raise Snooze(_REQUEUE_SECONDS, str(error)) from error
            raise

    def _trace(self, request: Request, complete: Callable[[Any], None] | None = None) -> Any:
        with entered(self, request):
            id, args, kwargs = request.id, request.args, request.kwargs
            try:
                self.before_start(id, args, kwargs)
                if type(self).__call__ is Task.__call__:
                    request.is_entered = True
                    value = self.run(*args, **kwargs)
                else:
                    value = self(*args, **kwargs)
                if request.pending_retry is not None:
                    raise request.pending_retry
                if complete is not None:
                    complete(value)
            except Retry as retry:
                self._tell("on_retry", retry.exc or retry, id, args, kwargs, _info(retry.exc or retry))
                raise
            except Exception as error:
                self._tell("on_failure", error, id, args, kwargs, _info(error), after=states.FAILURE)
                raise
            self._tell("on_success", value, id, args, kwargs, after=states.SUCCESS)
            return value

    def _tell(self, hook: str, *given: Any, after: str | None = None) -> None:
        """Call a method of the class of the application's, and after_return with this state."""
        calls = [(hook, given)]
        if after is not None:
            einfo = given[4] if len(given) > 4 else None
            calls.append(("after_return", (after, *given[:4], einfo)))
        for method, arguments in calls:
            try:
                getattr(self, method)(*arguments)
            except Exception:
                logger.exception("%s of the task %s failed, which changes nothing for it", method, self.name)


def refuse(name: str, *, rate_limit: Any, serializer: Any, pydantic: Any) -> None:
    """Raise Unsupported where one of these is said of a task, and cannot be had."""
    if rate_limit is not None:
        raise Unsupported(
            f"{name}: rate_limit is not in greenjobs; give such tasks a queue of their own, and let few of them run at "
            f"a time: queue='slow', and greenjobs run --queue slow:1"
        )
    if serializer not in (None, "json"):
        raise Unsupported(f"{name}: serializer is {serializer!r}, and greenjobs stores JSON; leave it out")
    if pydantic:
        raise Unsupported(f"{name}: pydantic is not in greenjobs; annotate the parameters with dataclasses")


def prepare(task: Task) -> None:
    """Make an instance ready that is to be a task. Raises Unsupported and JobDefinitionError."""
    refuse(task.name, rate_limit=task.rate_limit, serializer=task.serializer, pydantic=task.pydantic)
    if task.autoretry_for:
        retry_by_itself(task)


def _info(error: BaseException) -> ExceptionInfo:
    return ExceptionInfo(error, "".join(traceback.format_exception(type(error), error, error.__traceback__)))


def _count(given: Any) -> float | None:
    return given if isinstance(given, (int, float)) and not isinstance(given, bool) and given >= 0 else None


def _as_list(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
