"""Jobs that expire: what has not begun in time never runs, and what has begun once never expires.

Time passes in the database, where `expires_at` is set back, not by waiting.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg2
import pytest
import running
from click.testing import CliRunner
from gevent.event import Event
from running import Database
from waiting import eventually

from greenjobs import current_job, events, inspection, job, jobs, pool, storage
from greenjobs.cli import main
from greenjobs.control import Retry, Snooze
from greenjobs.errors import JobDefinitionError, JobExpired, OptionError
from greenjobs.events import AttemptEnded
from greenjobs.runner import Runner
from greenjobs.statement import PlanningConnection
from greenjobs.storage import Failure, Fence, Snoozed

PATIENCE_SECONDS = running.PATIENCE_SECONDS
HOUR = 3600.0


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with running.application(database_url) as database:
        yield database


@pytest.fixture
def connection(database: Database) -> Iterator[PlanningConnection]:
    connection = pool.connect(database.url, application_name="test", timeout_seconds=60)
    yield connection
    connection.close()


@pytest.fixture
def told() -> Iterator[list[AttemptEnded]]:
    told: list[AttemptEnded] = []
    events.subscribe(told.append)
    yield told
    events.unsubscribe(told.append)


def let_expire(database: Database, condition: str = "true") -> None:
    """Let the time of these jobs be over."""
    database.rows(f"UPDATE background_jobs SET expires_at = now() - interval '1 second' WHERE {condition}")


def claim(connection: PlanningConnection, count: int) -> list[storage.ClaimedJob]:
    """Claim jobs as runner 1."""
    return storage.claim(connection, runner=1, queue="default", job_types=["code"], limit=count)


def lives_for(database: Database, id: int) -> tuple[float, float]:
    """Seconds from when the job is due, and from when it was enqueued, until it expires."""
    row = database.rows(
        "SELECT date_part('epoch', expires_at - run_at), date_part('epoch', expires_at - created_at)"
        " FROM background_jobs WHERE id = %s",
        id,
    )[0]
    return float(row[0]), float(row[1])


# --- what can be said -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expires", [0, -1, True, "60", float("nan"), float("inf"), timedelta(0), 1e12])
def test_wrong_expires_is_refused_for_a_job_and_for_a_call(database: Database, expires: Any) -> None:
    def code() -> None: ...

    with pytest.raises(JobDefinitionError, match=r"^code: expires is .*; allowed: "):
        job(expires=expires)(code)
    with pytest.raises(OptionError, match=r"^code: expires is .*; allowed: "):
        job(code).options(expires=expires)


def test_an_instant_is_for_calls_only_and_has_a_time_zone(database: Database) -> None:
    def code() -> None: ...

    now = datetime.now(timezone.utc)
    with pytest.raises(JobDefinitionError, match=r"^code: expires is .*; allowed: seconds, or a timedelta"):
        job(expires=now)(code)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(OptionError, match=r"^code: expires is .*, which has no time zone"):
        job(code).options(expires=datetime(2030, 1, 1))
    with pytest.raises(OptionError, match=r"^code: expires is .*, and the job is not due before"):
        job(code).options(expires=now, run_at=now + timedelta(hours=1))


@pytest.mark.parametrize("expires", [600, 600.0, timedelta(minutes=10)])
def test_seconds_count_from_when_the_job_is_due(database: Database, expires: Any) -> None:
    @job(expires=expires)
    def code() -> None: ...

    assert lives_for(database, code.delay().id) == (600, 600)
    assert lives_for(database, code.options(delay=3600).delay().id) == (600, 4200)
    run_at = datetime.now(timezone.utc) + timedelta(days=1)
    assert lives_for(database, code.options(run_at=run_at).delay().id)[0] == 600
    assert lives_for(database, code.options(expires=60).delay().id)[0] == 60
    for handle in code.options(delay=60).delay_many([()] * 2):
        assert lives_for(database, handle.id)[0] == 600


def test_an_instant_is_kept_as_it_is(database: Database) -> None:
    @job(expires=5)
    def code() -> None: ...

    instant = datetime.now(timezone.utc) + timedelta(hours=1)
    handle = code.options(expires=instant).delay()
    assert database.value("SELECT expires_at FROM background_jobs") == instant
    found = jobs.get(handle.id)
    assert found is not None and found.expires_at == instant
    shown = CliRunner().invoke(main, ["jobs", "show", str(handle.id), "--database-url", database.url]).output
    assert re.search(r"^  expires at    20\d\d-", shown, re.MULTILINE)


def test_jobs_without_it_do_not_expire_and_a_transaction_may_have_some_that_do(database: Database) -> None:
    @job
    def code() -> None: ...

    code.delay()
    with psycopg2.connect(database.url) as connection:
        code.options(connection=connection, expires=60).delay_many([()] * 2)
    connection.close()
    assert database.column("SELECT expires_at IS NULL FROM background_jobs ORDER BY id") == [True, False, False]


# --- what becomes of them ---------------------------------------------------------------------------------------------


def test_expired_job_is_discarded_and_that_is_told(
    database: Database, told: list[AttemptEnded], caplog: pytest.LogCaptureFixture
) -> None:
    discarded: list[tuple[AttemptEnded, int]] = []

    @job(expires=60, on_discard=lambda event: discarded.append((event, current_job.id)))
    def code() -> None:
        raise AssertionError("it ran")

    handle = code.delay()
    let_expire(database)
    with caplog.at_level(logging.INFO, "greenjobs.execution"):
        running.work_off(code)
    assert database.count() == 0
    (event,) = told
    assert (event.outcome, event.id, event.job_type, event.attempt) == ("expired", handle.id, "code", 1)
    assert isinstance(event.error, JobExpired)
    assert discarded == [(event, handle.id)]
    (record,) = [record for record in caplog.records if "expired" in record.message]
    assert record.levelno == logging.INFO
    assert record.message.startswith(f"job {handle.id} (code) expired before it started")
    assert (vars(record)["job_id"], vars(record)["job_type"], vars(record)["queue"]) == (handle.id, "code", "default")


def test_job_that_begins_in_time_runs_as_long_as_it_likes(database: Database, told: list[AttemptEnded]) -> None:
    began, may_end = Event(), Event()

    @job(expires=60)
    def code() -> None:
        began.set()
        may_end.wait(PATIENCE_SECONDS)

    code.delay()
    with running.started(Runner().register(code)):
        assert began.wait(PATIENCE_SECONDS)
        let_expire(database)
        may_end.set()
    assert [event.outcome for event in told] == ["done"]
    assert database.count() == 0


def test_the_clock_of_the_runner_does_not_count(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wall clock may be a year ahead."""
    ran: list[str] = []

    @job
    def code(what: str) -> None:
        ran.append(what)

    ahead = datetime.now(timezone.utc) + timedelta(days=365)
    code.options(expires=60).delay("in time")
    code.options(expires=60).delay("expired")
    let_expire(database, "data ->> 'what' = 'expired'")
    monkeypatch.setattr("time.time", lambda: ahead.timestamp())
    running.work_off(code)
    assert ran == ["in time"]


