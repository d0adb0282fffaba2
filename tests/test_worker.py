"""What becomes of jobs in a runner: how many run at once, in which order, and what is left of those that fail."""

from __future__ import annotations

import contextvars
import gc
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, NoReturn

import databases
import gevent
import gevent.local
import gevent.pywsgi
import psycopg2
import pytest
import requests
import running
from dataclasses_json import DataClassJsonMixin
from gevent.event import Event
from waiting import eventually

import greenjobs
from greenjobs import current_job, job
from greenjobs.current import JobRow
from greenjobs.runner import Runner

PATIENCE_SECONDS = running.PATIENCE_SECONDS


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing but rows behind."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    with running.application(shared_url) as database:
        yield database
        database.rows("TRUNCATE background_jobs, background_runners, background_waiting")


class Gate:
    """A gate at which jobs wait until it is opened; knows how many have come, and how many were there at once."""

    def __init__(self) -> None:
        self.arrived = 0
        self._opened = Event()

    def wait(self) -> None:
        self.arrived += 1
        assert self._opened.wait(PATIENCE_SECONDS), "nobody opened the gate"

    def wait_for(self, count: int) -> None:
        eventually(lambda: self.arrived >= count, f"{count} jobs did not come together", seconds=PATIENCE_SECONDS)

    def open(self) -> None:
        self._opened.set()


# --- running ----------------------------------------------------------------------------------------------------------


