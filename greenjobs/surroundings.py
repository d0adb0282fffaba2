"""What is entered around every attempt, in the job's greenlet and context: an application's context, a tenant, a span.
And what is entered around every enqueue, in whichever process, which may give the jobs headers to carry.

A surrounding is a callable that returns a context manager, such as a generator under contextlib.contextmanager. It is
called for each attempt anew. Those of the whole process come first, then those of the runner, each inside the ones
before it; they end the other way round.

The job's outcome is that of its function. An error on the way in fails the attempt, as if the function had raised it.
An error on the way out is logged, and changes nothing; nor does a context manager that wants to suppress an error. The
way in and the way out count for the job's timeouts.

Around an enqueue it is the other way round: what fails there, on the way in or out, is logged, and the jobs are
enqueued all the same, without its headers. What interrupts the caller there, such as KeyboardInterrupt, goes on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from greenjobs.current import current_job
from greenjobs.errors import ConfigError

logger = logging.getLogger(__name__)

# As much as web servers take in one header; the contexts of traces are some hundred bytes.
_MOST_HEADER_BYTES = 8 * 1024


@dataclass(frozen=True, slots=True)
class Enqueue:
    """Jobs that are about to be enqueued: their type, their queue, and how many they are."""

    job_type: str
    queue: str
    count: int


Surrounding = Callable[[], AbstractContextManager[Any]]
EnqueueSurrounding = Callable[[Enqueue], AbstractContextManager["Mapping[str, str] | None"]]
Entered = tuple[object, AbstractContextManager[Any]]  # with what made it
S = TypeVar("S", bound=Surrounding)
E = TypeVar("E", bound=EnqueueSurrounding)

everywhere: list[Surrounding] = []
"""Those of all runners of this process that are started from now on; see surround."""

around_enqueues: list[EnqueueSurrounding] = []
"""Those of every enqueue in this process; see surround_enqueue."""

of_application: Callable[[], Sequence[Surrounding]] | None = None
"""Set by greenjobs.contrib: what a runner of the application that is active here would have; for greenjobs.testing."""


def surround(make: S) -> S:
    """Enter `make()` around every attempt in the runners of this process. Can be used as a decorator."""
    everywhere.append(checked(make))
    return make


def surround_enqueue(make: E) -> E:
    """Enter `make(enqueue)` around every enqueue in this process. Can be used as a decorator.

    What the context manager yields, a mapping of texts or None, are headers: they are stored with the jobs, which have
    them as `current_job.headers`. They are no secret, and short: what one of those who give some yields is left out as
    a whole where it takes more than 8 kB, or is no text that can be stored.
    """
    if not callable(make):
        raise ConfigError(f"surround_enqueue takes a callable that returns a context manager, not {make!r}")
    around_enqueues.append(make)
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
    entered: list[Entered] = []
    try:
        for make in surroundings:
            surrounding = make()
            surrounding.__enter__()
            entered.append((make, surrounding))
        value = function(*args, **kwargs)
    except BaseException as error:
        _leave_attempt(entered, error)
        raise
    _leave_attempt(entered, None)
    return value


def _leave_attempt(entered: list[Entered], error: BaseException | None) -> None:
    # Also what interrupts the job just then changes nothing: its outcome is decided.
    for make, failure in _leave(entered, error):
        logger.error(
            "job %s (%s): what surrounds it failed at its end, which changes nothing for the job: %r",
            *(current_job.id, current_job.name, make),
            exc_info=failure,
        )


def _leave(entered: list[Entered], error: BaseException | None) -> list[tuple[object, BaseException]]:
    """Leave all of them, whatever happens on the way; returns which failed, and of what."""
    exit_arguments = (None, None, None) if error is None else (type(error), error, error.__traceback__)
    failed: list[tuple[object, BaseException]] = []
    while entered:
        make, surrounding = entered.pop()
        try:
            surrounding.__exit__(*exit_arguments)
        except BaseException as failure:
            if failure is not error:
                failed.append((make, failure))
    return failed


@contextlib.contextmanager
def enqueuing(enqueue: Enqueue) -> Iterator[dict[str, str]]:
    """Inside of all that surrounds an enqueue; yields the headers of all of them, which may be none."""
    headers: dict[str, str] = {}
    entered: list[Entered] = []
    try:
        for make in tuple(around_enqueues):
            try:
                surrounding = make(enqueue)
                given = surrounding.__enter__()
            except Exception as failure:
                _complain(enqueue, make, "at its beginning; the job is enqueued without it", failure)
                continue
            entered.append((make, surrounding))
            try:
                headers.update(_checked_headers(given or {}))
            except Exception as failure:
                _complain(
                    enqueue, make, "to give headers that can be stored; the job is enqueued without them", failure
                )
        yield headers
    except BaseException as error:
        _leave_enqueue(enqueue, entered, error)
        raise
    _leave_enqueue(enqueue, entered, None)


def _checked_headers(given: Mapping[str, str]) -> dict[str, str]:
    headers = dict(given)
    size = 0
    for text in (*headers, *headers.values()):
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"{text!r} is no text that PostgreSQL can store")
        size += len(text.encode())  # raises for what is no Unicode
    if size > _MOST_HEADER_BYTES:
        raise ValueError(f"they take {size:,} bytes, more than {_MOST_HEADER_BYTES:,}")
    return headers


def _leave_enqueue(enqueue: Enqueue, entered: list[Entered], error: BaseException | None) -> None:
    interruption = None
    for make, failure in _leave(entered, error):
        if isinstance(failure, Exception):
            _complain(enqueue, make, "at its end, which changes nothing", failure)
        else:
            interruption = failure
    if interruption is not None:  # which is not for those who surround, but for whoever enqueues
        raise interruption


def _complain(enqueue: Enqueue, make: object, where: str, failure: Exception) -> None:
    logger.error("what surrounds the enqueue of %s failed %s: %r", enqueue.job_type, where, make, exc_info=failure)
