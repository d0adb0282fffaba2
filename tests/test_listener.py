"""The runner's session: what wakes it, and what becomes of the runner when the session is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import psycopg2
import pytest
import running
from gevent.event import Event
from waiting import eventually

from greenjobs import job
from greenjobs.acknowledger import Acknowledger
from greenjobs.runner import Runner, RunnerHandle
from greenjobs.service import Service
from greenjobs.storage import Ended, Failure, Fence, Snoozed

PATIENCE_SECONDS = running.PATIENCE_SECONDS


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        yield database


def _patient(*jobs: Any) -> Runner:
    """A runner that does not look by itself within the time of a test."""
    runner = Runner().register(*jobs)
    for queue in {each.queue for each in jobs}:
        runner.configure_queue(queue, poll_interval=3600)
    return runner


def _wait_until_idle(database: running.Database) -> None:
    """Until its worker has said that it waits and has looked once more: from then on only a notification helps."""
    eventually(lambda: database.column("SELECT queue FROM background_waiting"), "it does not wait")
    gevent.sleep(0.1)


# --- waking -----------------------------------------------------------------------------------------------------------


def test_idle_runner_is_woken_by_an_enqueue(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with running.started(_patient(work)):
        for _ in range(3):
            _wait_until_idle(database)
            work.delay()
            database.wait_for("true", count=0)


def test_idle_runner_is_woken_by_the_commit_of_a_transaction(database: running.Database) -> None:
    @job
    def work() -> None: ...

    transaction = psycopg2.connect(database.url)
    with running.started(_patient(work)):
        _wait_until_idle(database)
        work.options(connection=transaction).delay()
        gevent.sleep(0.1)
        transaction.commit()
        database.wait_for("true", count=0)
    transaction.close()


def test_idle_runner_is_woken_by_a_bulk(database: running.Database) -> None:
    @job
    def work(number: int) -> None: ...

    with running.started(_patient(work)):
        _wait_until_idle(database)
        work.delay_many((number,) for number in range(2500))
        database.wait_for("true", count=0)


def test_every_idle_runner_of_a_busy_queue_comes_to_help(database: running.Database) -> None:
    """More jobs than one has room for."""
    release = Event()
    started = []

    @job
    def work() -> None:
        started.append(1)
        assert release.wait(PATIENCE_SECONDS)

    def helper() -> Runner:
        return _patient(work).configure_queue("default", pool=2, poll_interval=3600)

    with running.started(helper()), running.started(helper()):
        eventually(lambda: len(database.column("SELECT runner FROM background_waiting")) == 2, "they do not wait")
        gevent.sleep(0.1)
        work.delay_many([()] * 4)
        eventually(lambda: len(started) == 4, "nobody helped")
        release.set()


def test_row_that_nobody_announced_is_found_by_looking(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with running.started(Runner().register(work).configure_queue("default", poll_interval=0.05)):
        _wait_until_idle(database)
        database.rows("INSERT INTO background_jobs (job_type, queue, data) VALUES ('work', 'default', '{}')")
        database.wait_for("true", count=0)


@pytest.mark.parametrize(
    "payload", ["", "garbage", "*", "*:", ":", "999:default", "*:unknown", "x:y:z", "due", "1:ü", "*:" + "q" * 5000]
)
def test_foreign_notifications_do_no_harm(database: running.Database, payload: str) -> None:
    @job
    def work() -> None: ...

    with running.started(_patient(work)):
        _wait_until_idle(database)
        database.rows("SELECT pg_notify('greenjobs', %s)", payload)
        work.delay()
        database.wait_for("true", count=0)


# --- losing the session -----------------------------------------------------------------------------------------------


def _lose_session(database: running.Database, handle: RunnerHandle) -> tuple[int | None, int | None]:
    """End the runner's session; returns its id before, and after."""
    before = handle.runner_id
    assert database.terminate_sessions("greenjobs session") == 1
    eventually(lambda: handle.runner_id not in (None, before), "it did not register again", seconds=PATIENCE_SECONDS)
    return before, handle.runner_id


