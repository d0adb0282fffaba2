"""greenjobs in OpenTelemetry: a span around each enqueue and each attempt, in one trace, and metrics of both.

    GreenjobsInstrumentor().instrument()

Names and attributes are those of the conventions for messaging
(https://opentelemetry.io/docs/specs/semconv/messaging/). Only the API is needed: without an SDK that somebody has set
up, nothing is recorded, and nothing is stored with the jobs.

The outcome of an attempt is decided when its span is no longer the active one; it is ended then. Where the function
runs in another process, the span is there, with the outcome that its error will mean. What never came so far as to have
one, for its process died or its payload does not fit, is given one afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from opentelemetry import context, metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode

from greenjobs import events, surroundings
from greenjobs.current import attempt_here, current_job
from greenjobs.error_record import error_record
from greenjobs.errors import JobControl
from greenjobs.events import AttemptEnded, AttemptStarted
from greenjobs.surroundings import Enqueue
from greenjobs.version import __version__

__all__ = ["GreenjobsInstrumentor"]

logger = logging.getLogger(__name__)

_SYSTEM = {"messaging.system": "greenjobs"}
_PUBLISH = {**_SYSTEM, "messaging.operation.name": "publish", "messaging.operation.type": "send"}
_PROCESS = {**_SYSTEM, "messaging.operation.name": "process", "messaging.operation.type": "process"}

# Those of the conventions are for clients; jobs take, and wait, for longer.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600)

_FAILURES = ("failed", "retried")


class GreenjobsInstrumentor:
    """Turns it on and off, for the whole process; `opentelemetry-instrument` does it by itself.

    All of them are one: `GreenjobsInstrumentor().uninstrument()` undoes what another one did.
    """

    _active: _Telemetry | None = None

    @property
    def is_instrumented_by_opentelemetry(self) -> bool:
        """Whether it is on."""
        return GreenjobsInstrumentor._active is not None

    def instrument(
        self, *, tracer_provider: Any = None, meter_provider: Any = None, continue_traces: bool = True, **_: Any
    ) -> None:
        """Turn it on, with the providers of the process unless others are given; again is harmless.

        A job belongs to the trace in which it was enqueued. With `continue_traces=False` it begins one of its own, with
        a link to the other: for jobs that run hours later, or by the thousand for one request. Call it before a runner
        is started.
        """
        if GreenjobsInstrumentor._active is None:
            telemetry = _Telemetry(tracer_provider, meter_provider, continue_traces=continue_traces)
            surroundings.surround(telemetry.around_attempt)
            surroundings.surround_enqueue(telemetry.around_enqueue)
            events.subscribe(telemetry.attempt_started, AttemptStarted)
            events.subscribe(telemetry.attempt_ended)
            GreenjobsInstrumentor._active = telemetry

    def uninstrument(self, **_: Any) -> None:
        """Turn it off; runners that are at work go on without it."""
        telemetry, GreenjobsInstrumentor._active = GreenjobsInstrumentor._active, None
        if telemetry is not None:
            telemetry.is_on = False
            surroundings.everywhere.remove(telemetry.around_attempt)
            surroundings.around_enqueues.remove(telemetry.around_enqueue)
            events.unsubscribe(telemetry.attempt_started, AttemptStarted)
            events.unsubscribe(telemetry.attempt_ended)


class _Watched:
    """An attempt of this process, from its beginning to its outcome."""

    def __init__(self) -> None:
        self.has_ended = False
        self.span: Span | None = None


# In the context of the job, and in the copy of it that a thread gets which runs the function.
_watched: ContextVar[_Watched] = ContextVar("greenjobs_opentelemetry_watched")


class _Telemetry:
    """The hooks, and the instruments that they use."""

    def __init__(self, tracer_provider: Any, meter_provider: Any, *, continue_traces: bool) -> None:
        self.is_on = True
        self._was_early = not _is_patched()
        self._continues_traces = continue_traces
        self._tracer = trace.get_tracer("greenjobs", __version__, tracer_provider)
        meter = metrics.get_meter("greenjobs", __version__, meter_provider)
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Jobs that were, or should have been, enqueued"
        )
        self._consumed = meter.create_counter("messaging.client.consumed.messages", "{message}", "Attempts of jobs")
        self._enqueue_seconds = _histogram(
            meter.create_histogram, "messaging.client.operation.duration", "How long it took to enqueue"
        )
        self._run_seconds = _histogram(meter.create_histogram, "messaging.process.duration", "How long attempts ran")
        self._wait_seconds = _histogram(
            meter.create_histogram, "greenjobs.wait.duration", "How long attempts waited since they were due"
        )

    @contextlib.contextmanager
    def around_enqueue(self, enqueue: Enqueue) -> Iterator[Mapping[str, str]]:
        """A producer span; its context is what the jobs carry."""
        common = {**_PUBLISH, "messaging.destination.name": enqueue.queue, "greenjobs.job_type": enqueue.job_type}
        of_span: dict[str, str | int] = {**common}
        if enqueue.count > 1:
            of_span["messaging.batch.message_count"] = enqueue.count
        headers: dict[str, str] = {}
        started = time.perf_counter()
        try:
            with self._tracer.start_as_current_span(
                f"publish {enqueue.queue}", kind=SpanKind.PRODUCER, attributes=of_span
            ) as span:
                if span.get_span_context().is_valid:
                    propagate.inject(headers)
                yield headers
        except BaseException as error:
            common["error.type"] = _type_of(error)
            raise
        finally:
            self._sent.add(enqueue.count, common)
            self._enqueue_seconds.record(time.perf_counter() - started, common)

    def attempt_started(self, event: AttemptStarted) -> None:
        """Its outcome will be told in this process."""
        _watched.set(_Watched())
        if self._was_early:
            self._was_early = False
            if _is_patched():
                logger.warning(
                    "OpenTelemetry was set up before gevent's patches, and its threads do not go together with them; "
                    "set OTEL_PYTHON_AUTO_INSTRUMENTATION_EXPERIMENTAL_GEVENT_PATCH=patch_all in the environment, or "
                    "set it up in the application"
                )

    @contextlib.contextmanager
    def around_attempt(self) -> Iterator[None]:
        """A consumer span, which is the active one in the job."""
        if not self.is_on:
            yield
            return
        watched = _watched.get(None)
        span, carried = self._begin()
        token = context.attach(trace.set_span_in_context(span, carried))
        raised: BaseException | None = None
        try:
            yield
        except BaseException as error:
            raised = error
            raise
        finally:
            context.detach(token)
            if watched is None or watched.has_ended or not self.is_on:  # nobody will say what became of it
                _end_unheard(span, raised)
            else:
                watched.span = span

    def _begin(self, start_time: int | None = None) -> tuple[Span, Context]:
        """The span of the job that runs here, and the context that it carries."""
        try:
            return self._started(start_time)
        except Exception:  # such as a sampler, or a propagator, of the application's
            logger.exception("job %s (%s) runs without a span", current_job.id, current_job.name)
            return trace.INVALID_SPAN, Context()

    def _started(self, start_time: int | None) -> tuple[Span, Context]:
        headers = current_job.headers
        # Not the active one: what a surrounding may have begun is not of the job's making.
        carried = propagate.extract(headers, Context()) if headers else Context()
        origin = trace.get_current_span(carried).get_span_context()
        span = self._tracer.start_span(
            f"process {current_job.queue}",
            context=carried if self._continues_traces else _without_span(carried),
            kind=SpanKind.CONSUMER,
            attributes={
                **_PROCESS,
                "messaging.destination.name": current_job.queue,
                "messaging.message.id": str(current_job.id),
                "greenjobs.job_type": current_job.name,
                "greenjobs.attempt": current_job.attempt,
            },
            links=[Link(origin)] if origin.is_valid else None,
            start_time=start_time,
        )
        return span, carried

    def attempt_ended(self, event: AttemptEnded) -> None:
        """End the span with the outcome, and measure."""
        watched = _watched.get(None)
        span = None
        if watched is not None:
            watched.has_ended = True
            span, watched.span = watched.span, None
            if span is None and event.outcome != "expired" and not _was_elsewhere():
                span, _ = self._begin(time.time_ns() - int(event.run_seconds * 1e9))
        if span is not None:
            span.set_attribute("greenjobs.outcome", event.outcome)
            if event.error is not None and event.outcome in _FAILURES:
                _fail(span, event.error)
            span.end()
        common = {
            **_PROCESS,
            "messaging.destination.name": event.queue,
            "greenjobs.job_type": event.job_type,
            "greenjobs.outcome": event.outcome,
        }
        if event.error is not None and event.outcome in _FAILURES:
            common["error.type"] = _type_of(event.error)
        if event.outcome != "expired":  # which was never handed over
            self._consumed.add(1, common)
            self._run_seconds.record(event.run_seconds, common)
        self._wait_seconds.record(event.waited_seconds, common)


def _was_elsewhere() -> bool:
    """Whether the attempt had its span in another process, which has said how it ended."""
    attempt = attempt_here()
    there = None if attempt is None else attempt.elsewhere
    return there is not None and (there.error is None or there.verdict is not None)


def _end_unheard(span: Span, raised: BaseException | None) -> None:
    """End the span of an attempt of whose outcome this process does not hear."""
    attempt = attempt_here()
    abroad = None if attempt is None else attempt.place.abroad
    has_failed = raised is not None and not isinstance(raised, JobControl)
    if abroad is not None:
        outcome = abroad.outcome_of(raised)
        span.set_attribute("greenjobs.outcome", outcome)
        has_failed = outcome in _FAILURES
    if raised is not None and has_failed:
        _fail(span, raised)
    span.end()


def _fail(span: Span, error: BaseException) -> None:
    # Not by record_exception: errors that cannot be shown fail it, and lone surrogates fail exporters.
    record = error_record(error, current_job.attempt, "")
    described = {"type": _type_of(error), "message": record["message"], "stacktrace": record["traceback"]}
    span.add_event("exception", {f"exception.{name}": text for name, text in described.items()})
    span.set_attribute("error.type", _type_of(error))
    span.set_status(StatusCode.ERROR, f"{type(error).__name__}: {record['message']}")


def _type_of(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _without_span(carried: Context) -> Context:
    """The same, baggage included, but for the span."""
    return trace.set_span_in_context(trace.INVALID_SPAN, carried)


def _is_patched() -> bool:
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def _histogram(create: Callable[..., Any], name: str, description: str) -> Any:
    try:
        return create(name, "s", description, explicit_bucket_boundaries_advisory=_BUCKETS)
    except TypeError:  # before 1.30 of the API
        return create(name, "s", description)