def test_job_runs_with_its_arguments_and_its_row_is_gone(database: running.Database) -> None:
    calls = []

    @job
    def work(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    work.delay(1, "two", None, three=[3], four={"a": 4.5})
    running.work_off(work)

    assert calls == [((1, "two", None), {"three": [3], "four": {"a": 4.5}})]
    assert database.count() == 0


def test_job_gets_its_dataclass(database: running.Database) -> None:
    got = []

    @job
    def send(email: Email) -> None:
        got.append(email)

    send.delay(Email("ann", [1]))
    running.work_off(send)

    assert got == [Email("ann", [1])]


@dataclass
class Email(DataClassJsonMixin):
    to: str
    copies: list[int]


def test_annotated_arguments_arrive_as_themselves(database: running.Database) -> None:
    got: list[datetime] = []

    @job
    def remind(at: datetime) -> None:
        got.append(at)

    at = datetime(2030, 1, 2, 3, 4, 5, 678, tzinfo=timezone.utc)
    remind.delay(at)
    running.work_off(remind)

    assert got == [at]


def test_what_a_job_returns_is_nobodys_business(database: running.Database) -> None:
    @job
    def work() -> object:
        return object()

    work.delay()
    running.work_off(work)

    assert database.count() == 0


def test_no_more_jobs_run_at_once_than_the_pool_has_room_for(database: running.Database) -> None:
    now = peak = 0

    @job
    def work() -> None:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        gevent.sleep(0.001)
        now -= 1

    work.delay_many([()] * 100)
    running.work_off(work, pool=7)

    assert peak == 7


def test_each_queue_has_room_of_its_own(database: running.Database) -> None:
    gate, other_gate = Gate(), Gate()

    @job(queue="one")
    def work() -> None:
        gate.wait()

    @job(queue="other")
    def other() -> None:
        other_gate.wait()

    work.delay_many([()] * 10)
    other.delay_many([()] * 10)
    runner = Runner().register(work, other).configure_queue("one", pool=2).configure_queue("other", pool=3)
    with running.started(runner) as handle:
        gate.wait_for(2)
        other_gate.wait_for(3)
        assert handle.running_jobs() == 5
        gate.open()
        other_gate.open()
        database.wait_for("true", count=0)


def test_larger_priorities_run_first_then_older_jobs(database: running.Database) -> None:
    ran = []

    @job
    def work(number: int) -> None:
        ran.append(number)

    for number, priority in enumerate([0, 5, -5, 5, 32_767, -32_767, 0]):
        work.options(priority=priority).delay(number)
    running.work_off(work, pool=1)

    assert ran == [4, 1, 3, 0, 6, 2, 5]


def test_job_of_a_high_priority_does_not_wait_for_all_that_came_before(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long the first look took on a busy machine does not say how long it is until the next one.
    monkeypatch.setattr("greenjobs.worker._TOP_SHARE", 0)
    ran = []
    gate = Gate()

    @job
    def work(number: int) -> None:
        gate.wait()
        ran.append(number)
        gevent.sleep(0.001)

    work.delay_many([(number,) for number in range(500)])
    with running.started(Runner().register(work).configure_queue("default", pool=1)):
        gate.wait_for(1)
        work.options(priority=1).delay(-1)
        gate.open()
        database.wait_for("true", count=0)

    assert ran.index(-1) < 250


def test_job_type_that_this_runner_does_not_know_is_left(database: running.Database) -> None:
    @job
    def known() -> None: ...

    @job
    def unknown() -> None: ...

    unknown.options(priority=9).delay_many([()] * 100)
    known.delay_many([()] * 100)
    running.work_off(known)

    assert database.rows("SELECT job_type, state, attempt, count(*) FROM background_jobs GROUP BY 1, 2, 3") == [
        ("unknown", "available", 0, 100)
    ]


def test_job_moved_to_another_queue_runs_where_that_is_served(database: running.Database) -> None:
    queues = []

    @job
    def work() -> None:
        queues.append(current_job.queue)

    work.delay()
    work.options(queue="slow").delay()
    runner = Runner().register(work).configure_queue("slow").shutdown_when_queue_empty()
    assert runner.start().wait_for_shutdown(PATIENCE_SECONDS)

    assert queues == ["slow"]
    assert database.column("SELECT queue FROM background_jobs") == ["default"]


def test_rows_without_a_queue_run_where_their_type_is_at_home(database: running.Database) -> None:
    """As the crate, a trigger or a person with psql inserts them."""
    queues = []

    @job(queue="emails")
    def send(to: str) -> None:
        queues.append((current_job.queue, to))

    database.rows("""INSERT INTO background_jobs (job_type, data, priority) VALUES ('send', '{"to": "ann"}', 3)""")
    running.work_off(send)

    assert queues == [("emails", "ann")]


def test_row_without_a_queue_that_arrives_later_is_found(database: running.Database) -> None:
    @job(queue="emails")
    def send(to: str) -> None: ...

    with running.started(Runner().register(send)):
        database.rows("""INSERT INTO background_jobs (job_type, data) VALUES ('send', '{"to": "ann"}')""")
        database.wait_for("true", count=0)


def test_row_without_a_queue_of_an_unknown_type_is_left_without(database: running.Database) -> None:
    @job
    def work() -> None: ...

    database.rows("INSERT INTO background_jobs (job_type, data) VALUES ('another', '{}')")
    running.work_off(work)

    assert database.rows("SELECT queue, state FROM background_jobs") == [(None, "available")]


def test_job_may_enqueue_jobs(database: running.Database) -> None:
    ran = []

    @job
    def work(left: int) -> None:
        ran.append(left)
        if left:
            work.delay(left - 1)

    work.delay(20)
    running.work_off(work)

    assert ran == list(range(20, -1, -1))


def test_job_enqueues_in_the_database_of_its_runner(database: running.Database) -> None:
    ran = []

    @job
    def child() -> None:
        ran.append("child")

    @job
    def parent() -> None:
        child.delay()

    parent.delay()
    greenjobs.configure(database_url="postgresql://127.0.0.1:1/elsewhere")
    running.work_off(parent, child, database_url=database.url)

    assert ran == ["child"]


def test_greenlets_that_a_job_leaves_behind_do_no_harm(database: running.Database) -> None:
    ended = []

    def straggle() -> None:
        gevent.sleep(0.01)
        ended.append(bool(current_job))

    @job
    def work() -> None:
        gevent.spawn(straggle)

    work.delay_many([()] * 20)
    running.work_off(work)
    eventually(lambda: len(ended) == 20, "the stragglers did not end")

    assert not any(ended)


def test_ten_thousand_jobs_shared_by_two_runners_run_once_each(database: running.Database) -> None:
    ran: list[int] = []
    gate = Gate()

    @job
    def work(number: int) -> None:
        gate.wait()
        ran.append(number)
        if number % 100 == 0:
            gevent.sleep(0.001)

    work.delay_many((number,) for number in range(10_000))
    handles = [Runner().register(work).shutdown_when_queue_empty().start() for _ in range(2)]
    # Before anything is done, so that both have a part in it.
    eventually(lambda: all(handle.running_jobs() for handle in handles), "one has no job", seconds=PATIENCE_SECONDS)
    gate.open()
    for handle in handles:
        assert handle.wait_for_shutdown(PATIENCE_SECONDS)

    assert sorted(ran) == list(range(10_000))
    assert database.count() == 0
    assert all(handle.finished_jobs() for handle in handles)


# --- what a job knows about itself ------------------------------------------------------------------------------------


def test_current_job_says_what_it_is(database: running.Database) -> None:
    said: dict[str, Any] = {}

    @job(max_retries=3)
    def work(number: int) -> None:
        said.update(
            bool=bool(current_job),
            id=current_job.id,
            name=current_job.name,
            queue=current_job.queue,
            attempt=current_job.attempt,
            retries=current_job.retries,
            max_retries=current_job.max_retries,
            is_last_attempt=current_job.is_last_attempt,
            context=current_job.context,
            repr=repr(current_job),
        )

    handle = work.options(queue="slow").delay(5)
    context = object()
    runner = Runner(context=context).register(work).configure_queue("slow").shutdown_when_queue_empty()
    assert runner.start().wait_for_shutdown(PATIENCE_SECONDS)

    assert said == {
        "bool": True,
        "id": handle.id,
        "name": "work",
        "queue": "slow",
        "attempt": 1,
        "retries": 0,
        "max_retries": 3,
        "is_last_attempt": False,
        "context": context,
        "repr": f"<current job {handle.id} (work)>",
    }


def test_current_job_has_its_row(database: running.Database) -> None:
    rows = []

    @job
    def work(number: int, words: list[str]) -> None:
        rows.append(current_job.row)

    handle = work.options(priority=4).delay(5, ["a", "ü"])
    created_at = database.value("SELECT created_at FROM background_jobs")
    running.work_off(work)

    assert rows == [
        JobRow(handle.id, "work", {"number": 5, "words": ["a", "ü"]}, "default", 4, 0, 0, rows[0].created_at)
    ]
    assert abs(rows[0].created_at - created_at) < timedelta(milliseconds=1)


def test_current_job_counts_attempts_up_to_the_last(database: running.Database) -> None:
    attempts = []

    @job(max_retries=2)
    def work() -> None:
        attempts.append((current_job.attempt, current_job.retries, current_job.is_last_attempt))
        raise RuntimeError

    work.delay()
    _work_off_with_retries(database, work)

    assert attempts == [(1, 0, False), (2, 1, False), (3, 2, True)]


def test_jobs_that_overlap_each_see_themselves(database: running.Database) -> None:
    gate = Gate()
    seen = {}

    @job
    def work(number: int) -> None:
        before = current_job.id
        gate.wait()
        seen[number] = (before, current_job.id)

    handles = work.delay_many([(number,) for number in range(20)])
    with running.started(Runner().register(work)):
        gate.wait_for(20)
        gate.open()
        database.wait_for("true", count=0)

    assert seen == {number: (handle.id, handle.id) for number, handle in enumerate(handles)}


def test_current_job_is_gone_when_the_job_is(database: running.Database) -> None:
    @job
    def work() -> None: ...

    work.delay()
    running.work_off(work)

    assert not current_job


# --- many at a time ---------------------------------------------------------------------------------------------------


def test_two_hundred_jobs_that_sleep_overlap_on_a_handful_of_connections(database: running.Database) -> None:
    now = peak = 0

    @job
    def work() -> None:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        while peak < 200:
            time.sleep(0.05)
        now -= 1

    work.delay_many([()] * 200)
    pool_of_the_application = len(database.sessions())
    with running.started(Runner().register(work).configure_queue("default", pool=200)):
        eventually(lambda: peak == 200, "they did not come together", seconds=PATIENCE_SECONDS)
        sessions = database.sessions()
        database.wait_for("true", count=0)

    assert len(sessions) - pool_of_the_application <= 6


def test_two_hundred_statements_on_connections_of_the_jobs_own_overlap(database: running.Database) -> None:
    """They wait in the server for a lock, which shows how many are there at once."""

    @job
    def work() -> None:
        connection = psycopg2.connect(database.url)
        try:
            connection.cursor().execute("SELECT pg_advisory_lock_shared(1)")
        finally:
            connection.close()

    work.delay_many([()] * 200)
    database.rows("SELECT pg_advisory_lock(1)")
    with running.started(Runner().register(work).configure_queue("default", pool=200)):
        waiting = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        eventually(lambda: database.value(waiting) == 200, "they did not come together", seconds=PATIENCE_SECONDS)
        database.rows("SELECT pg_advisory_unlock(1)")
        database.wait_for("true", count=0)


def test_a_hundred_requests_overlap(database: running.Database) -> None:
    gate = Gate()
    answers = []

    def answer(environ: Any, start_response: Callable[..., Any]) -> list[bytes]:
        gate.wait()
        start_response("200 OK", [])
        return [b"hello"]

    server = gevent.pywsgi.WSGIServer(("127.0.0.1", 0), answer, log=None)
    server.start()

    @job
    def fetch() -> None:
        answers.append(requests.get(f"http://127.0.0.1:{server.server_port}/").text)

    fetch.delay_many([()] * 100)
    try:
        with running.started(Runner().register(fetch).configure_queue("default", pool=100)):
            gate.wait_for(100)
            gate.open()
            database.wait_for("true", count=0)
    finally:
        server.stop()

    assert answers == ["hello"] * 100


# --- nothing leaks from one job to the next ---------------------------------------------------------------------------


def _run_one_after_the_other(work: Any, count: int = 50) -> None:
    work.delay_many([(number,) for number in range(count)])
    running.work_off(work, pool=2)


def test_context_variables_do_not_leak(database: running.Database) -> None:
    variable = contextvars.ContextVar("variable", default=-1)
    variable.set(-2)
    seen = []

    @job
    def work(number: int) -> None:
        seen.append(variable.get())
        variable.set(number)

    _run_one_after_the_other(work)

    assert seen == [-1] * 50


@pytest.mark.parametrize("kind", [threading.local, gevent.local.local], ids=["threading", "gevent"])
def test_thread_locals_do_not_leak(database: running.Database, kind: type) -> None:
    local = kind()
    seen = []

    @job
    def work(number: int) -> None:
        seen.append(getattr(local, "number", None))
        local.number = number

    _run_one_after_the_other(work)

    assert seen == [None] * 50


def test_attributes_of_the_greenlet_do_not_leak(database: running.Database) -> None:
    seen = []

    @job
    def work(number: int) -> None:
        seen.append(getattr(gevent.getcurrent(), "number", None))
        gevent.getcurrent().number = number

    _run_one_after_the_other(work)

    assert seen == [None] * 50


def test_timeout_that_a_job_forgot_hits_no_other(database: running.Database) -> None:
    failed = []

    @job(max_retries=0)
    def work(number: int) -> None:
        if number < 10:
            gevent.Timeout(0.02).start()
            return
        try:
            gevent.sleep(0.005)
        except BaseException as error:
            failed.append(error)
            raise

    _run_one_after_the_other(work)

    assert failed == []
    assert database.count() == 0


def test_greenlet_killed_after_its_job_has_ended_hits_no_other(database: running.Database) -> None:
    kept = []

    @job(max_retries=0)
    def work(number: int) -> None:
        if number % 10 == 0:
            kept.append(gevent.getcurrent())
        for greenlet in kept[:-1]:
            greenlet.kill(block=False)
        gevent.sleep(0.001)

    _run_one_after_the_other(work)

    assert database.count() == 0


def test_jobs_name_of_its_thread_is_its_own(database: running.Database) -> None:
    names = []

    @job
    def work(number: int) -> None:
        names.append(threading.current_thread().name)
        threading.current_thread().name = f"named by {number}"

    _run_one_after_the_other(work, count=20)

    assert not [name for name in names if name.startswith("named")]


def test_what_a_job_held_is_let_go(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", logger="greenjobs")  # a test's log keeps every exception that was logged

    class Heavy: ...

    @job
    def work(number: int) -> None:
        heavy = Heavy()
        heavy.itself = heavy  # type: ignore[attr-defined]
        if number % 2:
            raise ValueError(heavy)

    _run_one_after_the_other(work, count=20)
    gc.collect()

    assert not [each for each in gc.get_objects() if isinstance(each, Heavy)]


# --- failing ----------------------------------------------------------------------------------------------------------


def _work_off_with_retries(database: running.Database, work: Any, tries: int = 20) -> None:
    """Run until nothing is scheduled, without waiting for the time of the retries."""
    for _ in range(tries):
        running.work_off(work)
        if not database.rows("UPDATE background_jobs SET run_at = now() WHERE state = 'scheduled' RETURNING id"):
            return


def _error(database: running.Database) -> dict[str, Any]:
    errors = database.value("SELECT errors FROM background_jobs")
    assert len(errors) == 1
    error: dict[str, Any] = errors[0]
    return error


def test_failed_job_is_scheduled_for_another_attempt(database: running.Database) -> None:
    @job
    def work() -> None:
        raise RuntimeError("broken")

    handle = work.delay()
    running.work_off(work)

    ((state, retries, crashes, claimed_by, last_retry, seconds),) = database.rows(
        "SELECT state, retries, crashes, claimed_by, last_retry, extract(epoch FROM run_at - last_retry)::float8"
        " FROM background_jobs WHERE id = %s",
        handle.id,
    )
    assert (state, retries, crashes, claimed_by) == ("scheduled", 1, 0, None)
    assert last_retry > datetime(2020, 1, 1, tzinfo=timezone.utc)
    assert 120 * 0.9 <= seconds <= 120 * 1.1  # 1 minute × 2^retries, give or take a tenth


def test_error_is_kept_with_its_traceback(database: running.Database) -> None:
    @job
    def work() -> None:
        raise LookupError("no such order")

    work.delay()
    running.work_off(work)

    error = _error(database)
    assert (error["attempt"], error["error"], error["message"]) == (1, "LookupError", "no such order")
    assert error["traceback"].startswith("Traceback (most recent call last)")
    assert 'raise LookupError("no such order")' in error["traceback"]
    assert "greenjobs/" not in error["traceback"]
    assert error["runner"].startswith(socket.gethostname())
    assert datetime.fromisoformat(error["at"]).tzinfo is not None


def test_cause_of_an_error_is_kept_with_it(database: running.Database) -> None:
    @job
    def work() -> None:
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise RuntimeError("the effect") from error

    work.delay()
    running.work_off(work)

    assert re.search(r"(?s)KeyError: 'the cause'.*RuntimeError: the effect", _error(database)["traceback"])


def test_job_that_fails_once_runs_again_and_is_gone(database: running.Database) -> None:
    attempts = []

    @job
    def work() -> None:
        attempts.append(current_job.attempt)
        if len(attempts) == 1:
            raise RuntimeError

    work.delay()
    _work_off_with_retries(database, work)

    assert attempts == [1, 2]
    assert database.count() == 0


def test_job_without_retries_fails_at_once(database: running.Database) -> None:
    @job(max_retries=0)
    def work() -> None:
        raise RuntimeError

    work.delay()
    running.work_off(work)

    assert database.rows("SELECT state, retries FROM background_jobs") == [("failed", 1)]


def test_job_fails_when_its_retries_are_used_up(database: running.Database) -> None:
    @job(max_retries=2)
    def work() -> None:
        raise RuntimeError

    work.delay()
    _work_off_with_retries(database, work)

    assert database.rows("SELECT state, retries, jsonb_array_length(errors) FROM background_jobs") == [("failed", 3, 3)]


def test_failed_job_is_not_run_again(database: running.Database) -> None:
    ran = []

    @job(max_retries=0)
    def work() -> None:
        ran.append(1)
        raise RuntimeError

    work.delay()
    running.work_off(work)
    running.work_off(work)

    assert ran == [1]


def test_the_last_ten_errors_are_kept_the_newest_last(database: running.Database) -> None:
    @job(max_retries=11)
    def work() -> None:
        raise RuntimeError(f"attempt {current_job.attempt}")

    work.delay()
    _work_off_with_retries(database, work)

    errors = database.value("SELECT errors FROM background_jobs")
    assert [error["message"] for error in errors] == [f"attempt {number}" for number in range(3, 13)]


def test_failure_of_one_job_is_not_that_of_another(database: running.Database) -> None:
    @job
    def work(number: int) -> None:
        if number % 2:
            raise RuntimeError(number)

    work.delay_many([(number,) for number in range(100)])
    running.work_off(work)

    assert database.column("SELECT (data->'number')::int FROM background_jobs ORDER BY 1") == list(range(1, 100, 2))
    assert database.count("errors->0->>'message' = data->>'number'") == 50


class Strange(Exception):
    def __str__(self) -> str:
        raise LookupError("not even a message")

    __repr__ = __str__


class Speechless(Exception):
    def __str__(self) -> str:
        return None  # type: ignore[return-value]  # noqa: PLE0307


class Final(BaseException): ...


def _deeply() -> NoReturn:
    _deeply()


def _chained() -> NoReturn:
    error: Exception = ValueError("first")
    for number in range(2_000):
        following = ValueError(str(number))
        following.__cause__ = error
        error = following
    raise error


def _in_a_circle() -> NoReturn:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    raise one


def _raise(error: BaseException) -> Callable[[], NoReturn]:
    def raising() -> NoReturn:
        raise error

    return raising


_ERRORS: dict[str, tuple[Callable[[], NoReturn], str]] = {
    "a NUL": (_raise(ValueError("nul \0 in it")), "ValueError"),
    "a lone surrogate": (_raise(ValueError("surrogate \ud800 in it")), "ValueError"),
    "a huge message": (_raise(ValueError("x" * 5_000_000)), "ValueError"),
    "bytes": (_raise(ValueError(b"\xff\x00")), "ValueError"),
    "no message": (_raise(ValueError()), "ValueError"),
    "a message that cannot be had": (_raise(Strange()), "Strange"),
    "a message that is none": (_raise(Speechless()), "Speechless"),
    "SystemExit": (lambda: sys.exit(3), "SystemExit"),
    "KeyboardInterrupt": (_raise(KeyboardInterrupt()), "KeyboardInterrupt"),
    "GreenletExit": (_raise(gevent.GreenletExit()), "GreenletExit"),
    "gevent.Timeout": (_raise(gevent.Timeout(1)), "Timeout"),
    "StopIteration": (_raise(StopIteration()), "StopIteration"),
    "GeneratorExit": (_raise(GeneratorExit()), "GeneratorExit"),
    "MemoryError": (_raise(MemoryError()), "MemoryError"),
    "another BaseException": (_raise(Final("final")), "Final"),
    "endless recursion": (_deeply, "RecursionError"),
    "two thousand causes": (_chained, "ValueError"),
    "causes in a circle": (_in_a_circle, "ValueError"),
    "no exception at all": (lambda: (_ for _ in ()).throw(TypeError("x")), "TypeError"),
}


@pytest.mark.parametrize("case", _ERRORS)
def test_error_with(case: str, database: running.Database) -> None:
    """Whatever a job raises is a failure of that job, and of nothing else."""
    action, name = _ERRORS[case]
    ran = []

    @job(max_retries=0)
    def fail() -> None:
        action()

    @job
    def work() -> None:
        ran.append(1)

    fail.options(priority=1).delay()
    work.delay()
    running.work_off(fail, work, pool=1)

    assert database.rows("SELECT job_type, state FROM background_jobs") == [("fail", "failed")]
    error = _error(database)
    assert error["error"] == name
    assert len(error["message"]) <= 2_000 and len(error["traceback"]) <= 8_000
    assert ran == [1]


def test_greenlet_that_kills_itself_has_failed(database: running.Database) -> None:
    @job(max_retries=0)
    def work() -> None:
        gevent.getcurrent().kill()  # type: ignore[attr-defined]

    work.delay()
    running.work_off(work)

    assert _error(database)["error"] == "GreenletExit"


def test_payload_that_does_not_fit_fails_at_once_and_says_where(database: running.Database) -> None:
    @job
    def send(to: str, copies: int = 1) -> None: ...

    database.rows("INSERT INTO background_jobs (job_type, queue, data) VALUES ('send', 'default', '{\"copies\": 2}')")
    running.work_off(send)

    assert database.rows("SELECT state, retries FROM background_jobs") == [("failed", 1)]
    assert _error(database)["error"] == "PayloadMismatch"
    assert "lacks the argument 'to'" in _error(database)["message"]


@pytest.mark.parametrize("data", ["[]", "5", '"text"', "true", '{"numbr": 1}', '{"number": 1, "other": 2}'])
def test_row_that_is_no_call_of_the_job_fails_at_once(database: running.Database, data: str) -> None:
    @job
    def work(number: int = 0) -> None: ...

    database.rows("INSERT INTO background_jobs (job_type, queue, data) VALUES ('work', 'default', %s)", data)
    running.work_off(work)

    assert database.column("SELECT state FROM background_jobs") == ["failed"]
    assert _error(database)["error"] == "PayloadMismatch"


def test_type_error_of_the_job_itself_is_tried_again(database: running.Database) -> None:
    """It is not for us to tell that it is no passing trouble."""

    @job
    def work() -> None:
        len(5)  # type: ignore[arg-type]

    work.delay()
    running.work_off(work)

    assert database.column("SELECT state FROM background_jobs") == ["scheduled"]


def test_failure_is_logged_with_job_and_attempt(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    @job(max_retries=4)
    def work() -> None:
        raise RuntimeError("broken")

    handle = work.delay()
    running.work_off(work)

    (record,) = [record for record in caplog.records if "failed" in record.message]
    assert record.levelname == "WARNING"
    assert re.fullmatch(rf"job {handle.id} \(work\) failed on attempt 1 of 5; retrying in 1\d\d\.\d s", record.message)
    assert record.exc_info and str(record.exc_info[1]) == "broken"
    assert record.__dict__["job_id"] == handle.id


def test_last_failure_is_logged_as_an_error(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    @job(max_retries=0)
    def work() -> None:
        raise RuntimeError

    handle = work.delay()
    running.work_off(work)

    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        f"job {handle.id} (work) failed on attempt 1 and is not tried again"
    ]


def test_payload_is_not_logged(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="greenjobs")

    @job(max_retries=0)
    def work(password: str) -> None:
        raise RuntimeError("broken")

    work.delay("hunter2")
    running.work_off(work)

    assert "broken" in caplog.text
    assert "hunter2" not in caplog.text


# --- for later --------------------------------------------------------------------------------------------------------


def test_job_for_later_runs_when_it_is_due(database: running.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks of the promoter, of which it hears by itself."""
    monkeypatch.setattr("greenjobs.storage.PROMOTER_SECONDS", 3600)
    ages = []

    @job
    def work() -> None:
        ages.append(datetime.now(timezone.utc) - current_job.row.created_at)

    with running.started(Runner().register(work).configure_queue("default", poll_interval=3600)):
        work.options(delay=0.3).delay()
        database.wait_for("true", count=0)

    assert ages[0] >= timedelta(seconds=0.3)


def test_jobs_for_later_run_in_the_order_of_their_time(database: running.Database) -> None:
    ran = []

    @job
    def work(number: int) -> None:
        ran.append(number)

    with running.started(Runner().register(work).configure_queue("default", poll_interval=3600)):
        for number in (3, 1, 2):
            work.options(delay=3600 * number).delay(number)
        for left in (2, 1, 0):
            # An hour goes by.
            database.rows("UPDATE background_jobs SET run_at = run_at - interval '1 hour'")
            database.rows("SELECT pg_notify('greenjobs', 'due')")
            database.wait_for("true", count=left)

    assert ran == [1, 2, 3]


def test_thousands_of_jobs_that_are_due_together_all_run(database: running.Database) -> None:
    ran = []

    @job
    def work(number: int) -> None:
        ran.append(number)

    work.options(delay=3600).delay_many([(number,) for number in range(2500)])
    database.rows("UPDATE background_jobs SET run_at = now()")
    running.work_off(work, pool=50)

    assert sorted(ran) == list(range(2500))


# --- unique jobs ------------------------------------------------------------------------------------------------------


def test_unique_job_may_be_enqueued_again_once_it_has_started(database: running.Database) -> None:
    gate = Gate()

    @job(unique=True)
    def train(monster: str) -> None:
        gate.wait()

    train.delay("m")
    with running.started(Runner().register(train).configure_queue("default", pool=1)):
        gate.wait_for(1)
        second = train.delay("m")
        third = train.delay("m")
        gate.open()
        database.wait_for("true", count=0)

    assert (second.duplicate, third.duplicate, third.id) == (False, True, second.id)
    assert gate.arrived == 2


def test_unique_job_that_waits_for_a_retry_counts_as_unstarted(database: running.Database) -> None:
    @job(unique=True)
    def train(monster: str) -> None:
        raise RuntimeError

    first = train.delay("m")
    running.work_off(train)
    second = train.delay("m")

    assert second.duplicate and second.id == first.id


def test_retry_of_a_unique_job_while_another_waits_is_kept_beside_it(database: running.Database) -> None:
    gate = Gate()

    @job(unique=True)
    def train(monster: str) -> None:
        gate.wait()
        if current_job.id == first.id:
            raise RuntimeError

    first = train.delay("m")
    with running.started(Runner().register(train).configure_queue("default", pool=1)):
        gate.wait_for(1)
        train.options(delay=3600).delay("m")
        gate.open()
        database.wait_for("retries = 1")

    assert database.rows("SELECT state, retries FROM background_jobs ORDER BY id") == [
        ("scheduled", 1),
        ("scheduled", 0),
    ]


def test_unique_job_that_failed_for_good_keeps_nobody_out(database: running.Database) -> None:
    @job(unique=True, max_retries=0)
    def train(monster: str) -> None:
        raise RuntimeError

    train.delay("m")
    running.work_off(train)

    assert not train.delay("m").duplicate


def test_unique_job_that_is_given_back_keeps_others_out_again(database: running.Database) -> None:
    """Claimed ahead by a runner that stops before it started."""
    gate = Gate()

    @job
    def block() -> None:
        gate.wait()

    @job(unique=True)
    def train(monster: int) -> None: ...

    block.delay()
    first = train.delay_many([(number,) for number in range(20)])
    runner = Runner().register(block, train).configure_queue("default", pool=1)
    with running.started(runner) as handle:
        gate.wait_for(1)
        handle.shutdown()
        database.wait_for("state = 'available'", count=20)
        second = train.delay_many([(number,) for number in range(20)])
        gate.open()

    assert [handle.id for handle in second] == [handle.id for handle in first]
    assert all(handle.duplicate for handle in second)
