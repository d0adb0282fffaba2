"""Signatures, chains and groups.

A chain is exact: the task that has run, its result, and the next task with that result as its first argument are
committed together. All of its jobs have their ids from the beginning; the later ones wait until then.
"""

from __future__ import annotations

import inspect
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from greenjobs import current
from greenjobs.contrib.celery import options as opts
from greenjobs.contrib.celery.exceptions import Unsupported
from greenjobs.contrib.celery.result import AsyncResult, EagerResult, GroupResult
from greenjobs.current import current_job
from greenjobs.errors import CompletionError
from greenjobs.handle import JobHandle

if TYPE_CHECKING:
    from greenjobs.contrib.celery.task import Task

# How often a task that a runner completes may find that the next one of its chain was revoked at that very moment.
_LOOKS = 3

_NO_CHORD = (
    "chords, which wait for a group, are not in greenjobs: let each task of the group note its end in a table of yours "
    "in `with current_job.transaction()`, and enqueue the last one there when all are noted"
)


class Signature(dict[str, Any]):
    """A call that is not made yet: a dict of plain values, so that it can be stored."""

    def __init__(
        self,
        task: Any = None,
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        immutable: bool = False,
    ) -> None:
        if isinstance(task, Mapping):
            super().__init__(task)
            return
        name = task if isinstance(task, str) else task.name
        super().__init__(
            task=name,
            args=list(opts.positional(name, args)),
            kwargs=dict(kwargs or {}),
            options=dict(options or {}),
            immutable=immutable,
        )

    @property
    def task(self) -> str:
        """The name of the task."""
        return str(self["task"])

    @property
    def name(self) -> str:
        """The same."""
        return self.task

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments by position."""
        return tuple(self["args"])

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(self["kwargs"])

    @property
    def options(self) -> dict[str, Any]:
        """The options of apply_async."""
        return dict(self["options"])

    @property
    def immutable(self) -> bool:
        """Whether it takes no result of another task."""
        return bool(self["immutable"])

    @property
    def type(self) -> Task:
        """The task. Raises NotRegistered."""
        return _task(self.task)

    def __repr__(self) -> str:
        given = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        return f"{self.task}({', '.join(given)})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the task here and now."""
        args, kwargs, _ = self._merged(args, kwargs)
        return self.type(*args, **kwargs)

    def __or__(self, other: Any) -> Any:
        return chain(self, other)

    def clone(self, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> Signature:
        """The same call, with these arguments before its own."""
        merged_args, merged_kwargs, merged_options = self._merged(tuple(args), kwargs or {}, options)
        return Signature(self.task, merged_args, merged_kwargs, merged_options, self.immutable)

    def set(self, immutable: bool | None = None, **options: Any) -> Signature:
        """Set options; returns itself."""
        if immutable is not None:
            self["immutable"] = immutable
        self["options"] = {**self.options, **options}
        return self

    def link(self, callback: Any) -> Any:
        """Have this call follow, with the result of this one as its first argument; returns it."""
        self.set(link=[*_as_list(self.options.get("link")), callback])
        return callback

    def link_error(self, *_: Any) -> NoReturn:
        """Not in greenjobs."""
        raise Unsupported(f"{self.task}: link_error is not in greenjobs; define on_failure on the task")

    on_error = link_error

    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult | EagerResult:
        """Enqueue it, with these arguments before its own."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult | EagerResult:
        """Enqueue it, with these arguments before its own, and these options."""
        merged_args, merged_kwargs, merged = self._merged(opts.positional(self.task, args), kwargs or {}, options)
        return self.type.apply_async(merged_args, merged_kwargs, **merged)

    def apply(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> EagerResult:
        """Run it here and now."""
        merged_args, merged_kwargs, merged = self._merged(opts.positional(self.task, args), kwargs or {}, options)
        return self.type.apply(merged_args, merged_kwargs, **merged)

    def _merged(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        merged = {**self.options, **(options or {})}
        if self.immutable:
            return self.args, self.kwargs, merged
        return (*args, *self.args), {**self.kwargs, **kwargs}, merged


class chain:
    """Calls one after the other, each with the result of the one before as its first argument."""

    def __new__(cls, *tasks: Any) -> Any:
        tasks = _flattened(tasks)
        if len(tasks) == 1 and cls is chain:
            return tasks[0]
        self = super().__new__(cls)
        self.tasks = tasks
        return self

    tasks: tuple[Signature, ...]

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.tasks))

    def __or__(self, other: Any) -> Any:
        return chain(*self.tasks, other)

    def __call__(self, *args: Any, **kwargs: Any) -> AsyncResult | EagerResult:
        return self.apply_async(args, kwargs)

    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult | EagerResult:
        """Enqueue all, with these arguments before those of the first."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult | EagerResult:
        """Enqueue all; the options are those of the first. Returns the result of the last, whose `parent` is the one
        before. Raises TypeError and PayloadError for arguments that do not fit or cannot be carried."""
        if not self.tasks:
            raise ValueError("a chain without tasks cannot be enqueued, and has no result")
        first, *rest = self.tasks
        steps = [_step(each) for each in rest]
        opts.as_json(first.type, steps)  # before anything is enqueued
        if first.type.app.conf.task_always_eager:
            return self.apply(args, kwargs)
        if current.stage is not None and current.stage.runs_at_once:  # in a test
            return self._run_inline(args, kwargs, options)
        merged_args, merged_kwargs, merged = first._merged(opts.positional(first.task, args), kwargs or {}, options)
        connection, independent = merged.get("connection"), bool(merged.get("independent"))
        key = uuid.uuid4().hex
        parked = []
        for number, (signature, step) in enumerate(zip(rest, steps, strict=True), 2):
            step["key"] = f"chain-{key}-{number}"
            parked.append(signature.type.job.park(step["key"], connection=connection, independent=independent))
            step["id"] = parked[-1].id
        headers = {opts.FOLLOWERS: opts.as_json(first.type, [steps])}
        handle = first.type._enqueue(merged_args, merged_kwargs, merged, headers=headers)
        result: AsyncResult | None = None
        for each, enqueued in zip(self.tasks, (handle, *parked), strict=True):
            result = AsyncResult(enqueued, app=each.type.app, parent=result)
        assert result is not None
        return result

    def _run_inline(
        self, args: Iterable[Any] | None, kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]
    ) -> AsyncResult | EagerResult:
        first, *rest = self.tasks
        result = first.apply_async(args, kwargs, **options)
        for each in rest:
            if not result.successful():
                break
            parent, result = result, each.apply_async((result.result,))
            result.parent = parent
        return result

    def apply(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> EagerResult:
        """Run all here and now, until one fails."""
        first, *rest = self.tasks
        result = first.apply(args, kwargs, **options)
        for each in rest:
            if not result.successful():
                break
            result = each.apply((result.result,))
        return result


class group:
    """Calls beside each other."""

    def __init__(self, *tasks: Any) -> None:
        if len(tasks) == 1 and not isinstance(tasks[0], (Signature, chain, group)):
            tasks = tuple(tasks[0])
        for each in tasks:
            if not isinstance(each, (Signature, chain)):
                raise Unsupported(f"group has {each!r}; allowed: signatures and chains, such as task.s(1)")
        self.tasks: tuple[Any, ...] = tasks

    def __repr__(self) -> str:
        return f"group({list(self.tasks)!r})"

    def __len__(self) -> int:
        return len(self.tasks)

    def __or__(self, other: Any) -> NoReturn:
        raise Unsupported(f"{self!r} | {other!r} is a chord; {_NO_CHORD}")

    def __call__(self, *args: Any, **kwargs: Any) -> GroupResult:
        return self.apply_async(args, kwargs)

    def delay(self, *args: Any, **kwargs: Any) -> GroupResult:
        """Enqueue all, with these arguments before those of each."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> GroupResult:
        """Enqueue all, each with these options."""
        return GroupResult(results=[each.apply_async(args, kwargs, **options) for each in self.tasks])

    def apply(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> GroupResult:
        """Run all here and now."""
        return GroupResult(results=[each.apply(args, kwargs, **options) for each in self.tasks])


def chord(*_: Any, **__: Any) -> NoReturn:
    """Not in greenjobs. Raises Unsupported."""
    raise Unsupported(_NO_CHORD)


def signature(
    varies: Any, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Signature:
    """A call that is not made yet, of a task, its name, or the dict that a signature is."""
    if isinstance(varies, Mapping):
        return Signature(varies)
    immutable = bool(options.pop("immutable", False))
    options.pop("app", None)
    given = {**dict(options.pop("options", None) or {}), **options}
    return Signature(varies, args, kwargs, given, immutable)


subtask = signature


# --- what follows -----------------------------------------------------------------------------------------------------


class _Revoked(Exception):
    """The next task of a chain was there a moment ago."""


def followers_of(task: Task, link: Any, rest: str | None) -> str | None:
    """The header of a call that these calls follow, beside what is left of its chain. Raises as chain.apply_async."""
    branches = [[_step(each) for each in _flattened([callback])] for callback in _as_list(link)]
    branches += json.loads(rest) if rest is not None else []
    return opts.as_json(task, branches) if branches else None


def complete(task: Task, followers: str, value: Any) -> None:
    """Complete the job that runs here, and enqueue what follows it, in one transaction."""
    for _ in range(_LOOKS):
        try:
            with current_job.transaction(result=value):
                for steps in json.loads(followers):
                    _go_on(steps, value)
            return
        except _Revoked:
            continue
    raise CompletionError(f"{task.name}: the next task of its chain comes and goes; {followers}")


def _go_on(steps: Sequence[Mapping[str, Any]], value: Any) -> None:
    step, *rest = steps
    job_options: dict[str, Any] = {}
    if "id" in step:
        if JobHandle(step["id"], "").status() != "scheduled":  # revoked, and with it what is left of the chain
            return
        job_options = {"unique_key": step["key"], "on_conflict": "replace"}
    following = Signature(step)
    args, kwargs, options = following._merged((value,), {})
    headers = {opts.FOLLOWERS: opts.as_json(following.type, [rest])} if rest else {}
    handle = following.type._enqueue(args, kwargs, options, headers=headers, **job_options)
    if "id" in step and handle.action != "replaced":
        raise _Revoked


def _step(call: Signature) -> dict[str, Any]:
    """The call as a header carries it. Raises TypeError and OptionError when it cannot be made."""
    task = call.type
    _check_arguments(task, call)
    opts.job_options(task, {name: call.options[name] for name in call.options.keys() - opts.TASKS_OWN}, keep=0.0)
    return {"task": task.name, **{name: call[name] for name in ("args", "kwargs", "options", "immutable")}}


def _check_arguments(task: Task, call: Signature) -> None:
    args = call.args if call.immutable else (None, *call.args)
    try:
        inspect.signature(task.job.function).bind(*args, **call.kwargs)
    except TypeError as error:
        raise TypeError(f"{call!r} cannot follow another task, whose result comes first: {error}") from None


def _flattened(tasks: Iterable[Any]) -> tuple[Signature, ...]:
    def each(tasks: Iterable[Any]) -> Iterator[Signature]:
        for task in tasks:
            if isinstance(task, chain):
                yield from task.tasks
            elif isinstance(task, group):
                raise Unsupported(f"{task!r} is part of a chain, which takes single tasks; {_NO_CHORD}")
            elif isinstance(task, Signature):
                yield task
            elif isinstance(task, Mapping):
                yield Signature(task)
            elif isinstance(task, Iterable) and not isinstance(task, str):
                yield from each(task)
            else:
                raise Unsupported(f"a chain has {task!r}; allowed: signatures, such as task.s(1)")

    return tuple(each(tasks))


def _task(name: str) -> Task:
    from greenjobs.contrib.celery.app import find_task

    return find_task(name)


def _as_list(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
