"""When a task is retried: by itself after certain errors, and never as another call than it was."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from greenjobs.contrib.celery import options as opts
from greenjobs.errors import JobDefinitionError

if TYPE_CHECKING:
    from greenjobs.contrib.celery.task import Task


def retry_by_itself(task: Task) -> None:
    """Have a task retry by itself after errors of `autoretry_for`. Raises JobDefinitionError where that names none."""
    run, retried, passed = task.run, _errors(task, "autoretry_for"), _errors(task, "dont_autoretry_for")

    @functools.wraps(run)
    def retrying(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except passed:
            raise
        except retried as error:
            how = dict(task.retry_kwargs)
            if task.retry_backoff:
                how["countdown"] = _backoff(task)
            raise task.retry(exc=error, **how) from None

    task.run = retrying  # type: ignore[method-assign]


def is_same_call(task: Task, args: Any, kwargs: Any) -> bool:
    """Whether what retry() was given says nothing new, as in retry(args=[order_id]) of the same order.

    By whichever way the arguments came: those of the request are by name, and the application may have passed them by
    position.
    """
    signature, request = inspect.signature(task.job.function), task.request
    try:
        present, *said = (
            signature.bind(*request.args, **request.kwargs),
            signature.bind_partial(*opts.positional(task.name, args)),
            signature.bind_partial(**(kwargs or {})),
        )
    except TypeError:
        return False
    given = {name: value for each in said for name, value in each.arguments.items()}
    present.apply_defaults()
    if args is not None and kwargs is not None:  # that is all of it, and what is left out has its default
        whole = signature.bind_partial()
        whole.arguments.update(given)
        whole.apply_defaults()
        return whole.arguments == present.arguments
    return all(present.arguments[name] == value for name, value in given.items())


def _errors(task: Task, option: str) -> tuple[type[BaseException], ...]:
    given = getattr(task, option)
    errors = tuple(given) if isinstance(given, Iterable) else (given,)
    if isinstance(given, type) or not all(
        isinstance(each, type) and issubclass(each, BaseException) for each in errors
    ):
        raise JobDefinitionError(f"{task.name}: {option} is {given!r}; allowed: classes of errors, as in (OSError,)")
    return errors


def _backoff(task: Task) -> int:
    """Celery's get_exponential_backoff_interval."""
    factor = int(max(1.0, float(task.retry_backoff)))
    countdown = int(min(task.retry_backoff_max, factor * 2**task.request.retries))
    return random.randrange(countdown + 1) if task.retry_jitter else countdown
