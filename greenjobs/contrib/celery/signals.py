"""Celery's signals, which are not here: every name says what takes its place."""

from __future__ import annotations

from typing import NoReturn

_AT_START = "the module that `greenjobs run --app` names, which every process of a runner imports before it runs jobs"
_AT_END = "greenjobs.events.subscribe(…, kind=RunnerEnded)"
_OF_LOGGING = "logging.config.dictConfig(…) in the application, which greenjobs leaves as it is"

_INSTEAD = {
    **dict.fromkeys(("celeryd_init", "worker_init", "worker_process_init", "worker_ready", "beat_init"), _AT_START),
    **dict.fromkeys(("worker_process_shutdown", "worker_shutdown", "worker_shutting_down"), _AT_END),
    **dict.fromkeys(("after_setup_logger", "after_setup_task_logger", "setup_logging"), _OF_LOGGING),
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
