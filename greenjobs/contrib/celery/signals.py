"""Celery's signals, which are not here: every name says what takes its place."""

from __future__ import annotations

from typing import NoReturn

_INSTEAD = {
    "task_prerun": "greenjobs.surroundings.surround, which is entered around every attempt",
    "task_postrun": "greenjobs.surroundings.surround, which is entered around every attempt",
    "before_task_publish": "greenjobs.surroundings.surround_enqueue",
    "after_task_publish": "greenjobs.events.subscribe(…, kind=JobsEnqueued)",
}


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):
        raise AttributeError(name)
    instead = _INSTEAD.get(
        name, "greenjobs.events.subscribe, or the methods on_failure, on_retry and on_success of Task"
    )
    raise ImportError(f"Celery's signal {name} is not in greenjobs; use {instead}")
