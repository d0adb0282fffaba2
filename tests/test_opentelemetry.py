"""OpenTelemetry: real spans and metrics, kept in memory, of jobs in the test process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gevent
import pytest
import running
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler, SamplingResult
from opentelemetry.trace import SpanKind, StatusCode

from greenjobs import Discard, current_job, events, job, schedules, surroundings
from greenjobs.contrib.opentelemetry import GreenjobsInstrumentor
from greenjobs.errors import SchemaError


class Telemetry:
    """What was recorded."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meter_provider = MeterProvider([self._reader])
        self.tracer = self.tracer_provider.get_tracer("test")

    def spans(self, kind: SpanKind | None = None) -> list[ReadableSpan]:
        """Those that have ended, in the order in which they did."""
        return [span for span in self._exporter.get_finished_spans() if kind in (None, span.kind)]

    def consumed(self) -> list[ReadableSpan]:
        return self.spans(SpanKind.CONSUMER)

    def points(self, metric: str) -> list[tuple[dict[str, Any], Any]]:
        """The attributes and the value, or the count, of each point of a metric."""
        data = self._reader.get_metrics_data()
        return [
            (dict(point.attributes or {}), getattr(point, "value", None) or getattr(point, "count", None))
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for each in scope.metrics
            if each.name == metric
            for point in each.data.data_points
        ]

    def shutdown(self) -> None:
        self.tracer_provider.shutdown()
        self.meter_provider.shutdown()


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url, max_retries=0) as database:
        yield database


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    made = Telemetry()
    GreenjobsInstrumentor().instrument(tracer_provider=made.tracer_provider, meter_provider=made.meter_provider)
    yield made
    GreenjobsInstrumentor().uninstrument()
    made.shutdown()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_job_is_in_the_trace_of_its_enqueue(database: running.Database, telemetry: Telemetry) -> None:
    @job
    def work() -> None: ...

    with telemetry.tracer.start_as_current_span("request") as request:
        work.delay()
    running.work_off(work)
    (published,) = telemetry.spans(SpanKind.PRODUCER)
    (processed,) = telemetry.consumed()
    assert published.parent == request.get_span_context()
    assert processed.parent is not None and processed.parent.span_id == published.context.span_id
    assert processed.context.trace_id == request.get_span_context().trace_id
    assert [link.context.span_id for link in processed.links] == [published.context.span_id]


def test_spans_are_named_and_described_by_the_conventions_for_messaging(
    database: running.Database, telemetry: Telemetry
) -> None:
    @job(queue="emails")
    def work() -> None: ...

    handle = work.delay()
    running.work_off(work)
    (published,) = telemetry.spans(SpanKind.PRODUCER)
    (processed,) = telemetry.consumed()
    common = {
        "messaging.system": "greenjobs",
        "messaging.destination.name": "emails",
        "greenjobs.job_type": "work",
    }
    assert published.name == "publish emails"
    assert attributes(published) == common | {
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
    }
    assert processed.name == "process emails"
    assert attributes(processed) == common | {
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.message.id": str(handle.id),
        "greenjobs.attempt": 1,
        "greenjobs.outcome": "done",
    }
    assert processed.status.status_code == StatusCode.UNSET


def test_many_calls_are_one_span_which_counts_them(database: running.Database, telemetry: Telemetry) -> None:
    @job
    def work() -> None: ...

    work.delay_many([()] * 3)
    running.work_off(work)
    (published,) = telemetry.spans(SpanKind.PRODUCER)
    assert attributes(published)["messaging.batch.message_count"] == 3
    parents = {span.parent.span_id for span in telemetry.consumed() if span.parent is not None}
    assert parents == {published.context.span_id} and len(telemetry.consumed()) == 3


def test_none_of_a_hundred_jobs_at_once_has_a_span_of_another(database: running.Database, telemetry: Telemetry) -> None:
    expected: dict[str, int] = {}

    @job
    def work(number: int) -> None:
        before = trace.get_current_span().get_span_context()
        with telemetry.tracer.start_as_current_span("inside", attributes={"job": current_job.id}):
            gevent.sleep(0.001 * (number % 7))
        assert trace.get_current_span().get_span_context() == before

    for number in range(100):
        with telemetry.tracer.start_as_current_span("request") as request:
            handle = work.delay(number)
            expected[str(handle.id)] = request.get_span_context().trace_id
    running.work_off(work, pool=100)
    processed = {str(attributes(span)["messaging.message.id"]): span for span in telemetry.consumed()}
    assert {id: span.context.trace_id for id, span in processed.items()} == expected
    inside = [span for span in telemetry.spans() if span.name == "inside"]
    assert len(inside) == 100
    for span in inside:
        assert span.parent == processed[str(attributes(span)["job"])].context
    assert {attributes(span)["greenjobs.outcome"] for span in processed.values()} == {"done"}


