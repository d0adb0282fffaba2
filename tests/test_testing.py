"""greenjobs.testing: what an application's tests can do with its jobs, without and with a database."""

from __future__ import annotations

import contextvars
import dataclasses
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import processes
import psycopg2
import psycopg2.extras
import pytest
from running import Database, application, work_off
from waiting import eventually

import greenjobs
from greenjobs import Discard, Retry, Snooze, config, current_job, events, job, jobs, testing
from greenjobs.current import lender
from greenjobs.errors import (
    DatabaseUnavailable,
    JobFailed,
    JobNotEnded,
    NoCurrentJob,
    OptionError,
    PayloadError,
    SchemaError,
)
from greenjobs.job import Job


@dataclasses.dataclass
class Invoice:
    total: Decimal


@pytest.fixture
def no_database() -> Iterator[None]:
    """An application whose database answers nobody: where a test passes, it has not been asked."""
    registry = sys.modules["greenjobs.job"]._registry  # type: ignore[attr-defined]
    declared = dict(registry)
    registry.clear()
    greenjobs.configure(database_url=f"postgresql://nobody@127.0.0.1:{processes.free_port()}/none")
    yield
    greenjobs.configure()
    registry.clear()
    registry.update(declared)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with application(database_url) as database:
        yield database


@pytest.fixture
def connection(database: Database) -> Iterator[Any]:
    """The connection of a test that rolls back at its end, which it is `using`."""
    connection = psycopg2.connect(database.url)
    with testing.using(connection):
        yield connection
    connection.rollback()
    connection.close()
    assert database.count() == 0
    assert database.value("SELECT count(*) FROM background_runners") == 0


def declare_recorder(**settings: Any) -> tuple[Job[..., Any], list[Any]]:
    """A job that says what it was called with."""
    seen: list[Any] = []

    @job(name="note", **settings)
    def note(value: Any = None) -> Any:
        seen.append(value)
        return value

    return note, seen


def declare_failing(error: BaseException, **settings: Any) -> Job[..., Any]:
    @job(name="fails", **settings)
    def fails() -> None:
        raise error

    return fails


# --- inline -----------------------------------------------------------------------------------------------------------


def test_inline_runs_the_job_before_delay_returns(no_database: None) -> None:
    note, seen = declare_recorder()
    with testing.inline() as mode:
        handle = note.delay("here")
        assert seen == ["here"]
    assert mode.ran[0].id == handle.id
    assert (mode.ran[0].outcome, mode.ran[0].value, mode.ran[0].args) == ("done", "here", {"value": "here"})
    assert handle.cancel() == "gone"


def test_inline_arguments_have_been_json(no_database: None) -> None:
    """A test must not pass because the job got the very object that was passed."""
    note, seen = declare_recorder()
    given = {"rows": (1, 2)}
    with testing.inline():
        note.delay(given)
    assert seen == [{"rows": [1, 2]}]
    with testing.inline(), pytest.raises(PayloadError, match="value"):
        note.delay(object())


def test_inline_arguments_come_back_as_annotated(no_database: None) -> None:
    seen: list[Any] = []

    @job
    def send(invoice: Invoice) -> None:
        seen.append(invoice)

    with testing.inline():
        send.delay(Invoice(Decimal("1.50")))
    assert seen == [Invoice(Decimal("1.50"))]


def test_inline_job_has_current_job_and_the_runners_context(no_database: None) -> None:
    seen: list[Any] = []

    @job(queue="reports", max_retries=4)
    def report() -> None:
        seen.append((current_job.name, current_job.queue, current_job.attempt, current_job.max_retries))
        seen.append((current_job.context, current_job.row.data, current_job.row.priority, current_job.id))

    with testing.inline(context="the context"):
        handle = report.options(max_retries=2, priority=7).delay()
        with pytest.raises(NoCurrentJob):
            _ = current_job.id
    assert seen == [("report", "reports", 1, 2), ("the context", {}, 7, handle.id)]


