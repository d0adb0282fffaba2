"""The exceptions of Celery that an application names."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, NoReturn

from greenjobs import control
from greenjobs.errors import DatabaseUnavailable, GreenjobsError, JobHardTimeout, JobTimeout

__all__ = [
    "CeleryError",
    "Ignore",
    "ImproperlyConfigured",
    "MaxRetriesExceededError",
    "NotRegistered",
    "OperationalError",
    "Reject",
    "Retry",
    "SoftTimeLimitExceeded",
    "TaskError",
    "TaskRevokedError",
    "TimeLimitExceeded",
    "TimeoutError",
    "Unsupported",
    "UnsupportedAttribute",
]

SoftTimeLimitExceeded = JobTimeout
TimeLimitExceeded = JobHardTimeout
OperationalError = DatabaseUnavailable


class CeleryError(GreenjobsError):
    """The root of those that are raised here."""


class Unsupported(CeleryError, NotImplementedError):
    """Something of Celery that greenjobs has not, or has under another name; the message says what to write instead."""


class UnsupportedAttribute(Unsupported, AttributeError):
    """An attribute of one of Celery's classes that greenjobs has not; for hasattr() and getattr() it is not there."""


class ImproperlyConfigured(CeleryError):
    """A setting of Celery that cannot be."""


class TaskError(CeleryError):
    """The root of errors about one task."""


class NotRegistered(TaskError, KeyError):
    """No task of that name is declared in this process."""

    __str__ = Exception.__str__  # that of KeyError shows a repr


class MaxRetriesExceededError(TaskError):
    """A task was to be retried once more than `max_retries`."""


class TaskRevokedError(TaskError):
    """A task whose result was asked for was revoked, or expired."""


class TimeoutError(CeleryError, builtins.TimeoutError):
    """A task did not end while somebody waited for its result; it goes on."""


class Retry(control.Retry):
    """What `self.retry()` raises. No Exception here: it passes a task's own `except Exception`."""

    def __init__(
        self,
        message: str | None = None,
        exc: BaseException | None = None,
        when: float | datetime | None = None,
        **_: Any,
    ) -> None:
        after = (when - datetime.now(timezone.utc)) if isinstance(when, datetime) else when
        if isinstance(after, timedelta):
            after = after.total_seconds()
        reason = message or (repr(exc) if exc is not None else "")
        super().__init__(reason, after=None if after is None else max(after, 0.0))
        self.message = message
        self.exc = exc
        self.when = when
        if exc is not None:
            self.__cause__ = exc


class Ignore(control.Discard):
    """Raise it to end the task: it is neither done nor failed."""


class Reject(control.Discard):
    """Raise it to end the task as Ignore does; with `requeue`, to have it run again after a second."""

    def __init__(self, reason: object = None, requeue: bool = False) -> None:
        super().__init__("" if reason is None else str(reason))
        self.reason = reason
        self.requeue = requeue


def no_attribute(of: object, name: str, instead: Mapping[str, str]) -> NoReturn:
    """Raise what is to be said of an attribute that is not there, which may be one of those that Celery has."""
    kind = type(of).__name__
    if name in instead:
        raise UnsupportedAttribute(f"{kind}.{name} is not in greenjobs; {instead[name]}")
    raise AttributeError(f"{kind!r} object has no attribute {name!r}", name=name, obj=of)
