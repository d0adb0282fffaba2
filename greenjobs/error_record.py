"""What is kept on a job's row of an error that it raised."""

from __future__ import annotations

import traceback
from datetime import datetime, timezone
from typing import Any

from greenjobs.progress import storable

_LONGEST_MESSAGE = 2_000
_LONGEST_TRACEBACK = 8_000


def error_record(error: BaseException, attempt: int, runner_name: str) -> dict[str, Any]:
    """The error as it is kept on the row. PostgreSQL's JSON has no NUL and no lone surrogates; messages may."""
    try:
        summary = traceback.TracebackException.from_exception(error)
        message, trace = str(summary), "".join(summary.format())  # also for errors whose own __str__ fails
    except Exception as failure:  # for example a SyntaxError that does not say where
        message = f"the error cannot be shown: {type(failure).__name__}"
        trace = "".join(traceback.format_tb(error.__traceback__))
    return {
        "at": datetime.now(timezone.utc).isoformat(),
        "attempt": attempt,
        "error": type(error).__qualname__,
        "message": storable(message)[:_LONGEST_MESSAGE],
        "traceback": storable(trace)[-_LONGEST_TRACEBACK:],
        "runner": runner_name,
    }