def test_job_that_expires_after_it_was_claimed_ahead_does_not_run(
    database: Database, told: list[AttemptEnded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was claimed in time, and waits in the runner while another has the only slot."""
    held = Event()
    ran: list[str] = []

    @job
    def code(what: str) -> None:
        ran.append(what)
        if what == "first":
            held.set()
            eventually(lambda: handle.workers["default"]._executor.ready == 1, "it is not here")
            row = handle.workers["default"]._executor._ready[0]
            assert row.start_by is not None
            eventually(lambda: storage.claims.time.monotonic() > row.start_by, "it does not expire")

    monkeypatch.setattr("greenjobs.worker.Worker._room", lambda worker: 2 - worker._executor.held)
    monkeypatch.setattr("greenjobs.worker._STALE_SECONDS", HOUR)
    code.delay("first")
    code.options(expires=0.5).delay("second")
    with running.started(Runner().register(code).configure_queue("default", pool=1)) as handle:
        assert held.wait(PATIENCE_SECONDS)
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert ran == ["first"]
    assert [(event.outcome, event.job_type) for event in told] == [("done", "code"), ("expired", "code")]


def test_those_that_expire_make_room_for_others(database: Database) -> None:
    ran: list[int] = []

    @job
    def code(number: int) -> None:
        ran.append(number)

    code.options(expires=60).delay_many([(number,) for number in range(500)])
    let_expire(database)
    code.delay_many([(number,) for number in range(500, 510)])
    running.work_off(code)
    assert sorted(ran) == list(range(500, 510))
    assert database.count() == 0


def test_job_whose_row_says_infinity_never_expires(database: Database) -> None:
    """Whoever speaks SQL can write it, and a claim that failed for it would take the whole queue along."""
    ran: list[int] = []

    @job
    def code() -> None:
        ran.append(1)

    database.rows(
        "INSERT INTO background_jobs (job_type, data, expires_at)"
        " VALUES ('code', '{}', 'infinity'), ('code', '{}', '-infinity'), ('code', '{}', NULL)"
    )
    running.work_off(code)
    assert len(ran) == 2


# --- what has begun once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["failed", "retried", "snoozed"])
def test_what_was_tried_once_does_not_expire(database: Database, ending: str) -> None:
    attempts: list[int] = []

    @job(expires=60, backoff=HOUR)
    def code() -> None:
        attempts.append(current_job.attempt)
        if len(attempts) > 1:
            return
        let_expire(database)
        if ending == "snoozed":
            raise Snooze(HOUR)
        raise Retry("later") if ending == "retried" else ValueError("no")

    handle = code.delay()
    running.work_off(code)
    assert database.state(handle.id) == "scheduled"
    database.rows("UPDATE background_jobs SET run_at = now()")
    running.work_off(code)
    assert len(attempts) == 2
    assert database.count() == 0


def test_what_a_runner_interrupted_when_it_stopped_does_not_expire(database: Database) -> None:
    began = threading.Semaphore(0)
    is_over = Event()

    @job(expires=60)
    def code() -> None:
        began.release()
        is_over.wait(PATIENCE_SECONDS)

    code.delay()
    handle = Runner().register(code).start()
    assert began.acquire(timeout=PATIENCE_SECONDS)
    handle.shutdown(urgency=2)
    assert handle.wait_for_shutdown(PATIENCE_SECONDS)
    assert database.rows("SELECT state, expires_at FROM background_jobs") == [("available", None)]


def test_what_was_claimed_ahead_and_given_back_does(database: Database, connection: PlanningConnection) -> None:
    @job(expires=60)
    def code() -> None: ...

    code.delay_many([()] * 2)
    rows = claim(connection, 2)
    storage.give_back(connection, [1], [Fence(rows[0].id, rows[0].attempt)])
    storage.give_back(connection, [1], [Fence(rows[1].id, rows[1].attempt)], has_started=True)
    assert database.column("SELECT expires_at IS NULL FROM background_jobs ORDER BY id") == [False, True]


@pytest.mark.parametrize("how", ["failed", "snoozed", "rescued", "retried by hand"])
def test_row_of_a_job_that_has_begun_says_that_it_does_not_expire(
    database: Database, connection: PlanningConnection, how: str
) -> None:
    @job(expires=60)
    def code() -> None: ...

    code.delay()
    (row,) = claim(connection, 1)
    fence = Fence(row.id, row.attempt)
    if how == "failed":
        storage.fail(connection, [1], [Failure(fence, 0.0, {"error": "Oops"})])
    elif how == "snoozed":
        storage.snooze(connection, [1], [Snoozed(fence, 0.0)])
    elif how == "rescued":
        database.rows(
            "INSERT INTO background_runners (id, hostname, pid, version, queues, job_types)"
            " VALUES (1, 'gone', 1, '0', '{}', '{}')"
        )
        assert inspection.dead_runners(connection) == [1]
        storage.rescue(connection, [1], most_crashes=3)
    else:
        database.rows("UPDATE background_jobs SET state = 'failed', claimed_by = NULL")
        let_expire(database)
        jobs.retry(row.id)
    assert database.column("SELECT expires_at FROM background_jobs") == [None]


def test_job_that_is_made_available_early_still_expires(database: Database) -> None:
    @job(expires=60)
    def code() -> None: ...

    handle = code.options(delay=3600).delay()
    jobs.retry(handle.id)
    assert database.rows("SELECT state, expires_at IS NULL FROM background_jobs") == [("available", False)]


# --- together with other settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_inside", [False, True])
def test_an_expired_job_that_waits_in_vain_takes_no_place_from_a_unique_one(
    database: Database, is_inside: bool
) -> None:
    """It would be a duplicate of a job that never runs, and so would never run itself."""
    ran: list[int] = []

    @job(unique=True, expires=60)
    def code(number: int) -> None:
        ran.append(current_job.id)

    first = code.delay(1)
    assert code.delay(1).duplicate
    let_expire(database)
    if is_inside:
        with psycopg2.connect(database.url) as connection:
            second = code.options(connection=connection).delay(1)
        connection.close()
    else:
        second = code.delay(1)
    assert not second.duplicate
    assert code.delay(1) == second.__class__(second.id, "code", True)
    running.work_off(code)
    assert ran == [second.id] != [first.id]


def test_exclusive_jobs_that_expire_let_the_next_one_go(database: Database, told: list[AttemptEnded]) -> None:
    ran: list[int] = []

    @job(overlap=False, expires=60)
    def code(number: int) -> None:
        ran.append(number)

    code.delay_many([(number,) for number in range(20)])
    let_expire(database, "id % 2 = 0")
    with running.started(Runner().register(code).configure_queue("default", poll_interval=3600)):
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert len(ran) == 10
    assert ran == sorted(ran)
    assert [event.outcome for event in told].count("expired") == 10