def test_runner_that_loses_its_session_registers_again_and_goes_on(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    ran = []

    @job
    def work() -> None:
        ran.append(1)

    with running.started(_patient(work)) as handle:
        before, after = _lose_session(database, handle)
        _wait_until_idle(database)
        work.delay()
        database.wait_for("true", count=0)

    assert before != after
    assert ran == [1]
    assert f"runner {before} lost its session" in caplog.text
    assert f"this is runner {after} now" in caplog.text


def test_what_runs_while_the_session_is_lost_is_done_once(database: running.Database) -> None:
    release = Event()
    started = []

    @job
    def work() -> None:
        started.append(1)
        assert release.wait(PATIENCE_SECONDS)

    work.delay()
    with running.started(_patient(work)) as handle:
        eventually(lambda: started, "it did not start")
        _lose_session(database, handle)
        release.set()
        database.wait_for("true", count=0)

    assert started == [1]


Hand = Callable[[Acknowledger, Fence], None]

OUTCOMES: dict[str, tuple[Hand, tuple[str | None, int]]] = {
    "done": (lambda outcomes, fence: outcomes.done.add(fence), (None, 0)),
    "ended": (lambda outcomes, fence: outcomes.ended.add(Ended(fence, "discarded")), (None, 0)),
    "failed": (lambda outcomes, fence: outcomes.failed.add(Failure(fence, None, {"error": "E"})), ("failed", 1)),
    "snoozed": (lambda outcomes, fence: outcomes.snoozed.add(Snoozed(fence, 60)), ("scheduled", 0)),
    "unfinished": (lambda outcomes, fence: outcomes.unfinished.add(fence), ("available", 0)),
    "interrupted": (lambda outcomes, fence: outcomes.interrupted.add(fence), ("available", 0)),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_outcome_that_is_written_while_its_job_is_adopted_counts(
    outcome: str, database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Its statement knows the former id alone, and has to wait for the row, which has the new one then."""
    hand, expected = OUTCOMES[outcome]
    id = database.value(
        "INSERT INTO background_jobs (job_type, queue, data, state, attempt, claimed_by, claimed_at)"
        " VALUES ('work', 'default', '{}', 'running', 1, 1, now()) RETURNING id"
    )
    service = Service(database.url, on_standby=lambda: None)
    service.runner_ids.append(1)
    settled: set[int] = set()
    outcomes = Acknowledger(service, on_settled=settled.update, spawn=gevent.spawn)
    waits = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        " AND application_name = 'greenjobs runner'"
    )
    with contextlib.closing(psycopg2.connect(database.url)) as adopting:
        with adopting.cursor() as cursor:
            cursor.execute("UPDATE background_jobs SET claimed_by = 2")
        hand(outcomes, Fence(id, 1))
        eventually(lambda: database.rows(waits), "the outcome is not on its way", seconds=PATIENCE_SECONDS)
        service.runner_ids.append(2)
        adopting.commit()
    with gevent.Timeout(PATIENCE_SECONDS):
        outcomes.wait_empty()
    outcomes.stop()
    service.close()

    state, retries = expected
    assert database.rows("SELECT state, retries FROM background_jobs") == ([] if state is None else [(state, retries)])
    assert settled == {id}
    assert "no longer held" not in caplog.text


def test_runner_survives_the_loss_of_all_its_connections(database: running.Database) -> None:
    ran: list[int] = []

    @job
    def work(number: int) -> None:
        ran.append(number)
        gevent.sleep(0.001)

    work.delay_many([(number,) for number in range(300)])
    with running.started(Runner().register(work).configure_queue("default", pool=5)):
        eventually(lambda: len(ran) > 20, "they do not run")
        database.terminate_sessions("greenjobs runner")
        database.terminate_sessions("greenjobs session")
        database.wait_for("true", count=0)

    assert set(ran) == set(range(300))


def test_runner_stops_while_it_has_no_session(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with running.started(_patient(work)) as handle:
        database.terminate_sessions("greenjobs session")
        eventually(lambda: handle.runner_id is None, "it did not notice")


def test_runner_whose_session_is_ended_again_and_again_goes_on(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with running.started(_patient(work)) as handle:
        ids = [id for _ in range(3) for id in _lose_session(database, handle)]
        work.delay()
        database.wait_for("true", count=0)

    assert len(set(ids)) == 4
