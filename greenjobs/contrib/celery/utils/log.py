"""The loggers of tasks."""

from __future__ import annotations

import logging


def get_task_logger(name: str) -> logging.Logger:
    """The logger of that name. Lines of `current_job.log` carry the id of the job besides."""
    return logging.getLogger(name)


def get_logger(name: str) -> logging.Logger:
    """As get_task_logger."""
    return logging.getLogger(name)