def test_failure_is_an_error_with_its_exception_and_retries_are_marked(
    database: running.Database, telemetry: Telemetry
) -> None:
    @job(max_retries=1, backoff=0.0)
    def fail() -> None:
        raise LookupError(f"attempt {current_job.attempt}")

    fail.delay()
    running.work_off(fail)
    first, second = telemetry.consumed()
    assert [attributes(span)["greenjobs.outcome"] for span in (first, second)] == ["retried", "failed"]
    assert [attributes(span)["greenjobs.attempt"] for span in (first, second)] == [1, 2]
    for span in (first, second):
        assert span.status.status_code == StatusCode.ERROR
        assert attributes(span)["error.type"] == "LookupError"
        (event,) = span.events
        assert dict(event.attributes or {})["exception.type"] == "LookupError"


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("error", [Unspeakable(), ValueError("cut in two: \ud83d")], ids=["unspeakable", "surrogate"])
def test_error_that_cannot_be_told_as_it_is_has_its_span_and_is_counted(
    error: Exception, database: running.Database, telemetry: Telemetry
) -> None:
    @job
    def fail() -> None:
        raise error

    fail.delay()
    running.work_off(fail)
    (span,) = telemetry.consumed()
    assert span.status.status_code == StatusCode.ERROR
    texts = [span.status.description, *(each for event in span.events for each in (event.attributes or {}).values())]
    assert len(texts) == 4 and all(str(text).encode() for text in texts)
    assert [count for _, count in telemetry.points("messaging.client.consumed.messages")] == [1]


def test_attempt_that_did_not_reach_its_function_has_a_span(database: running.Database, telemetry: Telemetry) -> None:
    @job
    def work(number: int) -> None: ...

    @job(executor="thread")
    def work_in_thread(number: int) -> None: ...

    for job_type in ("work", "work_in_thread"):
        database.rows("INSERT INTO background_jobs (job_type, data) VALUES (%s, '{}')", job_type)
    running.work_off(work, work_in_thread)
    assert [attributes(span)["error.type"] for span in telemetry.consumed()] == ["greenjobs.errors.PayloadMismatch"] * 2
    assert {attributes(span)["greenjobs.outcome"] for span in telemetry.consumed()} == {"failed"}


def test_what_a_job_raises_to_say_how_it_ends_is_no_error(database: running.Database, telemetry: Telemetry) -> None:
    @job
    def drop() -> None:
        raise Discard("of no use")

    drop.delay()
    running.work_off(drop)
    (span,) = telemetry.consumed()
    assert span.status.status_code == StatusCode.UNSET and not span.events
    assert attributes(span)["greenjobs.outcome"] == "discarded" and "error.type" not in attributes(span)


def test_baggage_comes_along(database: running.Database, telemetry: Telemetry) -> None:
    seen = []

    @job
    def work() -> None:
        seen.append(baggage.get_baggage("tenant"))

    token = context.attach(baggage.set_baggage("tenant", "green"))
    work.delay()
    context.detach(token)
    running.work_off(work)
    assert seen == ["green"]


def test_job_begins_a_trace_of_its_own_with_a_link_where_that_is_asked_for(database: running.Database) -> None:
    telemetry = Telemetry()
    GreenjobsInstrumentor().instrument(tracer_provider=telemetry.tracer_provider, continue_traces=False)
    try:

        @job
        def work() -> None: ...

        work.delay()
        running.work_off(work)
    finally:
        GreenjobsInstrumentor().uninstrument()
        telemetry.shutdown()
    published, processed = telemetry.spans()
    assert processed.parent is None and processed.context.trace_id != published.context.trace_id
    assert [link.context.span_id for link in processed.links] == [published.context.span_id]


