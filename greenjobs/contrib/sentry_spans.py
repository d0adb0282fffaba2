"""The spans of enqueues and attempts, by the conventions of Sentry's module for queues.

Sentry has two kinds: transactions, and, with `trace_lifecycle="stream"`, spans that are sent one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import sentry_sdk

from greenjobs.current import current_job
from greenjobs.surroundings import Enqueue

_ORIGIN = "auto.queue.greenjobs"


class JobSpan:
    """The span of an attempt, which is the active one until it is ended."""

    def __init__(self, span: Any, *, is_streamed: bool) -> None:
        self._span = span
        self._is_streamed = is_streamed

    def end(self, status: str) -> None:
        """End it with this status, and have it sent."""
        if self._is_streamed:
            self._span.status = "error" if status == "internal_error" else "ok"
        else:
            self._span.set_status(status)
        self._span.__exit__(None, None, None)


def begin(headers: Mapping[str, str], *, waited_seconds: float | None) -> JobSpan:
    """Begin the span of the job that runs here, in the trace that these headers tell of, or in one of its own."""
    data = {
        "messaging.system": "greenjobs",
        "messaging.message.id": str(current_job.id),
        "messaging.destination.name": current_job.queue,
        "messaging.message.retry.count": current_job.attempt - 1,
    }
    if waited_seconds is not None:
        data["messaging.message.receive.latency"] = round(waited_seconds * 1000, 3)  # ms, says Sentry
    if _streams():
        return JobSpan(_begin_streamed(headers, data), is_streamed=True)
    transaction = sentry_sdk.continue_trace(
        dict(headers), op="queue.process", name=current_job.name, source="task", origin=_ORIGIN
    )
    sampling_context = {
        "greenjobs_job": {"job_type": current_job.name, "queue": current_job.queue, "attempt": current_job.attempt}
    }
    started = sentry_sdk.start_transaction(transaction, custom_sampling_context=sampling_context)
    for name, value in data.items():
        started.set_data(name, value)
    started.__enter__()
    return JobSpan(started, is_streamed=False)


def _begin_streamed(headers: Mapping[str, str], data: Mapping[str, Any]) -> Any:
    sentry_sdk.traces.continue_trace(dict(headers))
    attributes = {"sentry.op": "queue.process", "sentry.origin": _ORIGIN, "sentry.segment.name.source": "task", **data}
    return sentry_sdk.traces.start_span(name=current_job.name, attributes=attributes, parent_span=None)


@contextlib.contextmanager
def publishing(enqueue: Enqueue) -> Iterator[None]:
    """A span around an enqueue, inside the active one."""
    data: dict[str, Any] = {"messaging.system": "greenjobs", "messaging.destination.name": enqueue.queue}
    if enqueue.count > 1:
        data["messaging.batch.message_count"] = enqueue.count
    # Outside of a transaction a span would go nowhere, and would hide the trace that there is all the same.
    span: AbstractContextManager[Any] = contextlib.nullcontext()
    if not _streams():
        if sentry_sdk.get_current_span() is not None:
            plain = sentry_sdk.start_span(op="queue.publish", name=enqueue.job_type, origin=_ORIGIN)
            for name, value in data.items():
                plain.set_data(name, value)
            span = plain
    elif sentry_sdk.traces.get_current_span() is not None:
        attributes = {"sentry.op": "queue.publish", "sentry.origin": _ORIGIN, **data}
        span = sentry_sdk.traces.start_span(name=enqueue.job_type, attributes=attributes)
    with span:
        yield


def _streams() -> bool:
    options = sentry_sdk.get_client().options
    chosen = options.get("trace_lifecycle") or (options.get("_experiments") or {}).get("trace_lifecycle")
    return bool(chosen == "stream")
