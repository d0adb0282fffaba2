"""Jobs with executor="thread": what they see, how they wait and compute, and how they are ended."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import gevent
import pytest
import running
from gevent.event import Event
from gevent.monkey import get_original
from waiting import eventually

import greenjobs
from greenjobs import current_job, events, job
from greenjobs.annex import Annex
from greenjobs.errors import JobDefinitionError
from greenjobs.runner import Runner

native_sleep = get_original("time", "sleep")
native_ident = get_original("_thread", "get_ident")

HERE = native_ident()


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url, max_retries=0, threads=4, max_blocking=0) as database:
        yield database


@pytest.fixture
def ended() -> Iterator[list[events.AttemptEnded]]:
    seen: list[events.AttemptEnded] = []
    events.subscribe(seen.append)
    yield seen
    events.unsubscribe(seen.append)


def hold_until(condition: Any) -> None:
    """Block this native thread, and not its loop alone."""
    deadline = time.monotonic() + running.PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to it"
        native_sleep(0.005)


# --- where they run ---------------------------------------------------------------------------------------------------


def test_job_runs_in_another_thread_of_the_process(database: running.Database) -> None:
    ran: list[int] = []

    @job(executor="thread")
    def work() -> None:
        ran.append(native_ident())

    work.delay()
    running.work_off(work)
    assert len(ran) == 1
    assert ran[0] != HERE


def test_event_loop_goes_on_while_a_thread_is_held(database: running.Database) -> None:
    """The one in the thread blocks it until the other, in the loop, has run."""
    has_run: list[bool] = []

    @job(executor="thread")
    def blocks() -> None:
        hold_until(lambda: has_run)

    @job
    def runs() -> None:
        has_run.append(True)

    blocks.delay()
    runs.options(priority=-1).delay()
    running.work_off(blocks, runs)
    assert database.count() == 0


def test_threads_run_at_the_same_time_as_many_as_there_are(database: running.Database) -> None:
    inside: set[int] = set()

    @job(executor="thread")
    def meet() -> None:
        inside.add(current_job.id)
        hold_until(lambda: len(inside) >= 4)

    meet.delay_many([()] * 4)
    running.work_off(meet)
    assert database.count() == 0


def test_jobs_for_which_there_is_no_thread_are_left_to_others(database: running.Database) -> None:
    may_end: list[bool] = []
    ran: list[int] = []

    @job(executor="thread")
    def work() -> None:
        hold_until(lambda: may_end)
        ran.append(current_job.id)

    @job
    def runs() -> None:
        ran.append(0)

    work.delay_many([()] * 9)
    with running.started(Runner().register(work, runs)):
        database.wait_for("state = 'running'", count=4)
        runs.delay_many([()] * 5)
        eventually(lambda: len(ran) == 5, "others have to wait for threads", seconds=running.PATIENCE_SECONDS)
        assert database.count("state = 'available'") == 5
        may_end.append(True)
        database.wait_for("true", count=0)
    assert len(ran) == 14


def test_exclusive_jobs_for_which_there_is_no_thread_keep_no_others_out(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url, threads=1, pool=5)
    may_end = Event()

    @job(executor="thread", overlap=False, overlap_key="{number}")
    def exclude(number: int) -> None:
        hold_until(may_end.is_set)

    @job
    def work() -> None: ...

    exclude.delay_many([(number,) for number in range(10)])
    with running.started(Runner().register(exclude, work)):
        eventually(lambda: database.count("state = 'running'"), "not begun", seconds=running.PATIENCE_SECONDS)
        work.delay_many([()] * 5)
        database.wait_for("job_type = 'work'", count=0)
        assert database.count("state = 'available'") == 9
        may_end.set()
        database.wait_for("true", count=0)


def test_jobs_that_were_claimed_beyond_the_room_are_given_back(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    greenjobs.configure(database_url=database.url, threads=1)
    may_end, room_of = Event(), Annex.room.__get__
    # As after a move of jobs that are here already.
    monkeypatch.setattr(Annex, "room", property(lambda annex: room_of(annex) if annex.busy else 3))

    @job(executor="thread")
    def work() -> None:
        hold_until(may_end.is_set)

    work.delay_many([()] * 3)
    with running.started(Runner().register(work)):
        database.wait_for("state = 'available' AND attempt > 0", count=2)
        may_end.set()
        database.wait_for("true", count=0)


def test_waits_of_the_standard_library_are_those_of_the_thread(database: running.Database) -> None:
    @job(executor="thread")
    def work() -> None:
        time.sleep(0.001)
        done = threading.Event()
        gevent.spawn_later(0.001, done.set)
        assert done.wait(running.PATIENCE_SECONDS)

    work.delay()
    running.work_off(work)
    assert database.count() == 0


# --- what they see ----------------------------------------------------------------------------------------------------


def test_lock_that_a_thread_gives_back_is_had_at_once_though_the_thread_computes_on(database: running.Database) -> None:
    """gevent tells those that wait for it in the loop of the thread, which does not turn then."""
    lock = threading.RLock()
    order: list[str] = []

    @job(executor="thread")
    def hold() -> None:
        with lock:
            order.append("held")
            while "waits" not in order:
                time.sleep(0.001)
            time.sleep(0.05)
        hold_until(lambda: order.count("had") == 3)

    @job
    def take() -> None:
        eventually(lambda: "held" in order, "not held", seconds=running.PATIENCE_SECONDS)
        order.append("waits")
        with lock:
            order.append("had")

    hold.delay()
    take.delay_many([()] * 3)
    running.work_off(hold, take)
    assert order == ["held", *["waits"] * 3, *["had"] * 3]
    assert database.count() == 0


def test_wait_for_a_lock_ends_in_time_where_there_are_threads(database: running.Database) -> None:
    lock = threading.Lock()
    seen: list[Any] = []

    @job(executor="thread")
    def hold() -> None:
        lock.acquire()

    @job
    def take() -> None:
        eventually(lock.locked, "not held", seconds=running.PATIENCE_SECONDS)
        seen.append(lock.acquire(False))
        seen.append(lock.acquire(timeout=0.1))
        with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.1):
            seen.append(lock.acquire())
        with pytest.raises(ValueError, match="positive"):
            lock.acquire(timeout=-2)
        lock.release()
        seen.append(lock.acquire(timeout=0.1))

    hold.delay()
    take.delay()
    running.work_off(hold, take)
    assert seen == [False, False, True]
    assert database.count() == 0


def test_programs_that_threads_start_at_the_same_time_are_waited_for(database: running.Database) -> None:
    statuses = list(range(20))
    seen: list[list[int]] = []

    @job(executor="thread")
    def work() -> None:
        seen.append([subprocess.run(["sh", "-c", f"exit {status}"]).returncode for status in statuses])

    work.delay_many([()] * 4)
    running.work_off(work)
    assert seen == [statuses] * 4


def test_program_that_a_thread_has_started_is_talked_to_and_ended(database: running.Database) -> None:
    seen: list[object] = []

    @job(executor="thread")
    def work() -> None:
        seen.append(subprocess.run(["cat"], input="x" * 200_000, capture_output=True, text=True).stdout)
        with subprocess.Popen(["sleep", "600"]) as program:
            program.terminate()
        seen.append(program.returncode)

    work.delay()
    running.work_off(work)
    assert seen == ["x" * 200_000, -signal.SIGTERM]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, SystemError])
def test_error_in_a_greenlet_of_the_job_ends_no_thread(
    database: running.Database, ended: list[events.AttemptEnded], error: type[BaseException]
) -> None:
    @job(executor="thread")
    def work() -> None:
        def fail() -> None:
            raise error

        gevent.spawn(fail).join()
        gevent.sleep(0.01)

    work.delay()
    running.work_off(work)
    assert [each.outcome for each in ended] == ["done"]


def test_context_and_thread_locals_are_fresh_for_each_job(database: running.Database) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="unset")
    local = threading.local()
    seen: list[tuple[str, bool]] = []

    @job(executor="thread")
    def work() -> None:
        seen.append((variable.get(), hasattr(local, "value")))
        variable.set("set")
        local.value = 1

    work.delay_many([()] * 8)
    running.work_off(work)
    assert seen == [("unset", False)] * 8


def test_surroundings_are_entered_in_the_thread(database: running.Database) -> None:
    seen: list[Any] = []

    @contextlib.contextmanager
    def surrounding() -> Iterator[None]:
        seen.append(native_ident())
        yield
        seen.append(native_ident())

    @job(executor="thread")
    def work() -> None:
        seen.append(native_ident())

    work.delay()
    runner = Runner().register(work).surround(surrounding).shutdown_when_queue_empty()
    assert runner.start().wait_for_shutdown(running.PATIENCE_SECONDS)
    assert len(seen) == 3
    assert len(set(seen)) == 1
    assert seen[0] != HERE


def test_job_enqueues_logs_and_reports_from_the_thread(database: running.Database) -> None:
    told: list[Any] = []

    @job(executor="thread", keep_log=True, keep="1 hour")
    def work() -> None:
        for number in range(100):
            current_job.progress(number, 100)
            native_sleep(0.0001)
        current_job.log.info("enqueueing")
        other.delay(current_job.id)

    @job
    def other(id: int) -> None:
        told.append(id)

    handle = work.delay()
    running.work_off(work, other)
    assert told == [handle.id]
    progress, log = database.rows("SELECT progress, log FROM background_history")[0]
    assert progress["done"] == 99
    assert [line["message"] for line in log] == ["enqueueing"]


def test_connections_are_shared_with_jobs_of_the_loop(database: running.Database) -> None:
    """All of them want the only one, and get it from one another, across threads."""
    greenjobs.configure(database_url=database.url, job_connections=1, threads=4)
    database.rows("CREATE TABLE notes (id bigint)")

    def write() -> None:
        for _ in range(5):
            with greenjobs.connection() as connection, connection.cursor() as cursor:
                cursor.execute("INSERT INTO notes VALUES (%s)", (current_job.id,))

    in_thread, in_loop = job(executor="thread", name="in_thread")(write), job(name="in_loop")(write)
    in_thread.delay_many([()] * 8)
    in_loop.delay_many([()] * 8)
    running.work_off(in_thread, in_loop)
    assert database.value("SELECT count(*) FROM notes") == 80
    assert database.count() == 0


def test_transaction_completes_the_job_in_the_thread(
    database: running.Database, ended: list[events.AttemptEnded]
) -> None:
    database.rows("CREATE TABLE notes (id bigint)")

    @job(executor="thread")
    def work() -> None:
        with current_job.transaction() as connection, connection.cursor() as cursor:
            cursor.execute("INSERT INTO notes VALUES (%s)", (current_job.id,))

    work.delay()
    running.work_off(work)
    assert [each.outcome for each in ended] == ["done"]
    assert database.value("SELECT count(*) FROM notes") == 1


def test_result_is_kept(database: running.Database) -> None:
    @job(executor="thread", keep="1 hour", keep_result=True)
    def double(number: int) -> int:
        return 2 * number

    handle = double.delay(21)
    running.work_off(double)
    assert handle.result(timeout=running.PATIENCE_SECONDS) == 42


def test_error_has_the_traceback_of_the_function(database: running.Database) -> None:
    @job(executor="thread")
    def work() -> None:
        raise ValueError("of the job")

    work.delay()
    running.work_off(work)
    (errors,) = database.column("SELECT errors FROM background_jobs")
    assert errors[0]["message"] == "of the job"
    assert 'raise ValueError("of the job")' in errors[0]["traceback"]


# --- ended from outside -----------------------------------------------------------------------------------------------


def compute() -> None:
    while True:
        sum(range(100))


def wait_in_psycopg2() -> None:
    with greenjobs.connection() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(60)")


@pytest.mark.parametrize("how", [compute, wait_in_psycopg2, lambda: time.sleep(60)], ids=["compute", "sql", "sleep"])
def test_timeout_is_raised_wherever_it_is(database: running.Database, how: Any) -> None:
    caught: list[BaseException] = []

    @job(executor="thread", timeout=0.2)
    def work() -> None:
        try:
            how()
        except TimeoutError as error:
            caught.append(error)
            raise

    work.delay()
    running.work_off(work)
    assert [str(error) for error in caught] == ["work ran for more than 0.2 s"]
    (errors,) = database.column("SELECT errors FROM background_jobs")
    assert (errors[0]["error"], errors[0]["message"]) == ("JobTimeout", "work ran for more than 0.2 s")


def test_error_that_is_raised_just_when_the_job_begins_to_wait_reaches_it(
    database: running.Database, ended: list[events.AttemptEnded], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(call: Any, error: BaseException) -> None:
        call._raise_where_it_computes(error)  # it does not any more, so that the error comes out in its loop
        call.thread.tell(lambda: None)

    monkeypatch.setattr("greenjobs.threads._ThreadCall.interrupt", interrupt)

    @job(executor="thread", timeout=0.2)
    def work() -> None:
        time.sleep(running.PATIENCE_SECONDS / 2)

    work.delay()
    running.work_off(work)
    assert [str(each.error) for each in ended] == ["work ran for more than 0.2 s"]


def test_jobs_that_run_coroutines_overlap(database: running.Database) -> None:
    """asyncio runs one event loop in a thread at a time; each waits here for a letter of the other."""
    ends = socket.socketpair()
    letters: list[bytes] = []

    async def correspond(end: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=end)
        writer.write(b"x")
        letters.append(await asyncio.wait_for(reader.readexactly(1), running.PATIENCE_SECONDS))
        writer.close()

    @job(executor="thread")
    def work(number: int) -> None:
        asyncio.run(correspond(ends[number]))

    work.delay_many([(0,), (1,)])
    running.work_off(work)
    assert letters == [b"x", b"x"]


def test_statement_of_a_job_that_timed_out_is_cancelled(database: running.Database) -> None:
    @job(executor="thread", timeout=0.2)
    def work() -> None:
        wait_in_psycopg2()

    work.delay()
    running.work_off(work)
    statements = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND query LIKE 'SELECT pg_sleep%' AND state = 'active'"
    )
    eventually(lambda: database.value(statements) == 0, "the statement goes on", seconds=running.PATIENCE_SECONDS)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by Linux")
def test_threads_end_with_the_runner(database: running.Database) -> None:
    @job(executor="thread", timeout=0.2)
    def work() -> None:
        wait_in_psycopg2()  # which is cancelled in a thread of its own

    def threads() -> set[str]:
        return {path.name for path in Path("/proc/self/task").iterdir()}

    before = threads()
    work.delay_many([()] * 3)
    running.work_off(work)
    eventually(lambda: not threads() - before, "there are more threads", seconds=running.PATIENCE_SECONDS)


@pytest.mark.parametrize("how", [compute, lambda: time.sleep(60)], ids=["compute", "sleep"])
def test_running_job_is_cancelled(database: running.Database, ended: list[events.AttemptEnded], how: Any) -> None:
    begun: list[bool] = []

    @job(executor="thread")
    def work() -> None:
        begun.append(True)
        with contextlib.suppress(Exception):
            how()

    handle = work.delay()
    with running.started(Runner().register(work)):
        eventually(lambda: begun, "not begun", seconds=running.PATIENCE_SECONDS)
        handle.cancel()
        eventually(lambda: ended, "not ended", seconds=running.PATIENCE_SECONDS)
    assert [each.outcome for each in ended] == ["cancelled"]
    assert database.count() == 0


def test_job_that_was_ended_leaves_the_thread_as_good_as_new(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url, max_retries=0, threads=1)
    ran: list[int] = []

    @job(executor="thread", timeout=0.05)
    def compute_for_ever() -> None:
        compute()

    @job(executor="thread")
    def work(number: int) -> None:
        time.sleep(0.001)
        ran.append(number)

    for number in range(5):
        compute_for_ever.delay()
        work.delay(number)
    running.work_off(compute_for_ever, work)
    assert ran == [0, 1, 2, 3, 4]
    assert database.column("SELECT job_type FROM background_jobs WHERE state = 'failed'") == ["compute_for_ever"] * 5


def test_runner_that_is_to_stop_interrupts_what_runs_in_threads(
    database: running.Database, ended: list[events.AttemptEnded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greenjobs.runner._TIDY_SECONDS", running.PATIENCE_SECONDS / 2)
    greenjobs.configure(database_url=database.url, grace=0, threads=4)
    begun: list[bool] = []

    @job(executor="thread")
    def work(how: str) -> None:
        begun.append(True)
        compute() if how == "compute" else time.sleep(60)

    work.delay_many([("compute",), ("sleep",)])
    with running.started(Runner().register(work)):
        eventually(lambda: len(begun) == 2, "not begun", seconds=running.PATIENCE_SECONDS)
    assert [each.outcome for each in ended] == ["interrupted", "interrupted"]
    assert database.rows("SELECT state, retries, crashes FROM background_jobs") == [("available", 0, 0)] * 2


def test_job_that_obeys_to_nothing_is_reported_with_its_stack_and_given_back(
    database: running.Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("greenjobs.execution._OBEDIENCE_SECONDS", 0.3)
    monkeypatch.setattr("greenjobs.runner._TIDY_SECONDS", 0.1)
    greenjobs.configure(database_url=database.url, grace=0, threads=1)
    may_end, begun = get_original("_thread", "allocate_lock")(), Event()
    may_end.acquire()
    loop = gevent.get_hub().loop

    @job(executor="thread")
    def wait_in_c() -> None:
        loop.run_callback_threadsafe(begun.set)
        may_end.acquire()

    waiting = wait_in_c.delay()
    with running.started(Runner().register(wait_in_c)):
        assert begun.wait(running.PATIENCE_SECONDS)
        waiting.cancel()
        eventually(lambda: "is stuck" in caplog.text, "not reported", seconds=running.PATIENCE_SECONDS)
    may_end.release()
    assert "may_end.acquire()" in caplog.text
    assert database.column("SELECT state FROM background_jobs") == ["available"]


def test_stacks_show_where_a_thread_stands(database: running.Database) -> None:
    begun, may_end = [], []

    @job(executor="thread")
    def work() -> None:
        begun.append(True)
        hold_until(lambda: may_end)

    work.delay()
    with running.started(Runner().register(work)) as handle:
        eventually(lambda: begun, "not begun", seconds=running.PATIENCE_SECONDS)
        # It may be on its way there yet.
        eventually(
            lambda: "hold_until(lambda: may_end)" in handle.stacks(), "not shown", seconds=running.PATIENCE_SECONDS
        )
        may_end.append(True)


# --- declared ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": "fiber"}, "work: executor is 'fiber'; allowed: "),
        ({"on_blocking": "process"}, "work: on_blocking is 'process'; allowed: "),
        ({"executor": "process", "on_blocking": "thread"}, "work: on_blocking is for jobs that run in a greenlet"),
    ],
)
def test_wrong_declaration_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(JobDefinitionError, match=message):

        @job(**settings)
        def work() -> None: ...


class Large:
    """What a job has in its hands."""


def test_thread_that_waits_keeps_nothing_of_its_last_job(database: running.Database) -> None:
    seen: list[weakref.ref[Large]] = []

    @job(executor="thread")
    def work() -> Large:
        large = Large()
        seen.append(weakref.ref(large))
        return large

    def is_gone() -> bool:
        gc.collect()
        return seen[0]() is None

    with running.started(Runner().register(work)):
        work.delay()
        database.wait_for("true", count=0)
        eventually(is_gone, "somebody has it still", seconds=running.PATIENCE_SECONDS)
