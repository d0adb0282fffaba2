"""Celery's names over greenjobs: `from greenjobs.contrib.celery import Celery, shared_task`.

Celery itself is not needed. Tasks are jobs, named as in Celery; brokers and result backends are PostgreSQL. What
differs is on the page docs/from-celery.md. What cannot be had raises `exceptions.Unsupported`, which names the way out.
"""

from __future__ import annotations

from typing import Any

from greenjobs.contrib.celery import exceptions, schedules, states
from greenjobs.contrib.celery.app import Celery, TaskProxy, shared_task
from greenjobs.contrib.celery.app import current_app as _current_app
from greenjobs.contrib.celery.canvas import Signature, chain, chord, group, signature, subtask
from greenjobs.contrib.celery.request import current_task
from greenjobs.contrib.celery.result import AsyncResult, GroupResult
from greenjobs.contrib.celery.task import Task

__all__ = [
    "AsyncResult",
    "Celery",
    "GroupResult",
    "Signature",
    "Task",
    "TaskProxy",
    "chain",
    "chord",
    "current_app",
    "current_task",
    "exceptions",
    "group",
    "schedules",
    "shared_task",
    "signature",
    "states",
    "subtask",
]


class _CurrentApp:
    """The application that counts at the moment."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_current_app(), name)

    def __repr__(self) -> str:
        return repr(_current_app())


current_app = _CurrentApp()
