"""What surrounds an enqueue, the headers that jobs carry from there, and the events of jobs that come in and begin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gevent
import pytest
import running
from waiting import eventually

from greenjobs import current_job, events, job, testing
from greenjobs.errors import ConfigError, OptionError, SchemaError
from greenjobs.events import AttemptStarted, JobsEnqueued
from greenjobs.job import Job
from greenjobs.runner import Runner
from greenjobs.surroundings import Enqueue, around_enqueues, surround_enqueue


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url, max_retries=0) as database:
        yield database


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    around_enqueues.clear()


@pytest.fixture
def heard() -> Iterator[Callable[[type], list[Any]]]:
    """Gathers the events of a kind, from when it is called on."""
    with contextlib.ExitStack() as stack:

        def gather(kind: type) -> list[Any]:
            events_of_kind: list[Any] = []
            stack.callback(events.unsubscribe, events.subscribe(events_of_kind.append, kind), kind)
            return events_of_kind

        yield gather


def giving(headers: Mapping[str, str] | None, seen: list[Any] | None = None) -> Any:
    @contextlib.contextmanager
    def surrounding(enqueue: Enqueue) -> Iterator[Mapping[str, str] | None]:
        try:
            yield headers
        except BaseException as error:
            if seen is not None:
                seen.append(type(error).__name__)
            raise
        if seen is not None:
            seen.append(enqueue)

    return surrounding


def run_until(job: Job[Any, Any], condition: Callable[[], bool]) -> None:
    with running.started(Runner().register(job)):
        eventually(condition, "the job has not run so often", seconds=running.PATIENCE_SECONDS)


def headers_of(database: running.Database, id: int) -> Any:
    return database.value("SELECT options -> 'headers' FROM background_jobs WHERE id = %s", id)


def test_headers_of_all_that_surrounds_the_enqueue_reach_every_attempt(database: running.Database) -> None:
    seen = []

    @job(max_retries=1, backoff=0.01)
    def work() -> None:
        seen.append(current_job.headers)
        if len(seen) == 1:
            raise ValueError("again")

    surround_enqueue(giving({"trace": "1", "user": "Ann"}))
    surround_enqueue(giving({"trace": "2"}))
    surround_enqueue(giving(None))
    work.delay()
    run_until(work, lambda: len(seen) == 2)
    assert seen == [{"trace": "2", "user": "Ann"}] * 2


def test_job_without_headers_has_none_and_stores_no_options(database: running.Database) -> None:
    seen = []

    @job
    def work() -> None:
        seen.append(current_job.headers)

    surround_enqueue(giving({}))
    handle = work.delay()
    assert database.value("SELECT options IS NULL FROM background_jobs WHERE id = %s", handle.id)
    running.work_off(work)
    assert seen == [{}]


def test_headers_that_somebody_wrote_by_hand_are_read_as_far_as_they_are_texts(database: running.Database) -> None:
    seen = []

    @job
    def work() -> None:
        seen.append(current_job.headers)

    for options in ("""{"headers": [1]}""", """{"headers": {"a": "b", "c": 1}}""", """{"headers": null}"""):
        database.rows("INSERT INTO background_jobs (job_type, data, options) VALUES ('work', '{}', %s)", options)
    running.work_off(work)
    assert sorted(seen, key=len) == [{}, {}, {"a": "b"}]


def test_options_of_the_call_and_headers_are_stored_together(database: running.Database) -> None:
    @job(keep="1 day")
    def work() -> None: ...

    surround_enqueue(giving({"trace": "1"}))
    handle = work.options(max_retries=3).delay()
    options = database.value("SELECT options FROM background_jobs WHERE id = %s", handle.id)
    assert options == {"keep": 86400.0, "max_retries": 3, "headers": {"trace": "1"}}


def test_what_surrounds_an_enqueue_knows_type_queue_and_number(database: running.Database) -> None:
    seen: list[Any] = []

    @job(queue="mail")
    def work(number: int) -> None: ...

    surround_enqueue(giving(None, seen))
    work.delay(1)
    work.options(queue="bulk").delay_many([(1,), (2,)])
    assert seen == [Enqueue("work", "mail", 1), Enqueue("work", "bulk", 2)]


def test_what_fails_around_an_enqueue_is_logged_and_the_job_is_there(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    @job
    def work() -> None: ...

    @surround_enqueue
    @contextlib.contextmanager
    def broken_on_the_way_in(enqueue: Enqueue) -> Iterator[None]:
        raise RuntimeError("in")
        yield

    @surround_enqueue
    @contextlib.contextmanager
    def broken_on_the_way_out(enqueue: Enqueue) -> Iterator[dict[str, str]]:
        yield {"trace": "1"}
        raise RuntimeError("out")

    handle = work.delay()
    assert headers_of(database, handle.id) == {"trace": "1"}
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["in", "out"]


def interrupting(seen: list[str], *, where: str, by: BaseException) -> Any:
    """Around an enqueue, and raises on its way in or out."""

    @contextlib.contextmanager
    def surrounding(enqueue: Enqueue) -> Iterator[None]:
        if where == "in":
            raise by
        try:
            yield
        finally:
            seen.append("middle ended")
            raise by

    return surrounding


@pytest.mark.parametrize("where", ["in", "out"])
@pytest.mark.parametrize("by", [KeyboardInterrupt(), gevent.GreenletExit(), gevent.Timeout(1)], ids=lambda by: type(by))
def test_interruption_around_an_enqueue_ends_what_was_entered_and_goes_on(
    where: str, by: BaseException, database: running.Database
) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def noting(enqueue: Enqueue) -> Iterator[None]:
        try:
            yield
        finally:
            seen.append("ended")

    @job
    def work() -> None: ...

    surround_enqueue(noting)
    surround_enqueue(interrupting(seen, where=where, by=by))
    surround_enqueue(noting)
    with pytest.raises(BaseException) as raised:  # any of them
        work.delay()
    assert raised.value is by
    assert seen == (["ended"] if where == "in" else ["ended", "middle ended", "ended"])
    assert database.count() == (0 if where == "in" else 1)


def test_interruption_on_the_way_out_counts_more_than_the_error_of_the_enqueue(database: running.Database) -> None:
    @job
    def work() -> None: ...

    surround_enqueue(interrupting([], where="out", by=KeyboardInterrupt()))
    database.rows("ALTER TABLE background_jobs RENAME TO moved")
    with pytest.raises(KeyboardInterrupt) as raised:
        work.delay()
    assert isinstance(raised.value.__context__, SchemaError)


@pytest.mark.parametrize(
    "headers",
    [{"a": 1}, {"a": "\0"}, {"a": "\ud800"}, {"a": "x" * 9000}, ["a"], "text"],
    ids=lambda given: repr(given)[:20],
)
def test_headers_that_cannot_be_stored_are_left_out_and_the_job_is_there(
    headers: Any, database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    @job
    def work() -> None: ...

    surround_enqueue(giving(headers))
    surround_enqueue(giving({"trace": "1"}))
    assert headers_of(database, work.delay().id) == {"trace": "1"}
    assert "headers that can be stored" in caplog.text


def test_what_surrounds_an_enqueue_hears_of_its_error_which_is_raised(database: running.Database) -> None:
    seen: list[Any] = []

    @job
    def work() -> None: ...

    surround_enqueue(giving(None, seen))
    database.rows("ALTER TABLE background_jobs RENAME TO elsewhere")
    with pytest.raises(SchemaError, match="was not enqueued"):
        work.delay()
    assert seen == ["SchemaError"]


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match="callable"):
        surround_enqueue("trace")  # type: ignore[type-var]


def test_each_enqueue_is_told_once_without_duplicates(
    database: running.Database, heard: Callable[[type], list[Any]]
) -> None:
    enqueued = heard(JobsEnqueued)

    @job(queue="mail", unique=True)
    def work(number: int) -> None: ...

    work.delay(1)
    work.delay(1)
    work.delay_many([(1,), (2,), (3,)])
    assert enqueued == [JobsEnqueued("work", "mail", 1), JobsEnqueued("work", "mail", 2)]


def test_enqueue_that_fails_is_not_told(database: running.Database, heard: Callable[[type], list[Any]]) -> None:
    enqueued = heard(JobsEnqueued)

    @job
    def work() -> None: ...

    database.rows("ALTER TABLE background_jobs RENAME TO elsewhere")
    with pytest.raises(SchemaError):
        work.delay()
    assert enqueued == []


def test_begin_of_each_attempt_is_told_with_its_number(
    database: running.Database, heard: Callable[[type], list[Any]]
) -> None:
    started = heard(AttemptStarted)

    @job(max_retries=1, backoff=0.01)
    def work() -> None:
        raise ValueError("never")

    handle = work.delay()
    run_until(work, lambda: len(started) == 2)
    assert [(each.id, each.job_type, each.queue, each.attempt) for each in started] == [
        (handle.id, "work", "default", 1),
        (handle.id, "work", "default", 2),
    ]


def test_job_that_is_cancelled_while_a_handler_of_its_begin_waits_is_cancelled(database: running.Database) -> None:
    told, ran = [], []

    @job
    def work() -> None:
        ran.append(True)

    def wait(event: AttemptStarted) -> None:
        told.append(event)
        gevent.sleep(running.PATIENCE_SECONDS / 2)

    events.subscribe(wait, AttemptStarted)
    try:
        handle = work.delay()
        with running.started(Runner().register(work)) as runner:
            eventually(lambda: told, "not begun", seconds=running.PATIENCE_SECONDS)
            assert handle.cancel() == "asked"
            database.wait_for("true", count=0)
            eventually(lambda: runner.running_jobs() == 0, "still running", seconds=running.PATIENCE_SECONDS)
    finally:
        events.unsubscribe(wait, AttemptStarted)
    assert not ran


def test_events_and_headers_are_there_in_inline_mode_too(
    database: running.Database, heard: Callable[[type], list[Any]]
) -> None:
    started, enqueued, seen = heard(AttemptStarted), heard(JobsEnqueued), []

    @job
    def work() -> None:
        seen.append(current_job.headers)

    surround_enqueue(giving({"trace": "1"}))
    with testing.inline():
        work.delay()
    assert seen == [{"trace": "1"}]
    assert (len(started), enqueued) == (1, [JobsEnqueued("work", "default", 1)])


def test_kind_of_event_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(OptionError, match="AttemptEnded, AttemptStarted, JobsEnqueued"):
        events.subscribe(print, int)
