"""How attempts end: retries and their timing, what a job raises to say so, timeouts, cancelling, and who is told."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import psycopg2
import pytest
from running import Database, application, started, work_off
from waiting import eventually

from greenjobs import events, job
from greenjobs.control import Discard, Retry, Snooze
from greenjobs.current import current_job
from greenjobs.errors import JobCancelled, JobDefinitionError, JobHardTimeout, JobTimeout, OptionError
from greenjobs.events import AttemptEnded
from greenjobs.retry import backoff, exponential, fixed, linear, seconds_after
from greenjobs.runner import Runner


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with application(database_url) as database:
        yield database


@pytest.fixture
def ended(database: Database) -> Iterator[list[AttemptEnded]]:
    """Every attempt that ends in this process."""
    told: list[AttemptEnded] = []
    handler = events.subscribe(told.append)
    yield told
    events.unsubscribe(handler)


def outcomes(ended: list[AttemptEnded]) -> list[str]:
    return [event.outcome for event in ended]


# --- backoff ----------------------------------------------------------------------------------------------------------


def test_exponential_backoff_is_base_times_factor_to_the_failures() -> None:
    delay = exponential(base=1, factor=3, jitter=0)
    assert [delay(failures, ValueError()) for failures in (1, 2, 3)] == [3, 9, 27]


def test_exponential_backoff_never_exceeds_its_maximum_however_often_it_failed() -> None:
    assert exponential(max=100, jitter=0)(100_000, ValueError()) == 100


def test_jitter_varies_by_its_share_either_way() -> None:
    delays = {exponential(base=100, factor=1, jitter=0.1)(1, ValueError()) for _ in range(200)}
    assert len(delays) > 100
    assert all(90 <= delay <= 110 for delay in delays)


def test_linear_fixed_and_listed_backoffs() -> None:
    assert linear(step=5, jitter=0)(3, ValueError()) == 15
    assert fixed(7)(3, ValueError()) == 7
    assert [backoff([1, 5, 30])(failures, ValueError()) for failures in (1, 2, 3, 4)] == [1, 5, 30, 30]


@pytest.mark.parametrize("given", ["soon", [], [1, -1], True, float("nan"), [1, "2"], {}])
def test_backoff_that_is_none_is_refused_where_the_job_is_declared(given: object) -> None:
    with pytest.raises(JobDefinitionError, match="picky"):

        @job(backoff=given)  # type: ignore[arg-type]
        def picky() -> None: ...


def test_retry_after_header_is_seconds_or_a_date() -> None:
    assert seconds_after("120") == 120
    header = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=1000), usegmt=True)
    assert 900 < seconds_after(header) <= 1000
    assert seconds_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    with pytest.raises(ValueError, match="neither"):
        seconds_after("tomorrow")


# --- retries ----------------------------------------------------------------------------------------------------------


def test_failed_job_runs_again_after_its_backoff(ended: list[AttemptEnded]) -> None:
    attempts = []

    @job(backoff=[0.05])
    def flaky() -> None:
        attempts.append((current_job.attempt, current_job.is_last_attempt))
        if len(attempts) < 3:
            raise ValueError("not yet")

    flaky.delay()
    with started(Runner().register(flaky)):
        eventually(lambda: len(ended) == 3, "three attempts")
    assert attempts == [(1, False), (2, False), (3, False)]
    assert outcomes(ended) == ["retried", "retried", "done"]


def test_call_may_have_fewer_retries_than_its_job(ended: list[AttemptEnded], database: Database) -> None:
    last = []

    @job(backoff=0.0)
    def hopeless() -> None:
        last.append((current_job.is_last_attempt, current_job.max_retries))
        raise ValueError("never")

    hopeless.options(max_retries=1).delay()
    work_off(hopeless)
    assert last == [(False, 1), (True, 1)]
    assert database.rows("SELECT state, retries, jsonb_array_length(errors) FROM background_jobs") == [("failed", 2, 2)]


def test_backoff_function_sees_the_failures_and_the_error(ended: list[AttemptEnded]) -> None:
    asked = []

    def soon(failures: int, error: BaseException) -> float:
        asked.append((failures, str(error)))
        return 0.0

    @job(backoff=soon, max_retries=2)
    def hopeless() -> None:
        raise ValueError(f"time {current_job.attempt}")

    hopeless.delay()
    work_off(hopeless)
    assert asked == [(1, "time 1"), (2, "time 2")]


@pytest.mark.parametrize("answer", ["nonsense", -1, float("inf"), ZeroDivisionError()])
def test_backoff_function_that_misbehaves_is_replaced_by_the_default(ended: list[AttemptEnded], answer: object) -> None:
    def wrong(failures: int, error: BaseException) -> float:
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[return-value]

    @job(backoff=wrong)
    def hopeless() -> None:
        raise ValueError("never")

    hopeless.delay()
    work_off(hopeless)
    assert ended[0].retry_in is not None
    assert 100 < ended[0].retry_in < 140


def test_nothing_but_retry_is_tried_again_where_retry_on_is_empty(ended: list[AttemptEnded]) -> None:
    @job(retry_on=(), timeout=0.05, backoff=60)
    def work(how: str) -> None:
        if how == "retry":
            raise Retry(after=60)
        if how == "error":
            raise ValueError(how)
        time.sleep(60)

    work.delay_many([("retry",), ("error",), ("timeout",)])
    work_off(work)
    assert sorted(outcomes(ended)) == ["failed", "failed", "retried"]


def test_only_errors_of_retry_on_are_tried_again(ended: list[AttemptEnded]) -> None:
    @job(retry_on=ConnectionError, backoff=60)
    def choosy(kind: str) -> None:
        raise ConnectionResetError("worth it") if kind == "network" else ValueError("pointless")

    choosy.delay("network")
    choosy.delay("value")
    work_off(choosy)
    assert sorted(outcomes(ended)) == ["failed", "retried"]


def test_errors_of_discard_on_end_the_job_quietly(ended: list[AttemptEnded], database: Database) -> None:
    told = []

    @job(discard_on=(KeyError,), on_discard=told.append)
    def moot() -> None:
        raise KeyError("customer is gone")

    moot.delay()
    work_off(moot)
    assert outcomes(ended) == outcomes(told) == ["discarded"]
    assert database.count() == 0


def test_retry_says_when_and_counts(ended: list[AttemptEnded], database: Database) -> None:
    @job
    def busy() -> None:
        try:
            raise Retry("server is busy", after="100")
        except Exception:
            pytest.fail("Retry must pass a job's own handlers")

    busy.delay()
    work_off(busy)
    assert outcomes(ended) == ["retried"]
    ((state, retries, seconds),) = database.rows(
        "SELECT state, retries, extract(epoch FROM run_at - now())::float8 FROM background_jobs"
    )
    assert (state, retries) == ("scheduled", 1)
    assert 60 < seconds <= 100


def test_retry_beyond_the_last_one_fails(ended: list[AttemptEnded], database: Database) -> None:
    told = []

    @job(max_retries=0, on_failure=told.append)
    def busy() -> None:
        raise Retry("server is busy", after=1)

    busy.delay()
    work_off(busy)
    assert outcomes(ended) == outcomes(told) == ["failed"]
    assert database.rows("SELECT state, errors -> 0 ->> 'message' FROM background_jobs") == [
        ("failed", "server is busy")
    ]


def test_snooze_counts_nothing(ended: list[AttemptEnded], database: Database) -> None:
    @job(max_retries=0)
    def early() -> None:
        if len(ended) < 3:
            raise Snooze(0.02)

    early.delay()
    with started(Runner().register(early)):
        eventually(lambda: len(ended) == 4, "four attempts")
    assert outcomes(ended) == ["snoozed"] * 3 + ["done"]
    assert database.count() == 0


def test_discard_ends_the_job(ended: list[AttemptEnded], database: Database) -> None:
    @job
    def moot() -> None:
        raise Discard("nothing to do")

    moot.delay()
    work_off(moot)
    assert outcomes(ended) == ["discarded"]
    assert database.count() == 0


def test_handler_that_fails_changes_nothing(ended: list[AttemptEnded], caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: AttemptEnded) -> None:
        raise RuntimeError("handler")

    @job(max_retries=0, on_failure=broken)
    def hopeless() -> None:
        raise ValueError("never")

    hopeless.delay()
    work_off(hopeless)
    assert outcomes(ended) == ["failed"]
    assert "a handler of events failed" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": True},
        {"timeout": "5"},
        {"timeout": 10, "hard_timeout": 5},
        {"hard_timeout": float("inf")},
        {"retry_on": "ValueError"},
        {"discard_on": [ValueError, "KeyError"]},
        {"on_failure": "call me"},
    ],
)
def test_wrong_setting_of_attempts_is_refused_where_the_job_is_declared(settings: dict) -> None:
    with pytest.raises(JobDefinitionError, match="picky"):

        @job(**settings)
        def picky() -> None: ...


def test_wrong_timeout_of_a_call_is_refused_before_anything_is_enqueued() -> None:
    @job
    def nap() -> None: ...

    with pytest.raises(OptionError, match="nap: timeout"):
        nap.options(timeout=0)
    with pytest.raises(OptionError, match="max_retries"):
        nap.options(max_retries=-1)


# --- timeouts ---------------------------------------------------------------------------------------------------------


def test_timeout_is_raised_in_the_job_wherever_it_waits(ended: list[AttemptEnded]) -> None:
    @job(timeout=0.1, max_retries=0)
    def slow(how: str) -> None:
        if how == "sleep":
            time.sleep(60)
        else:
            threading.Event().wait(60)

    slow.delay("sleep")
    slow.delay("event")
    work_off(slow)
    assert [type(event.error) for event in ended] == [JobTimeout, JobTimeout]
    assert all(event.run_seconds < 30 for event in ended)


def test_job_may_catch_its_timeout_and_end_well(ended: list[AttemptEnded]) -> None:
    @job(timeout=0.1)
    def slow() -> None:
        try:
            time.sleep(60)
        except JobTimeout:
            return

    slow.delay()
    work_off(slow)
    assert outcomes(ended) == ["done"]


def test_hard_timeout_fails_the_attempt_whatever_the_job_does_about_it(ended: list[AttemptEnded]) -> None:
    @job(timeout=0.05, hard_timeout=0.15, max_retries=0)
    def stubborn() -> None:
        for _ in range(2):
            with contextlib.suppress(BaseException):
                time.sleep(60)

    stubborn.delay()
    work_off(stubborn)
    assert outcomes(ended) == ["failed"]
    assert isinstance(ended[0].error, JobHardTimeout)


def test_call_may_have_a_timeout_of_its_own(ended: list[AttemptEnded]) -> None:
    @job(max_retries=0)
    def slow() -> None:
        time.sleep(60)

    slow.options(timeout=timedelta(seconds=0.1)).delay()
    work_off(slow)
    assert isinstance(ended[0].error, JobTimeout)


def test_timeout_stops_the_statement_on_the_server(ended: list[AttemptEnded], database: Database) -> None:
    connection = psycopg2.connect(database.url)

    @job(timeout=1, max_retries=0)
    def slow_query() -> None:
        connection.cursor().execute("SELECT pg_sleep(600) AS slow_query_of_a_job")

    slow_query.delay()
    work_off(slow_query)
    assert isinstance(ended[0].error, JobTimeout)
    assert connection.closed
    eventually(
        lambda: (
            database.value(
                "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() "
                "AND query LIKE '%slow_query_of_a_job%'"
            )
            == 0
        ),
        "the statement is stopped on the server",
    )


def test_timeout_of_one_job_never_hits_the_next(ended: list[AttemptEnded]) -> None:
    """The timer must end with its attempt: carriers run job after job."""

    @job(timeout=0.05)
    def quick() -> None: ...

    @job
    def patient() -> None:
        time.sleep(0.3)

    quick.delay_many([()] * 50)
    patient.delay_many([()] * 5)
    work_off(quick, patient)
    assert outcomes(ended) == ["done"] * 55


# --- cancel -----------------------------------------------------------------------------------------------------------


def test_waiting_job_is_removed(ended: list[AttemptEnded], database: Database) -> None:
    @job
    def later() -> None: ...

    assert later.options(delay=3600).delay().cancel() == "removed"
    assert later.delay().cancel() == "removed"
    assert database.count() == 0


def test_cancelling_what_is_gone_says_so(ended: list[AttemptEnded]) -> None:
    @job
    def quick() -> None: ...

    handle = quick.delay()
    work_off(quick)
    assert handle.cancel() == "gone"


@pytest.mark.parametrize("swallows", [False, True])
def test_running_job_is_ended_and_does_not_run_again(
    ended: list[AttemptEnded], database: Database, swallows: bool
) -> None:
    running = threading.Event()

    @job
    def endless(swallows: bool) -> None:
        running.set()
        try:
            time.sleep(3600)
        except JobCancelled:
            if not swallows:
                raise

    handle = endless.delay(swallows)
    with started(Runner().register(endless)):
        assert running.wait(30)
        assert handle.cancel() == "asked"
        eventually(lambda: bool(ended), "the job ends")
    assert outcomes(ended) == ["cancelled"]
    assert database.count() == 0


def test_cancel_is_noticed_without_a_notification(ended: list[AttemptEnded], database: Database) -> None:
    running = threading.Event()

    @job
    def endless() -> None:
        running.set()
        time.sleep(3600)

    handle = endless.delay()
    with started(Runner().register(endless)):
        assert running.wait(30)
        database.rows("UPDATE background_jobs SET cancel_asked_at = now() WHERE id = %s", handle.id)
        eventually(lambda: bool(ended), "the job ends")
    assert outcomes(ended) == ["cancelled"]


def test_cancelled_job_that_comes_back_to_waiting_is_removed(ended: list[AttemptEnded], database: Database) -> None:
    @job
    def quick() -> None: ...

    @job
    def beacon() -> None: ...

    quick.options(delay=3600).delay()
    database.rows("UPDATE background_jobs SET cancel_asked_at = now()")
    with started(Runner().register(beacon, quick)):
        eventually(lambda: database.count() == 0, "the job is removed")
