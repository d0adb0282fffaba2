"""What a job declares about its attempts, and what becomes of one that ended with an error. Decides; writes nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from greenjobs import retry
from greenjobs.control import Discard, Retry, Snooze
from greenjobs.errors import (
    JobCancelled,
    JobDefinitionError,
    JobExpired,
    JobHardTimeout,
    JobInterrupted,
    JobLost,
    JobProcessDied,
    JobTimeout,
    OptionError,
    PayloadMismatch,
)
from greenjobs.events import Handler, Outcome
from greenjobs.progress import kept_lines

logger = logging.getLogger(__name__)

# A job that lost its row has it still when its transaction went to another database: not at once again, then.
_LOST_SECONDS = 60.0

LONGEST_TIMEOUT_SECONDS = 366 * 24 * 60 * 60.0

ErrorTypes = type[BaseException] | Iterable[type[BaseException]]

Where = Literal["greenlet", "thread", "process"]
"""Where the function of a job runs."""

_DEFAULT_BACKOFF = retry.exponential()


@dataclass(frozen=True, slots=True)
class Policy:
    """How often, when and after which errors a job is tried again, how long it may run, and who wants to know.

    `retry_on` of None means every error, an empty one none but Retry. Timeouts are in seconds. `keep_log` is how many
    lines of its log are kept. See `declared` for what each may be.
    """

    backoff: retry.Backoff = _DEFAULT_BACKOFF
    retry_on: tuple[type[BaseException], ...] | None = None
    discard_on: tuple[type[BaseException], ...] = ()
    timeout: float | None = None
    hard_timeout: float | None = None
    on_failure: Handler | None = None
    on_discard: Handler | None = None
    keep_log: int = 0
    executor: Where = "greenlet"
    on_blocking: Literal["thread"] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a job: the outcome of its attempt, and in how many seconds there will be another, if any."""

    outcome: Outcome
    retry_in: float | None = None


def declared(
    job_name: str,
    *,
    backoff: object = None,
    retry_on: ErrorTypes | None = None,
    discard_on: ErrorTypes = (),
    timeout: float | timedelta | None = None,
    hard_timeout: float | timedelta | None = None,
    on_failure: Handler | None = None,
    on_discard: Handler | None = None,
    keep_log: bool | int = False,
    executor: Where = "greenlet",
    on_blocking: Literal["thread"] | None = None,
) -> Policy:
    """The policy that these arguments of @job mean. Raises JobDefinitionError, which names the job."""
    try:
        chosen = _DEFAULT_BACKOFF if backoff is None else retry.backoff(backoff)
    except ValueError as error:
        raise JobDefinitionError(f"{job_name}: {error}") from None
    for name, hook in (("on_failure", on_failure), ("on_discard", on_discard)):
        if hook is not None and not callable(hook):
            raise JobDefinitionError(f"{job_name}: {name} is {hook!r}; allowed: a function of an AttemptEnded")
    soft, hard = checked_timeouts(job_name, timeout, hard_timeout, JobDefinitionError)
    _check_where(job_name, executor, on_blocking)
    return Policy(
        backoff=chosen,
        retry_on=None if retry_on is None else _error_types(job_name, "retry_on", retry_on),
        discard_on=_error_types(job_name, "discard_on", discard_on),
        timeout=soft,
        hard_timeout=hard,
        on_failure=on_failure,
        on_discard=on_discard,
        keep_log=kept_lines(job_name, keep_log),
        executor=executor,
        on_blocking=on_blocking,
    )


def _check_where(job_name: str, executor: object, on_blocking: object) -> None:
    if executor not in ("greenlet", "thread", "process"):
        raise JobDefinitionError(
            f'{job_name}: executor is {executor!r}; allowed: "greenlet", which shares the event loop with others, '
            f'"thread" or "process"'
        )
    if on_blocking not in (None, "thread"):
        raise JobDefinitionError(f'{job_name}: on_blocking is {on_blocking!r}; allowed: "thread", or None')
    if on_blocking is not None and executor != "greenlet":
        raise JobDefinitionError(
            f"{job_name}: on_blocking is for jobs that run in a greenlet, and this one runs in a {executor}"
        )


