"""Enqueued jobs as a test looks at them: their arguments by name, as the job would get them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import orjson

from greenjobs import config
from greenjobs.errors import OptionError, PayloadError, PayloadMismatch, UnknownJob
from greenjobs.job import Job, find_job

_LONGEST_VALUE = 200


@dataclass(frozen=True, slots=True)
class EnqueuedJob:
    """A job that was enqueued. `args` are the arguments that were passed, by name, as the job will get them.

    `options` are what the call said otherwise than the job: `max_retries`, `timeout`, `hard_timeout`, `keep`.
    """

    id: int
    job_type: str
    args: Mapping[str, Any]
    queue: str | None
    priority: int
    run_at: datetime
    state: Literal["available", "scheduled"]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"queue {self.queue!r}" if self.queue is not None else "no queue"]
        told += [f"priority {self.priority}"] if self.priority else []
        told += [f"run_at {self.run_at.isoformat(' ', 'seconds')}"] if self.state == "scheduled" else []
        told += [f"{name} {value}" for name, value in self.options.items()]
        return f"{describe_call(self.job_type, self.args)}  {', '.join(told)}"


def options_of_call(job: Job[..., Any] | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the row says that the call said; for how long the job is kept is there always."""
    declared = {} if job is None else {"keep": job.keep}
    return {name: value for name, value in (options or {}).items() if declared.get(name) != value}


def describe_call(job_type: str, args: Mapping[str, Any]) -> str:
    """The call as it is written in Python."""
    return f"{job_type}({', '.join(f'{name}={_shortened(repr(value))}' for name, value in args.items())})"


def readable_arguments(job: Job[..., Any] | None, data: str) -> dict[str, Any]:
    """The arguments by name, as the job gets them; as they are stored, where no job is known or they do not fit it."""
    try:
        if job is not None:
            args, kwargs = job.codec.decode(data)
            return _by_name(job, inspect.signature(job.function).bind(*args, **kwargs))
    except PayloadMismatch:
        pass
    stored = orjson.loads(data)
    return stored if isinstance(stored, dict) else {"data": stored}


def expected_arguments(job: Job[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a test expects, by name; they need not be all. Raises TypeError when the job takes no such."""
    if job is not None:
        try:
            return _by_name(job, inspect.signature(job.function).bind_partial(*args, **kwargs))
        except TypeError as error:
            raise TypeError(f"{job.function.__name__}() {error}") from None
    if args:
        raise TypeError("arguments of a job that is not declared here are expected by name")
    return kwargs


def fits(job: Job[..., Any] | None, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether a call had these arguments, perhaps among others; one that was not passed has its default."""
    return all(_fits(job, actual, name, value) for name, value in expected.items())


def known_job(job: Job[..., Any] | str) -> Job[..., Any] | None:
    """The job, also by its name; None where no job has it in this process."""
    if isinstance(job, Job):
        return job
    if not isinstance(job, str):
        raise OptionError(f"the job is {job!r}; allowed: a function with @job, or the name of a job")
    try:
        return find_job(job)
    except UnknownJob:
        return None


def require_no_clash(job: Job[..., Any] | None, options: Iterable[str]) -> None:
    """Raise OptionError when the job has a parameter of the name of an option that was given."""
    for name in options:
        if job is not None and name in job.codec.parameters:
            raise OptionError(
                f"{job.name} has a parameter {name!r}, and {name} is an option here: "
                f"pass that argument as arguments={{{name!r}: …}}, and leave the option out"
            )


def _fits(job: Job[..., Any] | None, actual: Mapping[str, Any], name: str, expected: Any) -> bool:
    if name not in actual:
        parameter = inspect.signature(job.function).parameters.get(name) if job is not None else None
        return parameter is not None and parameter.default is not parameter.empty and parameter.default == expected
    return bool(expected == actual[name]) or bool(_as_received(job, actual, name, expected) == actual[name])


def _as_received(job: Job[..., Any] | None, actual: Mapping[str, Any], name: str, expected: Any) -> Any:
    """What the job would get for this argument: a tuple that is not annotated arrives as a list."""
    if job is None:
        return expected
    bound = inspect.signature(job.function).bind_partial()
    for parameter in inspect.signature(job.function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            others = {each: value for each, value in actual.items() if each not in job.codec.parameters}
            bound.arguments[parameter.name] = {**others, **({name: expected} if name in others else {})}
        elif parameter.name in actual:
            bound.arguments[parameter.name] = expected if parameter.name == name else actual[parameter.name]
    try:
        data = job.codec.encode(bound.args, bound.kwargs, max_bytes=config.current().max_payload_bytes)
    except (PayloadError, TypeError):  # such as an object that compares itself, which nobody could store
        return expected
    return readable_arguments(job, data).get(name, expected)


def _by_name(job: Job[..., Any], bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments in the order of the signature, those of **extra among them."""
    result: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            result.update(value)
        else:
            result[name] = value
    return result


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