def test_inline_job_sees_no_context_variable_of_its_caller(no_database: None) -> None:
    """In a runner there is none either: a job that leans on the request of the view would fail there."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    @job
    def look() -> None:
        seen.append(variable.get())
        variable.set("of the job")

    token = variable.set("of the view")
    with testing.inline():
        look.delay()
    assert (seen, variable.get()) == (["unset"], "of the view")
    variable.reset(token)


def test_inline_raises_what_the_job_raises(no_database: None) -> None:
    fails = declare_failing(ValueError("broken"))
    with testing.inline() as mode, pytest.raises(ValueError, match="broken"):
        fails.delay()
    assert mode.ran[0].outcome == "retried"


def test_inline_records_what_the_job_raises_if_asked_to(no_database: None) -> None:
    fails = declare_failing(ValueError("broken"), max_retries=0)
    with testing.inline(raise_errors=False) as mode:
        fails.delay()
    assert (mode.ran[0].outcome, str(mode.ran[0].error)) == ("failed", "broken")


@pytest.mark.parametrize(
    ("error", "outcome", "retry_in"),
    [(Discard("gone"), "discarded", None), (Snooze(5), "snoozed", 5.0), (Retry(after=7), "retried", 7.0)],
)
def test_inline_does_not_raise_what_the_job_asks_for(
    no_database: None, error: BaseException, outcome: str, retry_in: float | None
) -> None:
    fails = declare_failing(error)
    with testing.inline() as mode:
        fails.delay()
    assert (mode.ran[0].outcome, mode.ran[0].retry_in, mode.ran[0].error) == (outcome, retry_in, error)


def test_inline_raises_a_retry_that_is_not_granted(no_database: None) -> None:
    fails = declare_failing(Retry("once more"), max_retries=0)
    with testing.inline(), pytest.raises(Retry, match="once more"):
        fails.delay()


def test_inline_jobs_enqueue_inline_themselves(no_database: None) -> None:
    note, seen = declare_recorder()

    @job
    def parent() -> None:
        note.delay_many([(1,), {"value": 2}])
        seen.append("parent")

    with testing.inline() as mode:
        parent.options(delay=3600).delay()
    assert seen == [1, 2, "parent"]
    assert [each.job_type for each in mode.jobs] == ["parent", "note", "note"]
    assert [each.job_type for each in mode.ran] == ["note", "note", "parent"]


def test_inline_calls_hooks_and_handlers_of_events(no_database: None) -> None:
    told: list[Any] = []
    fails = declare_failing(ValueError(), max_retries=0, on_failure=lambda event: told.append(("hook", event.outcome)))
    handler = events.subscribe(lambda event: told.append((event.job_type, current_job.name)))
    try:
        with testing.inline(raise_errors=False):
            fails.delay()
    finally:
        events.unsubscribe(handler)
    assert told == [("fails", "fails"), ("hook", "failed")]


def test_modes_hold_in_other_threads(no_database: None) -> None:
    """As those of a live server, in which the views under test run."""
    note, seen = declare_recorder()

    def in_thread() -> None:
        thread = threading.Thread(target=note.delay, args=("thread",))
        thread.start()
        thread.join()

    with testing.inline():
        in_thread()
    assert seen == ["thread"]
    with testing.recording():
        in_thread()
        testing.assert_enqueued(note, "thread")
    assert seen == ["thread"]


def test_modes_nest_and_leaving_restores_the_outer_one(no_database: None) -> None:
    note, seen = declare_recorder()
    with testing.recording() as recorded:
        note.delay(1)
        with testing.inline():
            note.delay(2)
            with testing.recording() as inner:
                note.delay(3)
            note.delay(4)
        with pytest.raises(RuntimeError), testing.inline():
            raise RuntimeError
        note.delay(5)
    assert seen == [2, 4]
    assert [each.args["value"] for each in recorded.jobs] == [1, 5]
    assert [each.args["value"] for each in inner.jobs] == [3]
    with pytest.raises(DatabaseUnavailable):
        note.delay(6)


# --- recording --------------------------------------------------------------------------------------------------------


def test_recording_runs_and_stores_nothing(no_database: None) -> None:
    note, seen = declare_recorder(queue="notes")
    with testing.recording() as recorded:
        handle = note.options(priority=3, max_retries=1).delay(b := 5)
    (noted,) = recorded.jobs
    assert seen == []
    assert (noted.id, noted.job_type, noted.args, noted.queue) == (handle.id, "note", {"value": b}, "notes")
    assert (noted.priority, noted.state, noted.options) == (3, "available", {"max_retries": 1})


def test_recorded_job_for_later_says_when(no_database: None) -> None:
    note, _ = declare_recorder()
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    with testing.recording() as recorded:
        note.options(run_at=tomorrow).delay()
        note.options(delay=3600).delay()
        testing.assert_enqueued(note, run_at=tomorrow, count=1)
        testing.assert_enqueued(note, run_at=datetime.now(timezone.utc) + timedelta(hours=1), count=1)
    assert [each.state for each in recorded.jobs] == ["scheduled", "scheduled"]


def test_options_of_a_recorded_job_are_those_of_the_call(no_database: None) -> None:
    note, _ = declare_recorder(keep="1d")
    with testing.recording() as mode:
        note.delay()
        note.options(keep="2h", timeout=5).delay()
    assert [call.options for call in mode.jobs] == [{}, {"keep": 7200.0, "timeout": 5}]


def test_recorded_job_can_be_cancelled_once(no_database: None) -> None:
    note, _ = declare_recorder()
    with testing.recording() as recorded:
        kept, handle = note.delay_many([(1,), (2,)])
        assert (handle.cancel(), handle.cancel()) == ("removed", "gone")
    assert [each.id for each in recorded.jobs] == [kept.id]


def test_recorded_unique_job_is_a_duplicate_of_the_one_before(no_database: None) -> None:
    note, _ = declare_recorder(unique=True)
    with testing.recording() as recorded:
        first, again, other = note.delay_many([(1,), (1,), (2,)])
        assert (first.duplicate, again.duplicate, other.duplicate) == (False, True, False)
        assert again.id == first.id
        first.cancel()
        assert not note.delay(1).duplicate
    assert [each.args["value"] for each in recorded.jobs] == [2, 1]


def test_recording_refuses_what_enqueuing_refuses(no_database: None) -> None:
    note, _ = declare_recorder()
    with testing.recording() as recorded:
        with pytest.raises(TypeError):
            note.delay(1, 2)
        with pytest.raises(PayloadError):
            note.delay_many([(1,), (object(),)])
    assert recorded.jobs == []


def test_drain_says_that_a_recording_stores_nothing(no_database: None) -> None:
    with testing.recording(), pytest.raises(testing.DrainError, match="in the mode recording no job is stored"):
        testing.drain()


# --- assertions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def send(no_database: None) -> Iterator[Job[..., Any]]:
    """A job of which one call is recorded."""

    @job(queue="emails")
    def send(to: str, subject: str = "Hello", *, ids: Any = (), queue: str = "none", **extra: Any) -> None: ...

    with testing.recording():
        send.options(priority=5).delay("ann", ids=[1, 2], team="red")
        yield send


def test_arguments_are_expected_by_position_or_name_and_need_not_be_all(send: Job[..., Any]) -> None:
    for expect in (
        lambda: testing.assert_enqueued(send),
        lambda: testing.assert_enqueued(send, "ann", team="red"),
        lambda: testing.assert_enqueued(send, to="ann", queue=None, priority=5),
        lambda: testing.assert_enqueued(send, subject="Hello"),
        lambda: testing.assert_enqueued(send, ids=(1, 2)),
        lambda: testing.assert_enqueued(send, arguments={"queue": "none"}),
        lambda: testing.assert_enqueued("send", "ann"),
    ):
        (found,) = expect()
        assert found.args == {"to": "ann", "ids": [1, 2], "team": "red"}
    testing.assert_not_enqueued(send, "bob")
    testing.assert_not_enqueued(send, subject="Bye")
    testing.assert_not_enqueued(send, ids=[1])
    testing.assert_not_enqueued(send, team="blue")
    testing.assert_not_enqueued(send, colour="red")
    testing.assert_not_enqueued(send, priority=4)
    testing.assert_not_enqueued("other")


def test_failure_shows_what_was_enqueued_instead(send: Job[..., Any]) -> None:
    @job
    def other() -> None: ...

    other.options(delay=60, max_retries=1).delay()
    send.delay("cleo")
    with pytest.raises(AssertionError) as failure:
        testing.assert_enqueued(send, to="bob", priority=1)
    lines = str(failure.value).splitlines()
    assert lines[:4] == [
        "send(to='bob') with priority 1 was expected, and was not enqueued.",
        "Enqueued:",
        "  send(to='ann', ids=[1, 2], team='red')  queue 'emails', priority 5",
        "  send(to='cleo')  queue 'emails'",
    ]
    assert lines[4].startswith("  other()  queue 'default', run_at ")
    assert lines[4].endswith(", max_retries 1")


def test_failure_says_that_nothing_was_enqueued(no_database: None) -> None:
    note, _ = declare_recorder()
    with testing.recording(), pytest.raises(AssertionError, match=r"was not enqueued.\nNothing was enqueued\.$"):
        testing.assert_enqueued(note)


def test_failure_of_a_count_says_how_often_it_was(send: Job[..., Any]) -> None:
    send.delay("ann")
    assert len(testing.assert_enqueued(send, "ann", count=2)) == 2
    testing.assert_enqueued(send, "bob", count=0)
    with pytest.raises(AssertionError, match="was expected, 3 times, and was 2 times enqueued"):
        testing.assert_enqueued(send, "ann", count=3)


def test_failure_of_not_enqueued_shows_the_jobs(send: Job[..., Any]) -> None:
    with pytest.raises(AssertionError, match=r"send\(\) was not expected, and was once enqueued.\n  send\(to='ann'"):
        testing.assert_not_enqueued(send)


def test_assertion_about_arguments_that_the_job_does_not_take_is_an_error(no_database: None) -> None:
    """Else a misspelt name would make every assert_not_enqueued pass."""
    note, _ = declare_recorder()
    with testing.recording(), pytest.raises(TypeError, match="note.*valu"):
        testing.assert_not_enqueued(note, valu=1)


def test_argument_with_the_name_of_an_option_must_be_said_apart(send: Job[..., Any]) -> None:
    with pytest.raises(OptionError, match="send has a parameter 'queue', and queue is an option here"):
        testing.assert_enqueued(send, queue="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"count": -1}, "count is -1"), ({"count": True}, "count is True"), ({"run_at": datetime(2026, 1, 1)}, "aware")],
)
def test_options_of_assertions_are_checked(no_database: None, options: dict[str, Any], message: str) -> None:
    note, _ = declare_recorder()
    with testing.recording(), pytest.raises(OptionError, match=message):
        testing.assert_enqueued(note, **options)


# --- perform ----------------------------------------------------------------------------------------------------------


def test_perform_runs_one_attempt_and_returns_what_became_of_it(no_database: None) -> None:
    note, seen = declare_recorder(queue="notes")
    ran = testing.perform(note, (1, 2))
    assert (ran.outcome, ran.value, ran.queue, ran.attempt) == ("done", [1, 2], "notes", 1)
    assert seen == [[1, 2]]


def test_perform_judges_by_the_attempt_as_a_runner_does(no_database: None) -> None:
    fails = declare_failing(ValueError("down"), backoff=[10, 60], max_retries=2)
    outcomes = [testing.perform(fails, attempt=attempt, raise_errors=False) for attempt in (1, 2, 3)]
    assert [(each.outcome, each.retry_in) for each in outcomes] == [("retried", 10), ("retried", 60), ("failed", None)]
    assert testing.perform(fails.options(max_retries=3), attempt=3, raise_errors=False).outcome == "retried"


def test_perform_raises_failures_unless_told_not_to(no_database: None) -> None:
    fails = declare_failing(ValueError("down"))
    with pytest.raises(ValueError, match="down"):
        testing.perform(fails)


def test_perform_respects_the_rules_of_the_job(no_database: None) -> None:
    gone = declare_failing(KeyError("gone"), discard_on=KeyError)
    assert testing.perform(gone).outcome == "discarded"
    assert testing.perform(declare_failing(Snooze(30))).retry_in == 30
    assert testing.perform(declare_failing(Retry(after=12)), attempt=2).retry_in == 12


@pytest.mark.parametrize("attempt", [0, -1, True, "1"])
def test_perform_refuses_attempts_that_cannot_be(no_database: None, attempt: Any) -> None:
    note, _ = declare_recorder()
    with pytest.raises(OptionError, match="perform: attempt is"):
        testing.perform(note, attempt=attempt)


@pytest.mark.parametrize("given", [print, "note", None])
def test_perform_refuses_what_is_no_job(no_database: None, given: Any) -> None:
    with pytest.raises(OptionError, match=r"perform: the job is .*; allowed: a function with @job"):
        testing.perform(given)


def test_perform_lets_the_end_of_the_test_pass(no_database: None) -> None:
    """Such as pytest.skip, or the interrupt of whoever runs the tests: a runner would take them for failures."""
    with pytest.raises(KeyboardInterrupt):
        testing.perform(declare_failing(KeyboardInterrupt()), raise_errors=False)
    with pytest.raises(pytest.skip.Exception):
        testing.perform(declare_failing(pytest.skip.Exception("no")), raise_errors=False)
    assert testing.perform(declare_failing(SystemExit()), raise_errors=False).outcome == "retried"


# --- drain ------------------------------------------------------------------------------------------------------------


def test_drain_runs_what_waits_and_what_that_enqueues(database: Database) -> None:
    note, seen = declare_recorder()

    @job
    def parent() -> None:
        note.delay("child")
        seen.append("parent")

    parent.delay()
    assert [(each.job_type, each.outcome) for each in testing.drain()] == [("parent", "done"), ("note", "done")]
    assert seen == ["parent", "child"]
    assert database.count() == 0
    assert testing.drain() == []


def test_drain_goes_by_priority_over_all_queues(database: Database) -> None:
    note, seen = declare_recorder()
    note.options(queue="b").delay("second")
    note.options(queue="a").delay("third")
    note.options(queue="c", priority=9).delay("first")
    testing.drain()
    assert seen == ["first", "second", "third"]


def test_drain_of_one_queue_leaves_the_others(database: Database) -> None:
    note, seen = declare_recorder()
    note.options(queue="a").delay("a")
    note.options(queue="b").delay("b")
    testing.drain(queue="b")
    assert seen == ["b"]
    assert [each.queue for each in testing.enqueued_jobs()] == ["a"]


def test_drain_runs_rows_of_other_languages_and_names_and_suspects(database: Database) -> None:
    note, seen = declare_recorder(aliases=["remark"])
    database.rows("INSERT INTO background_jobs (job_type, data) VALUES ('note', '{\"value\": \"sql\"}')")
    database.rows("INSERT INTO background_jobs (job_type, data) VALUES ('remark', '{\"value\": \"alias\"}')")
    database.rows(
        "INSERT INTO background_jobs (job_type, data, crashes) VALUES ('note', '{\"value\": \"suspect\"}', 1)"
    )
    database.rows("INSERT INTO background_jobs (job_type, data) VALUES ('unheard_of', '{}')")
    assert [each.job_type for each in testing.enqueued_jobs(note)] == ["note", "remark", "note"]
    assert [each.attempt for each in testing.drain()] == [1, 1, 2]
    assert seen == ["sql", "alias", "suspect"]
    assert [(each.job_type, each.args) for each in testing.enqueued_jobs()] == [("unheard_of", {})]
    assert testing.drain(with_scheduled=True) == []


def test_drain_raises_what_fails_when_its_outcome_is_written(database: Database) -> None:
    fails = declare_failing(ValueError("broken"), backoff=60)
    note, seen = declare_recorder()
    fails.delay()
    note.delay()
    with pytest.raises(ValueError, match="broken"):
        testing.drain()
    (row,) = jobs.find(job_type="fails")
    assert (row.state, row.retries, row.error) == ("scheduled", 1, "ValueError: broken")
    assert 55 < (row.run_at - datetime.now(timezone.utc)).total_seconds() <= 60
    assert seen == []
    testing.drain()
    assert seen == [None]


def test_drain_goes_on_after_failures_if_asked_to(database: Database) -> None:
    fails = declare_failing(ValueError("broken"), max_retries=0)
    note, seen = declare_recorder()
    fails.delay()
    note.delay("after")
    assert [each.outcome for each in testing.drain(raise_errors=False)] == ["failed", "done"]
    assert seen == ["after"]
    assert database.column("SELECT state FROM background_jobs") == ["failed"]


def test_drain_writes_all_outcomes_as_a_runner_does(database: Database) -> None:
    outcomes: list[BaseException] = [Discard("no"), Snooze(30), Retry(after=40)]

    @job
    def ends(place: int) -> None:
        raise outcomes[place]

    handles = ends.delay_many([(0,), (1,), (2,)])
    assert [each.outcome for each in testing.drain()] == ["discarded", "snoozed", "retried"]
    discarded, snoozed, retried = (jobs.get(handle.id) for handle in handles)
    assert discarded is None
    assert snoozed is not None and (snoozed.state, snoozed.retries) == ("scheduled", 0)
    assert retried is not None and (retried.state, retried.retries) == ("scheduled", 1)


def test_drain_with_scheduled_lets_time_pass_until_nothing_is_left(database: Database) -> None:
    seen: list[Any] = []

    @job(backoff=[3600, 7200], max_retries=2)
    def flaky() -> None:
        seen.append(current_job.attempt)
        if current_job.attempt < 3:
            raise ConnectionError("down")

    @job
    def reminder(hours: int) -> None:
        seen.append(f"{hours} h")

    flaky.delay()
    reminder.options(delay=2 * 3600).delay(2)
    reminder.options(delay=4 * 3600).delay(4)
    testing.drain(raise_errors=False, with_scheduled=True)
    assert seen == [1, 2, "2 h", 3, "4 h"]
    assert database.count() == 0


def test_drain_with_scheduled_fails_what_never_works(database: Database) -> None:
    fails = declare_failing(ValueError("broken"), max_retries=3)
    fails.delay()
    ran = testing.drain(with_scheduled=True, raise_errors=False)
    assert [each.outcome for each in ran] == ["retried", "retried", "retried", "failed"]
    (row,) = jobs.find()
    assert (row.state, row.retries, len(row.errors)) == ("failed", 4, 4)


def test_drain_stops_after_its_limit_and_loses_nothing(database: Database) -> None:
    @job
    def for_ever() -> None:
        for_ever.delay()

    for_ever.delay()
    with pytest.raises(testing.DrainError, match=r"drain ran 5 jobs, and there are more, such as job \d+ \(for_ever\)"):
        testing.drain(limit=5)
    assert database.column("SELECT state FROM background_jobs") == ["available"]


@pytest.mark.parametrize(
    ("options", "message"), [({"limit": 0}, "limit is 0"), ({"queue": "no such name"}, "drain: queue")]
)
def test_options_of_drain_are_checked(database: Database, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        testing.drain(**options)


def test_interrupted_drain_gives_its_job_back(database: Database) -> None:
    fails = declare_failing(KeyboardInterrupt())
    fails.delay()
    with pytest.raises(KeyboardInterrupt):
        testing.drain(raise_errors=False)
    assert database.rows("SELECT state, retries, claimed_by FROM background_jobs") == [("available", 0, None)]


def test_drain_leaves_no_session_and_no_living_runner(database: Database) -> None:
    note, _ = declare_recorder()
    note.delay()
    testing.drain()
    assert database.value("SELECT count(*) FROM background_runners WHERE ended_at IS NULL") == 0
    eventually(lambda: "greenjobs testing" not in database.sessions(), "the session is gone from the server")


def test_drain_in_a_job_that_a_drain_runs_takes_the_others(database: Database) -> None:
    """The job that runs is claimed, so that no drain inside of it can run it again."""
    note, seen = declare_recorder()

    @job
    def outer() -> None:
        note.delay("inner")
        seen.append(len(testing.drain()))

    outer.delay()
    assert len(testing.drain()) == 1
    assert seen == ["inner", 1]


def test_what_drain_leaves_a_runner_goes_on_with(database: Database) -> None:
    seen: list[int] = []

    @job(backoff=0)
    def second_time() -> None:
        seen.append(current_job.attempt)
        if current_job.attempt == 1:
            raise ValueError("once")

    second_time.delay()
    with pytest.raises(ValueError, match="once"):
        testing.drain()
    work_off(second_time)
    assert seen == [1, 2]


def test_drain_without_tables_says_what_to_type(empty_database_url: str) -> None:
    with application(empty_database_url):
        for ask in (testing.drain, testing.enqueued_jobs):
            with pytest.raises(SchemaError, match="greenjobs migrate"):
                ask()


# --- the clock --------------------------------------------------------------------------------------------------------


def test_travel_makes_due_what_is_due_by_then(database: Database) -> None:
    note, seen = declare_recorder()
    note.options(delay=1800).delay("half an hour")
    note.options(run_at=datetime.now(timezone.utc) + timedelta(hours=2)).delay("two hours")
    testing.drain()
    with testing.travel(hours=1) as clock:
        testing.drain()
        assert seen == ["half an hour"]
        clock.move(hours=1, seconds=1)
        testing.drain()
        assert seen == ["half an hour", "two hours"]


def test_delays_and_retries_count_from_the_moved_clock(database: Database) -> None:
    note, seen = declare_recorder()
    fails = declare_failing(ValueError(), backoff=600)
    with testing.travel(timedelta(days=1)) as clock:
        note.options(delay=600).delay("later")
        note.delay("now")
        fails.delay()
        testing.drain(raise_errors=False)
        assert seen == ["now"]
        assert testing.drain(raise_errors=False) == []
        clock.move(minutes=10)
        assert [each.job_type for each in testing.drain(raise_errors=False)] == ["note", "fails"]
        assert seen == ["now", "later"]


def test_travel_changes_no_row(database: Database) -> None:
    note, _ = declare_recorder()
    note.options(delay=3600).delay()
    (before,) = testing.enqueued_jobs()
    with testing.travel(minutes=30):
        testing.drain()
        assert testing.enqueued_jobs() == [before]


def test_journeys_add_up_and_end(database: Database) -> None:
    note, seen = declare_recorder()
    note.options(delay=5400).delay("90 minutes")
    with testing.travel(hours=1):
        with testing.travel(minutes=31) as clock:
            assert clock.ahead == timedelta(minutes=91)
        testing.drain()
        assert seen == []
        with testing.travel(minutes=31):
            testing.drain()
    assert seen == ["90 minutes"]


@pytest.mark.parametrize(
    "units", [{"hours": -1}, {"fortnights": 1}, {"hours": "1"}, {"days": float("nan")}, {"days": 1e12}]
)
def test_clock_refuses_what_is_no_way_forward(units: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="the clock is moved by"), testing.travel(**units):
        pass


# --- a transaction of the test's --------------------------------------------------------------------------------------


def test_all_is_gone_when_the_test_rolls_back(connection: Any, database: Database) -> None:
    note, seen = declare_recorder(max_retries=0)
    fails = declare_failing(ValueError("broken"), max_retries=0)
    note.options(queue="many").delay_many([(number,) for number in range(1100)])
    note.delay_many([(number,) for number in range(20)])
    fails.delay()
    assert database.count() == 0
    testing.assert_enqueued(note, 3, count=2)
    testing.drain(queue="default", raise_errors=False)
    assert seen == list(range(20))
    assert jobs.count(state="failed") == 1
    assert len(testing.enqueued_jobs()) == 1100


def test_job_for_later_runs_in_the_transaction_when_it_is_due(connection: Any) -> None:
    """now() stands still in a transaction, so that not even an hour may be missed by a microsecond."""
    note, seen = declare_recorder()
    note.options(delay=3600).delay("in an hour")
    with testing.travel(minutes=59):
        testing.drain()
        assert seen == []
    with testing.travel(hours=1):
        testing.drain()
    assert seen == ["in an hour"]


def test_retries_run_in_the_transaction(connection: Any) -> None:
    fails = declare_failing(ValueError("broken"), max_retries=2)
    fails.delay()
    ran = testing.drain(with_scheduled=True, raise_errors=False)
    assert [each.outcome for each in ran] == ["retried", "retried", "failed"]


def test_jobs_work_on_the_connection_of_the_test(connection: Any, database: Database) -> None:
    @job
    def create(name: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO users VALUES (%s)", (name,))

    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE users (name text)")
        create.delay("ann")
        testing.drain()
        cursor.execute("SELECT name FROM users")
        assert cursor.fetchall() == [("ann",)]


def test_job_that_fails_in_the_database_leaves_the_transaction_usable(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE users (name text)")

    @job(max_retries=0)
    def breaks() -> None:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO users VALUES ('half')")
            cursor.execute("SELECT 1 / 0")

    note, seen = declare_recorder()
    breaks.delay()
    note.delay()
    with pytest.raises(psycopg2.errors.DivisionByZero):
        testing.drain()
    testing.drain()
    with connection.cursor() as cursor:
        cursor.execute("SELECT name FROM users")
        assert cursor.fetchall() == []
    assert seen == [None]
    assert [each.state for each in jobs.find()] == ["failed"]


def test_session_that_ends_its_own_savepoints_does_no_harm(connection: Any) -> None:
    """As SQLAlchemy's with join_transaction_mode="create_savepoint". One that was set before the claim takes it back
    with what the job did, and the outcomes of the jobs before; one that ends takes the savepoint of the drain along."""
    with connection.cursor() as cursor:

        @job(max_retries=0)
        def ends(how: str) -> None:
            cursor.execute(f"{how} SAVEPOINT session")
            cursor.execute("SAVEPOINT session")
            if how.startswith("ROLLBACK"):
                raise ValueError("rolled back")

        ends.delay_many([("RELEASE",), ("ROLLBACK TO",)])
        note, _ = declare_recorder()
        note.options(delay=60).delay()
        cursor.execute("SAVEPOINT session")
        ran = testing.drain(raise_errors=False)
        assert [each.outcome for each in ran] == ["done", "failed"]
        cursor.execute("RELEASE SAVEPOINT session")
    rows = [(each.job_type, each.state, each.retries, each.attempt) for each in jobs.find()]
    assert rows == [("note", "scheduled", 0, 0), ("ends", "failed", 1, 1)]


def test_what_ran_stays_so_when_the_test_rolls_its_session_back(connection: Any) -> None:
    """A runner writes outcomes on connections of its own, so that no rollback of the application undoes them."""
    note, seen = declare_recorder()
    fails = declare_failing(ValueError("broken"), max_retries=1, backoff=60)
    note.delay()
    fails.delay()
    with connection.cursor() as cursor:
        cursor.execute("SAVEPOINT session")
        testing.drain(raise_errors=False)
        cursor.execute("ROLLBACK TO SAVEPOINT session")
        assert [(each.job_type, each.state) for each in testing.enqueued_jobs()] == [("fails", "scheduled")]
        with testing.travel(minutes=1):
            testing.drain(raise_errors=False)
            cursor.execute("ROLLBACK TO SAVEPOINT session")
            assert testing.drain(raise_errors=False) == []
    assert seen == [None]
    assert [(each.job_type, each.state, each.retries, each.attempt) for each in jobs.find()] == [
        ("fails", "failed", 2, 2)
    ]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_job_that_ends_the_transaction_of_the_test_is_told_on(database: Database, end: str) -> None:
    connection = psycopg2.connect(database.url)

    @job
    def ends() -> None:
        getattr(connection, end)()

    with testing.using(connection):
        ends.delay()
        with pytest.raises(testing.DrainError, match=r"job \d+ \(ends\) committed or rolled back the transaction"):
            testing.drain()
    connection.rollback()
    connection.close()


def test_unique_key_that_is_contested_is_resolved_in_the_transaction(connection: Any) -> None:
    @job(unique=True, backoff=60)
    def once() -> None:
        assert not once.delay().duplicate
        raise ValueError("broken")

    once.delay()
    with pytest.raises(ValueError, match="broken"):
        testing.drain(limit=1)
    keys = [(row.state, row.unique_key is None) for row in sorted(jobs.find(), key=lambda row: row.id)]
    assert keys == [("scheduled", True), ("available", False)]


def test_connection_with_other_rows_than_tuples_keeps_them(database: Database) -> None:
    connection = psycopg2.connect(database.url, cursor_factory=psycopg2.extras.RealDictCursor)
    seen: list[Any] = []

    @job
    def look() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 AS one")
            seen.append(dict(cursor.fetchone()))

    with testing.using(connection):
        handle = look.delay()
        look.options(delay=60).delay().cancel()
        assert [each.id for each in testing.enqueued_jobs()] == [handle.id]
        testing.drain()
    assert seen == [{"one": 1}]
    connection.rollback()
    connection.close()


def test_connection_of_the_test_is_left_as_it_is_while_greenjobs_uses_it(database: Database) -> None:
    """Other threads of a live server may be using it, too."""
    connection = psycopg2.connect(database.url, cursor_factory=psycopg2.extras.RealDictCursor)
    with (
        testing.using(connection),
        lender(config.current()).connection() as ours,
        connection.cursor() as cursor,
        ours.cursor() as other,
    ):
        cursor.execute("SELECT 1 AS one")
        other.execute("SELECT 1 AS one")
        assert (cursor.fetchone(), other.fetchone()) == ({"one": 1}, (1,))
    connection.close()


def test_handles_and_jobs_are_those_of_the_transaction(connection: Any) -> None:
    note, _ = declare_recorder()
    first, second, third = note.delay_many([(1,), (2,), (3,)])
    assert first.cancel() == "removed"
    assert jobs.discard(second.id).ids == (second.id,)
    assert [each.id for each in jobs.find()] == [third.id]


def test_call_that_names_a_connection_goes_there(connection: Any, database: Database) -> None:
    note, _ = declare_recorder()
    note.options(connection=database.connection).delay()
    assert database.count() == 1
    database.rows("DELETE FROM background_jobs")


def test_inline_inside_of_a_transaction_and_the_other_way_round(connection: Any, database: Database) -> None:
    note, seen = declare_recorder()
    with testing.inline():
        note.delay("inline")
        assert seen == ["inline"]
        with testing.using(connection):
            note.delay("stored")
            assert seen == ["inline"]
            assert [each.args for each in testing.enqueued_jobs()] == [{"value": "stored"}]
            testing.drain()
    assert seen == ["inline", "stored"]


def test_using_refuses_a_connection_that_rolls_nothing_back(database: Database) -> None:
    with pytest.raises(OptionError, match="is in autocommit"), testing.using(database.connection):
        pass
    with pytest.raises(OptionError, match="allowed: a psycopg2 connection or cursor"), testing.using("connection"):
        pass


def test_rolled_back_brings_its_own_connection(database: Database) -> None:
    note, seen = declare_recorder()
    with testing.rolled_back() as connection:
        note.delay("gone")
        testing.drain()
        note.delay("gone, too")
    assert connection.closed
    assert seen == ["gone"]
    assert database.count() == 0
    eventually(lambda: "greenjobs testing" not in database.sessions(), "the connection is closed on the server, too")


def test_outside_of_all_modes_nothing_is_different(database: Database) -> None:
    note, seen = declare_recorder()
    with testing.inline(), testing.travel(hours=1):
        pass
    note.delay("stored")
    assert database.count("state = 'available'") == 1
    assert seen == []


# --- handles ----------------------------------------------------------------------------------------------------------


def test_handle_of_a_job_that_ran_inline_tells_how_it_ended(no_database: None) -> None:
    @job
    def double(n: int) -> int:
        if n < 0:
            raise ValueError("negative")
        return 2 * n

    with testing.inline(raise_errors=False):
        done, failed = double.delay(4), double.options(max_retries=0).delay(-1)
        waiting = double.delay(-1)
    assert (done.status(), done.wait(), done.result()) == ("done", "done", 8)
    assert (failed.status(), failed.wait()) == ("failed", "failed")
    with pytest.raises(JobFailed, match="negative"):
        failed.result()
    with pytest.raises(JobNotEnded, match="scheduled"):
        waiting.wait(5)


def test_handle_of_a_job_that_ran_inline_tells_of_an_error_that_cannot_be_shown(no_database: None) -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    @job(max_retries=0)
    def fail() -> None:
        raise Unspeakable

    with testing.inline(raise_errors=False):
        handle = fail.delay()
    assert handle.status() == "failed"
    with pytest.raises(JobFailed, match="Unspeakable: <exception str"):
        handle.result()


def test_handle_of_a_recorded_job_says_that_nothing_runs_it(no_database: None) -> None:
    @job
    def double(n: int) -> int:
        return 2 * n

    with testing.recording():
        handle = double.delay(4)
        assert handle.status() == "available"
        with pytest.raises(JobNotEnded, match="nothing runs it"):
            handle.result()
        handle.cancel()
        assert (handle.status(), handle.wait()) == ("gone", "gone")
