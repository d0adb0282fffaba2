"""Who holds the event loop is named, with the stack it stood in; and how late the loop is, is measured."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import re
import sys
import time
from collections.abc import Iterator
from types import FrameType, SimpleNamespace
from typing import Any

import gevent
import pytest
import running
from gevent.monkey import get_original
from waiting import eventually

import greenjobs
from greenjobs import events, job, watchdog
from greenjobs.current import attempt_here
from greenjobs.job import registered_jobs
from greenjobs.runner import Runner, RunnerHandle

native_sleep = get_original("time", "sleep")
native_ident = get_original("_thread", "get_ident")

HERE = native_ident()


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url, max_retries=0, max_blocking=0.1) as database:
        yield database


@pytest.fixture
def seen() -> Iterator[list[events.LoopHeld]]:
    """The events of this test."""
    seen: list[events.LoopHeld] = []
    events.subscribe(seen.append, events.LoopHeld)
    yield seen
    events.unsubscribe(seen.append, events.LoopHeld)


# Those of the runner at work, or none.
dogs: list[watchdog.Watchdog] = []


@contextlib.contextmanager
def at_work() -> Iterator[RunnerHandle]:
    runner = Runner().register(*registered_jobs().values())
    handle = runner.prepare()
    dogs.append(handle.loop)
    try:
        handle.start()
        yield handle
    finally:
        handle.shutdown()
        assert handle.wait_for_shutdown(running.PATIENCE_SECONDS)
        dogs.clear()


def of(job_type: str | None, seen: list[events.LoopHeld]) -> list[events.LoopHeld]:
    """Those of a job type. On a busy machine there may be others, of whoever did not get the processor."""
    return [each for each in seen if each.job_type == job_type]


def wait_for(job_type: str | None, seen: list[events.LoopHeld], count: int = 1) -> events.LoopHeld:
    eventually(lambda: len(of(job_type, seen)) >= count, f"{count} × {job_type}", seconds=running.PATIENCE_SECONDS)
    return of(job_type, seen)[-1]


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "greenjobs.watchdog"]


def hold() -> None:
    """Hold the loop for a while, and until the thread that watches it, which may have to wait, has seen who does."""
    attempt = attempt_here()
    deadline = time.monotonic() + running.PATIENCE_SECONDS
    while time.monotonic() < deadline:
        native_sleep(0.4)  # the line that the stack shows
        if any(held.attempt is attempt for dog in dogs for held in tuple(dog._open)):
            break


def test_event_names_the_job_and_where_it_stood(database: running.Database, seen: list[events.LoopHeld]) -> None:
    @job(queue="slow")
    def block() -> None:
        hold()

    id = block.delay().id
    with at_work():
        held = wait_for("block", seen)
    assert (held.job_type, held.id, held.queue) == ("block", id, "slow")
    assert "native_sleep(0.4)  # the line that the stack shows" in held.stack
    assert held.seconds > 0.3


def test_stack_begins_with_the_function_of_the_job(database: running.Database, seen: list[events.LoopHeld]) -> None:
    @job
    def block() -> None:
        hold()

    block.delay()
    with at_work():
        held = wait_for("block", seen)
    assert held.stack.splitlines()[0].endswith("in block")


def test_it_is_logged_while_it_is_held_and_when_it_ends(
    database: running.Database, seen: list[events.LoopHeld], caplog: pytest.LogCaptureFixture
) -> None:
    logged_meanwhile: list[bool] = []

    @job
    def block() -> None:
        deadline = time.monotonic() + running.PATIENCE_SECONDS
        while not lines(caplog) and time.monotonic() < deadline:
            native_sleep(0.01)
        logged_meanwhile.append(bool(lines(caplog)))

    id = block.delay().id
    with at_work():
        wait_for("block", seen)
    assert logged_meanwhile == [True]
    first, second = [record for record in lines(caplog) if getattr(record, "job_id", None) == id]
    assert re.match(rf"job {id} \(block\) has held the event loop for \d+\.\d s, ", first.getMessage())
    assert "native_sleep(0.01)" in first.getMessage()
    assert re.fullmatch(rf"job {id} \(block\) let go of the event loop after \d+\.\d s", second.getMessage())
    assert (first.levelname, first.job_type, first.queue, first.attempt) == ("WARNING", "block", "default", 1)  # type: ignore[attr-defined]


def test_reports_of_a_job_type_are_few_and_all_are_counted(
    database: running.Database, seen: list[events.LoopHeld], caplog: pytest.LogCaptureFixture
) -> None:
    @job
    def block() -> None:
        hold()

    block.delay_many([()] * 3)
    with at_work() as handle:
        wait_for("block", seen, count=3)
        assert handle.loop.held["block"] == 3
    assert len([record for record in lines(caplog) if "has held" in record.getMessage()]) == 1


def test_next_report_says_how_many_were_left_out(
    database: running.Database,
    seen: list[events.LoopHeld],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @job
    def block() -> None:
        hold()

    with at_work() as handle:
        block.delay_many([()] * 3)
        wait_for("block", seen, count=3)
        handle.loop._quiet["block"] = (0.0, handle.loop._quiet["block"][1])
        block.delay()
        wait_for("block", seen, count=4)
    assert "(2 more times since the last line like this)" in caplog.text


def test_code_of_no_job_is_reported_as_such(database: running.Database, seen: list[events.LoopHeld]) -> None:
    @job
    def innocent() -> None: ...

    with at_work():
        innocent.delay()
        gevent.spawn(hold)
        # On a busy machine others that belong to no job may be seen, too.
        eventually(
            lambda: any("native_sleep(0.4)" in each.stack for each in of(None, seen)),
            "it is not reported",
            seconds=running.PATIENCE_SECONDS,
        )
    assert {each.id for each in of(None, seen)} == {None}


def test_c_code_that_keeps_the_interpreter_lock_is_found_out_afterwards(
    database: running.Database,
    seen: list[events.LoopHeld],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look, beats = watchdog.Watchdog._look, []

    def look_late(dog: watchdog.Watchdog, beat: float) -> None:
        """The thread gets the lock back after the loop has had its turn; which of them is first is a matter of luck."""
        while beats and dog._beat == beats[0]:
            native_sleep(0.001)
        look(dog, beat)

    @job
    def block() -> None:
        (dog,) = dogs
        dog._quiet.clear()  # whatever was reported before, as of a busy machine
        beats.append(dog._beat)
        ctypes.PyDLL(None).usleep(400_000)

    monkeypatch.setattr(watchdog.Watchdog, "_look", look_late)
    block.delay()
    with at_work():
        eventually(
            lambda: any(not each.stack for each in of(None, seen)), "not found out", seconds=running.PATIENCE_SECONDS
        )
    assert of("block", seen) == []
    assert "it cannot be said by which job: C code that lets no thread" in caplog.text


def test_each_of_those_that_hold_it_one_after_the_other_is_named(
    database: running.Database, seen: list[events.LoopHeld]
) -> None:
    """The loop has no turn in between."""

    @job
    def block() -> None:
        hold()

    block.delay_many([()] * 2)
    with at_work():
        wait_for("block", seen, count=2)
    assert len({each.id for each in of("block", seen)}) == 2
    assert all(each.seconds > 0.3 for each in of("block", seen))


def test_many_short_ones_are_not_blamed_on_one(seen: list[events.LoopHeld], caplog: pytest.LogCaptureFixture) -> None:
    """By the watchdog itself, as no job is short on a machine that stands still: each look meets a new one."""

    def find(frame: FrameType) -> Any:
        return SimpleNamespace(started=time.perf_counter()), frame

    dog = watchdog.Watchdog(running.PATIENCE_SECONDS, find=find, on_held=lambda job_type: None)
    dog._loop_thread = HERE
    dog._beat = time.perf_counter() - 10 * running.PATIENCE_SECONDS
    dog._look(dog._beat)
    dog._note_turn()
    (held,) = eventually(lambda: seen, "not reported", seconds=running.PATIENCE_SECONDS)
    assert (held.job_type, held.stack) == (None, "")
    assert "several jobs one after the other" in caplog.text


def test_jobs_that_wait_hold_nothing(database: running.Database, seen: list[events.LoopHeld]) -> None:
    """For so long that a busy machine, which lets nobody compute meanwhile, is not taken for it."""
    greenjobs.configure(database_url=database.url, max_blocking=1)

    @job
    def wait(how: str) -> None:
        if how == "sleep":
            time.sleep(1.5)
            return
        with greenjobs.connection() as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(1.5)")

    wait.delay_many([("sleep",), ("sql",)])
    running.work_off(wait)
    assert of("wait", seen) == []


def test_handlers_are_called_in_the_thread_of_the_loop(database: running.Database, seen: list[events.LoopHeld]) -> None:
    threads: list[int] = []

    @job
    def block() -> None:
        hold()

    def note(event: events.LoopHeld) -> None:
        threads.append(native_ident())

    events.subscribe(note, events.LoopHeld)
    block.delay()
    with at_work():
        wait_for("block", seen)
    events.unsubscribe(note, events.LoopHeld)
    assert set(threads) == {HERE}


def test_lag_is_measured_also_from_another_thread_while_the_loop_is_held(
    database: running.Database, seen: list[events.LoopHeld]
) -> None:
    lags: list[float] = []

    @job
    def block() -> None:
        get_original("_thread", "start_new_thread")(look, ())
        while not lags:
            hold()

    def look() -> None:
        native_sleep(0.3)
        lags.append(dogs[0].lag)

    block.delay()
    with at_work() as handle:
        wait_for("block", seen)
        assert handle.loop.max_lag > 0.2
    assert lags[0] > 0.1


def test_with_0_it_measures_and_reports_nothing(database: running.Database, seen: list[events.LoopHeld]) -> None:
    greenjobs.configure(database_url=database.url, max_blocking=0)

    @job
    def block() -> None:
        native_sleep(0.6)

    block.delay()
    with at_work() as handle:
        eventually(lambda: handle.loop.max_lag > 0.2, "no lag", seconds=running.PATIENCE_SECONDS)
    assert seen == []


def test_stack_is_never_empty_where_something_was_seen() -> None:
    """A job may stand in C code that the executor calls."""
    here = sys._getframe()
    lines = watchdog._stack_below(here, here).splitlines()
    assert "in test_stack_is_never_empty_where_something_was_seen" in lines[0]
    assert len(lines) == 2


def test_what_comes_for_a_moment_after_a_job_is_not_blamed_for_the_time_of_that() -> None:
    """A job that held the loop has ended, and the loop has not had its turn yet."""
    attempt: Any = SimpleNamespace(started=0.0, row=SimpleNamespace(id=1, job_type="block"), place=None, number=1)
    found = [(attempt, sys._getframe()), None]
    dog = watchdog.Watchdog(60.0, find=lambda frame: found.pop(0), on_held=lambda job_type: None)
    dog._quiet["block"] = time.perf_counter() + 60.0, 0
    dog._loop_thread, dog._beat = HERE, time.perf_counter() - 100.0
    dog._look(dog._beat)
    dog._look(dog._beat)
    assert found == []
    assert [held.attempt for held in dog._open] == [attempt]


def test_loop_is_not_kept_busy_by_looks_at_it() -> None:
    dog = watchdog.Watchdog(0.000_01, find=lambda frame: None, on_held=lambda job_type: None)
    assert dog._interval == 0.005


def test_peaks_are_those_of_the_last_minute_only(monkeypatch: pytest.MonkeyPatch) -> None:
    dog = watchdog.Watchdog(0.5, find=lambda frame: None, on_held=lambda job_type: None)
    now = time.perf_counter()
    for age, lag in ((61, 9.0), (50, 3.0), (40, 1.0), (30, 2.0), (0, 0.1)):
        dog._note_peak(now - age, lag)
    assert dog.max_lag == 3.0
    assert [lag for _, lag in dog._peaks] == [3.0, 2.0, 0.1]


# --- on_blocking ------------------------------------------------------------------------------------------------------


def where(ran: list[bool]) -> None:
    is_here = native_ident() == HERE
    ran.append(is_here)
    if is_here:
        hold()


def test_repeat_offender_is_moved_to_threads(
    database: running.Database, seen: list[events.LoopHeld], caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[bool] = []

    @job(on_blocking="thread", aliases=["block_before"])
    def block() -> None:
        where(ran)

    with at_work():
        for count in (1, 2, 3):
            block.delay()
            wait_for("block", seen, count=count)
        block.delay_many([()] * 2)
        eventually(lambda: len(ran) == 5, "not run", seconds=running.PATIENCE_SECONDS)
    assert ran == [True, True, True, False, False]
    assert (
        caplog.text.count("jobs of the type block have held the event loop 3 times: they run in threads from now") == 1
    )
    assert database.count() == 0


def test_who_does_not_ask_for_it_is_not_moved(database: running.Database, seen: list[events.LoopHeld]) -> None:
    ran: list[bool] = []

    @job
    def block() -> None:
        where(ran)

    with at_work():
        for count in (1, 2, 3, 4):
            block.delay()
            wait_for("block", seen, count=count)
    assert ran == [True] * 4