def checked_timeouts(
    job_name: str, timeout: object, hard_timeout: object, error: type[JobDefinitionError | OptionError]
) -> tuple[float | None, float | None]:
    """Both timeouts in seconds; raises `error` for what is none, or when the hard one is not the longer."""
    soft, hard = (
        None if given is None else _timeout_seconds(job_name, name, given, error)
        for name, given in (("timeout", timeout), ("hard_timeout", hard_timeout))
    )
    if soft is not None and hard is not None and hard <= soft:
        raise error(f"{job_name}: hard_timeout is {hard:g} s, not longer than timeout, which is {soft:g} s")
    return soft, hard


def judge(policy: Policy, error: BaseException, *, failures: int, max_retries: int) -> Verdict:
    """What becomes of a job whose attempt ended with this error. `failures` counts this one, if it is one."""
    outcome = outcome_of(policy, error, failures=failures, max_retries=max_retries)
    if isinstance(error, JobLost):
        return Verdict(outcome, _LOST_SECONDS)
    if isinstance(error, Snooze):
        return Verdict(outcome, error.after)
    if outcome != "retried":
        return Verdict(outcome)
    if isinstance(error, Retry) and error.after is not None:
        return Verdict(outcome, error.after)
    return Verdict(outcome, _delay(policy, failures, error))


def outcome_of(policy: Policy, error: BaseException, *, failures: int, max_retries: int) -> Outcome:
    """The same without the time of the next attempt, for which the backoff has to be asked."""
    if isinstance(error, (JobInterrupted, JobLost)):
        return "interrupted"
    if isinstance(error, JobCancelled):
        return "cancelled"
    if isinstance(error, JobExpired):
        return "expired"
    if isinstance(error, Snooze):
        return "snoozed"
    if isinstance(error, (Discard, *policy.discard_on)):
        return "discarded"
    if failures > max_retries or isinstance(error, PayloadMismatch) or not _is_retried(policy, error):
        return "failed"
    return "retried"


def _is_retried(policy: Policy, error: BaseException) -> bool:
    if isinstance(error, Retry) or policy.retry_on is None:
        return True
    # What ran out of time, or died with its process, is tried again though it is not listed, unless nothing at all is.
    return bool(policy.retry_on) and isinstance(error, (*policy.retry_on, JobTimeout, JobHardTimeout, JobProcessDied))


def _delay(policy: Policy, failures: int, error: BaseException) -> float:
    try:
        seconds = float(policy.backoff(failures, error))
        if math.isfinite(seconds) and seconds >= 0:
            return min(seconds, LONGEST_TIMEOUT_SECONDS)
        logger.error("the backoff %r answered %r, no number of seconds; the default is taken", policy.backoff, seconds)
    except Exception:
        logger.exception("the backoff %r failed; the default is taken", policy.backoff)
    return _DEFAULT_BACKOFF(failures, error)


def _error_types(job_name: str, name: str, given: Any) -> tuple[type[BaseException], ...]:
    types = (given,) if isinstance(given, type) else tuple(given)
    for each in types:
        if not (isinstance(each, type) and issubclass(each, BaseException)):
            raise JobDefinitionError(f"{job_name}: {name} has {each!r}; allowed: types of exceptions")
    return types


def _timeout_seconds(job_name: str, name: str, given: object, error: Callable[[str], Exception]) -> float:
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise error(f"{job_name}: {name} is {given!r}; allowed: a number of seconds, or a timedelta")
    if not 0 < seconds <= LONGEST_TIMEOUT_SECONDS:
        raise error(
            f"{job_name}: {name} is {given!r}; allowed: more than 0, up to {LONGEST_TIMEOUT_SECONDS:.0f} seconds"
        )
    return float(seconds)
