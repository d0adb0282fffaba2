"""What is entered around every attempt, in the job's greenlet and context: an application's context, a tenant, a span.

A surrounding is a callable that returns a context manager, such as a generator under contextlib.contextmanager. It is
called for each attempt anew. Those of the whole process come first, then those of the runner, each inside the ones
before it; they end the other way round.

The job's outcome is that of its function. An error on the way in fails the attempt, as if the function had raised it.
An error on the way out is logged, and changes nothing; nor does a context manager that wants to suppress an error. The
way in and the way out count for the job's timeouts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from greenjobs.current import current_job
from greenjobs.errors import ConfigError

logger = logging.getLogger(__name__)

Surrounding = Callable[[], AbstractContextManager[Any]]
S = TypeVar("S", bound=Surrounding)

everywhere: list[Surrounding] = []
"""Those of all runners of this process that are started from now on; see surround."""


def surround(make: S) -> S:
    """Enter `make()` around every attempt in the runners of this process. Can be used as a decorator."""
    everywhere.append(checked(make))
    return make


def checked(make: S) -> S:
    """The same, if it can be called; raises ConfigError."""
    if not callable(make):
        raise ConfigError(f"surround takes a callable that returns a context manager, not {make!r}")
    return make


def call_within(
    surroundings: Sequence[Surrounding],
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call the function inside all of them; returns what it returns, raises what it raises."""
    entered: list[tuple[Surrounding, AbstractContextManager[Any]]] = []
    try:
        for make in surroundings:
            surrounding = make()
            surrounding.__enter__()
            entered.append((make, surrounding))
        value = function(*args, **kwargs)
    except BaseException as error:
        _leave(entered, error)
        raise
    _leave(entered, None)
    return value


def _leave(entered: list[tuple[Surrounding, AbstractContextManager[Any]]], error: BaseException | None) -> None:
    exit_arguments = (None, None, None) if error is None else (type(error), error, error.__traceback__)
    while entered:
        make, surrounding = entered.pop()
        try:
            surrounding.__exit__(*exit_arguments)
        # Also what interrupts the job just then: its outcome is decided, and the others have to end, too.
        except BaseException as failure:
            if failure is not error:
                logger.exception(
                    "job %s (%s): what surrounds it failed at its end, which changes nothing for the job: %r",
                    *(current_job.id, current_job.name, make),
                )