def test_each_tick_of_a_schedule_has_a_trace_of_its_own(database: running.Database, telemetry: Telemetry) -> None:
    seen: list[Any] = []

    @job
    def work() -> None:
        seen.append(current_job.schedule)

    schedules.add(work, name="often", cron="* * * * *", timezone="Europe/Paris", catch_up="all")
    database.rows("UPDATE background_schedules SET next_tick_at = now() - interval '3 minutes'")
    running.work_off(work)
    traces = [span.context.trace_id for span in telemetry.consumed()]
    assert len(traces) == len(set(traces)) >= 3
    assert seen[0] == {"name": "often", "cron": "* * * * *", "timezone": "Europe/Paris"}


def test_metrics_count_and_time_enqueues_and_attempts(database: running.Database, telemetry: Telemetry) -> None:
    @job
    def work(fails: bool) -> None:
        if fails:
            raise LookupError

    work.delay_many([(True,), (False,), (False,)])
    running.work_off(work)
    common = {"messaging.system": "greenjobs", "messaging.destination.name": "default", "greenjobs.job_type": "work"}
    publish = common | {"messaging.operation.name": "publish", "messaging.operation.type": "send"}
    process = common | {"messaging.operation.name": "process", "messaging.operation.type": "process"}
    assert telemetry.points("messaging.client.sent.messages") == [(publish, 3)]
    assert telemetry.points("messaging.client.operation.duration") == [(publish, 1)]
    done = process | {"greenjobs.outcome": "done"}
    failed = process | {"greenjobs.outcome": "failed", "error.type": "LookupError"}
    for metric in ("messaging.client.consumed.messages", "messaging.process.duration", "greenjobs.wait.duration"):
        points = telemetry.points(metric)
        assert (done, 2) in points and (failed, 1) in points and len(points) == 2


def test_enqueue_that_fails_is_an_error_of_its_span(empty_database_url: str, telemetry: Telemetry) -> None:
    with running.application(empty_database_url):

        @job
        def work() -> None: ...

        with pytest.raises(SchemaError):
            work.delay()
    (span,) = telemetry.spans(SpanKind.PRODUCER)
    assert span.status.status_code == StatusCode.ERROR
    ((point, _),) = telemetry.points("messaging.client.sent.messages")
    assert point["error.type"] == "greenjobs.errors.SchemaError"


def test_without_an_sdk_nothing_is_stored_and_jobs_run(database: running.Database) -> None:
    ran = []

    @job
    def work() -> None:
        ran.append(current_job.headers)

    GreenjobsInstrumentor().instrument()
    try:
        handle = work.delay()
        assert database.value("SELECT options IS NULL FROM background_jobs WHERE id = %s", handle.id)
        running.work_off(work)
    finally:
        GreenjobsInstrumentor().uninstrument()
    assert ran == [{}]


def test_sampler_that_fails_fails_no_job(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Sampler):
        def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
            raise LookupError("no decision")

        def get_description(self) -> str:
            return "broken"

    ran = []

    @job
    def work() -> None:
        ran.append(current_job.id)

    provider = TracerProvider(sampler=Broken())
    GreenjobsInstrumentor().instrument(tracer_provider=provider)
    try:
        handle = work.delay()
        running.work_off(work)
    finally:
        GreenjobsInstrumentor().uninstrument()
        provider.shutdown()
    assert ran == [handle.id] and database.count() == 0
    assert f"job {handle.id} (work) runs without a span" in caplog.text


def test_uninstrument_leaves_nothing_behind() -> None:
    before = (list(surroundings.everywhere), list(surroundings.around_enqueues), list(events.handlers))
    instrumentor = GreenjobsInstrumentor()
    instrumentor.instrument()
    instrumentor.instrument()
    assert instrumentor.is_instrumented_by_opentelemetry
    GreenjobsInstrumentor().uninstrument()
    GreenjobsInstrumentor().uninstrument()
    assert not instrumentor.is_instrumented_by_opentelemetry
    assert (list(surroundings.everywhere), list(surroundings.around_enqueues), list(events.handlers)) == before


def test_runner_that_is_at_work_goes_on_when_it_is_turned_off(database: running.Database, telemetry: Telemetry) -> None:
    @job
    def turn_off() -> None:
        GreenjobsInstrumentor().uninstrument()

    @job(priority=-1)
    def work() -> None: ...

    turn_off.delay()
    work.delay()
    running.work_off(turn_off, work, pool=1)
    assert [attributes(span)["greenjobs.job_type"] for span in telemetry.consumed()] == ["turn_off"]
    assert database.count() == 0
