"""Handles of jobs: how they are doing, and waiting for their end, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import gevent
import processes
import psycopg2
import pytest
import running
from gevent.pool import Pool
from waiting import eventually

import greenjobs
from greenjobs import Discard, Runner, current_job, job, jobs, storage, watch
from greenjobs.errors import (
    DatabaseUnavailable,
    JobFailed,
    JobNotCommitted,
    JobNotEnded,
    OptionError,
    SchemaError,
)
from greenjobs.handle import JobHandle
from greenjobs.pool import connect
from greenjobs.storage import Fence, NewJobs

_PATIENCE = running.PATIENCE_SECONDS


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        yield database


class Gate:
    """Where jobs wait until a test lets them go on."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def pass_through(self) -> None:
        self.entered.release()
        assert self.opened.wait(_PATIENCE)

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=_PATIENCE)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def waiting_in(function: Callable[[], Any]) -> gevent.Greenlet[..., Any]:
    """The call in a greenlet of its own."""
    return gevent.spawn(function)


LISTENING = """
SELECT pid
FROM pg_stat_activity
WHERE datname = current_database()
    AND application_name = 'greenjobs wait'
    AND state = 'idle'
    AND query LIKE 'EXECUTE %look_at_job%'
"""


def listens(database: running.Database, count: int = 1, besides: Sequence[int] = ()) -> list[int]:
    """Block until so many calls wait, on other connections than these; returns the ids of their sessions.

    They look once after they listen, and are idle then; so they are, too, where that look has only been prepared.
    """

    def new() -> list[int]:
        pids = [pid for pid in database.column(LISTENING) if pid not in besides]
        return pids if len(pids) == count else []

    return eventually(new, "they do not listen", seconds=_PATIENCE)


# --- handles ----------------------------------------------------------------------------------------------------------


def test_status_follows_the_job(database: running.Database, gate: Gate) -> None:
    @job(keep="1 day", max_retries=0)
    def work(fails: bool = False) -> None:
        gate.pass_through()
        if fails:
            raise ValueError

    later = work.options(delay=3600).delay()
    handle, failing = work.delay(), work.delay(True)
    assert (later.status(), handle.status()) == ("scheduled", "available")
    with running.started(Runner().register(work)):
        gate.wait_entered()
        gate.wait_entered()
        assert handle.status() == "running"
        gate.opened.set()
        assert (handle.wait(_PATIENCE), failing.wait(_PATIENCE)) == ("done", "failed")
    assert (handle.status(), failing.status()) == ("done", "failed")
    later.cancel()
    jobs.discard(failing.id)
    assert (later.status(), failing.status()) == ("cancelled", "discarded")
    assert jobs.handle(99_999).status() == "gone"


def test_handle_of_an_id_is_as_good_as_the_one_that_enqueued(database: running.Database) -> None:
    @job(keep="1 day", keep_result=True)
    def work() -> int:
        return 7

    handle = work.delay()
    same = pickle.loads(pickle.dumps(handle))
    assert same == handle
    running.work_off(work)
    assert same.result(0) == jobs.handle(handle.id).result(0) == 7


@pytest.mark.parametrize("id", [0, -1, "7", 2**63, True, None])
def test_handle_of_what_is_no_id_is_refused(id: Any) -> None:
    with pytest.raises(OptionError, match="is not the id of a job"):
        jobs.handle(id)


@pytest.mark.parametrize("timeout", [-1, "soon", float("nan"), True])
def test_wrong_timeout_is_refused(timeout: Any) -> None:
    with pytest.raises(OptionError, match="timeout is .*; allowed: 0 or more seconds"):
        jobs.handle(1).wait(timeout)


def test_missing_tables_say_what_to_type(empty_database_url: str) -> None:
    with running.application(empty_database_url), pytest.raises(SchemaError, match="greenjobs migrate"):
        jobs.handle(1).status()


def test_database_that_does_not_answer_at_first_is_said_so(database: running.Database) -> None:
    greenjobs.configure(database_url="postgresql://127.0.0.1:1/nowhere")
    with pytest.raises(DatabaseUnavailable):
        jobs.handle(1).wait(_PATIENCE)


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_end_of_every_kind_is_told_to_who_waits(database: running.Database, gate: Gate) -> None:
    """Of jobs that are not kept: the notification is all there is."""

    @job(max_retries=0)
    def work(how: str) -> None:
        gate.pass_through()
        if how == "failed":
            raise ValueError
        if how == "discarded":
            raise Discard

    handles = {how: work.delay(how) for how in ("done", "failed", "discarded", "cancelled")}
    removed = work.options(delay=3600).delay("removed")
    by_hand = work.options(delay=3600).delay("by hand")
    back = work.options(delay=3600).delay("back")
    everyone = [*handles.values(), removed, by_hand, back]
    with running.started(Runner().register(work)):
        for _ in handles:
            gate.wait_entered()
        waits = [waiting_in(lambda handle=handle: handle.wait(_PATIENCE)) for handle in everyone]  # type: ignore[misc]
        database.wait_for("is_watched", count=len(everyone))
        assert handles["cancelled"].cancel() == "asked"
        assert removed.cancel() == "removed"
        jobs.discard(by_hand.id)
        database.rows("UPDATE background_jobs SET cancel_asked_at = now() WHERE id = %s", back.id)
        gate.opened.set()
        outcomes = [wait.get(timeout=_PATIENCE) for wait in waits]
    assert outcomes == ["done", "failed", "discarded", "cancelled", "cancelled", "discarded", "cancelled"]
    assert database.column("SELECT state FROM background_jobs") == ["failed"]


def test_retries_and_snoozes_are_not_the_end(database: running.Database) -> None:
    attempts = []

    @job(backoff=0.01)
    def work() -> None:
        attempts.append(current_job.attempt)
        if len(attempts) == 1:
            raise ValueError
        if len(attempts) == 2:
            raise greenjobs.Snooze(0.01)

    handle = work.delay()
    wait = waiting_in(lambda: handle.wait(_PATIENCE))
    listens(database)
    with running.started(Runner().register(work)):
        assert wait.get(timeout=_PATIENCE) == "done"
    assert len(attempts) == 3


def test_job_that_has_ended_is_not_waited_for_and_costs_no_connection(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> Any:
        raise AssertionError("no connection is needed")

    @job(keep="1 day")
    def kept() -> None: ...

    @job
    def gone() -> None: ...

    handles = [kept.delay(), gone.delay()]
    running.work_off(kept, gone)
    monkeypatch.setattr(watch, "connect", refuse)
    assert [handle.wait(0) for handle in handles] == ["done", "gone"]


@pytest.mark.parametrize("timeout", [0, 0.05, timedelta(milliseconds=50)])
def test_wait_ends_when_the_time_is_up_and_the_job_goes_on(database: running.Database, timeout: Any) -> None:
    @job
    def work() -> None: ...

    handle = work.delay()
    message = rf"job {handle.id} \(work\) has not ended within .*; it is available"
    with pytest.raises(JobNotEnded, match=message) as raised:
        handle.wait(timeout)
    assert isinstance(raised.value, TimeoutError)
    assert (raised.value.id, raised.value.status) == (handle.id, "available")
    with pytest.raises(JobNotEnded):
        handle.result(timeout)
    running.work_off(work)
    assert handle.status() == "gone"
    eventually(lambda: "greenjobs wait" not in database.sessions(), "the connection is closed", seconds=_PATIENCE)


@pytest.mark.parametrize("keep", [None, "1 day"])
def test_hundred_fast_jobs_that_twenty_wait_for_at_once_all_end_as_they_did(
    database: running.Database, keep: str | None
) -> None:
    """Waits begin before, while, and after their jobs run; none hangs, and what they say is right."""

    @job(keep=keep, max_retries=0)
    def work(number: int) -> None:
        if number % 5 == 3:
            raise ValueError
        if number % 5 == 4:
            raise Discard

    expected = {0: "done", 1: "done", 2: "done", 3: "failed", 4: "discarded"}
    with running.started(Runner().register(work)):

        def call(number: int) -> tuple[int, str]:
            return number, work.delay(number).wait(_PATIENCE)

        outcomes = list(Pool(20).imap_unordered(call, range(100)))
    assert len(outcomes) == 100
    for number, outcome in outcomes:
        # Of what is not kept, and ended before anybody waited, nothing is known.
        assert outcome == expected[number % 5] or (keep is None and number % 5 != 3 and outcome == "gone")
    eventually(lambda: "greenjobs wait" not in database.sessions(), "connections are closed", seconds=_PATIENCE)


def test_many_waits_for_one_job_all_end(database: running.Database, gate: Gate) -> None:
    @job
    def work() -> None:
        gate.pass_through()

    handle = work.delay()
    with running.started(Runner().register(work)):
        gate.wait_entered()
        waits = [waiting_in(lambda: handle.wait(_PATIENCE)) for _ in range(20)]
        listens(database, count=20)
        gate.opened.set()
        assert {wait.get(timeout=_PATIENCE) for wait in waits} == {"done"}


def test_waits_take_no_connection_from_those_who_enqueue(database_url: str, gate: Gate) -> None:
    with running.application(database_url, enqueue_connections=1, enqueue_timeout=_PATIENCE) as database:

        @job
        def work() -> None:
            gate.pass_through()

        handle = work.delay()
        waits = [waiting_in(lambda: handle.wait(_PATIENCE)) for _ in range(5)]
        listens(database, count=5)
        other = work.delay()
        gate.opened.set()
        with running.started(Runner().register(work)):
            assert {wait.get(timeout=_PATIENCE) for wait in waits} == {"done"}
            assert other.wait(_PATIENCE) in ("done", "gone")


def test_wait_outlives_its_connection(database: running.Database, gate: Gate) -> None:
    @job
    def work() -> None:
        gate.pass_through()

    handle = work.delay()
    with running.started(Runner().register(work)):
        gate.wait_entered()
        wait = waiting_in(lambda: handle.wait(_PATIENCE))
        former: list[int] = []
        for _ in range(3):
            former += listens(database, besides=former)
            assert database.terminate_sessions("greenjobs wait") == 1
        listens(database, besides=former)
        gate.opened.set()
        assert wait.get(timeout=_PATIENCE) == "done"


def test_end_during_a_lost_connection_is_seen_by_the_look_after_it(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    @job(keep="1 day")
    def work() -> None: ...

    handle = work.delay()
    connects = []

    def connect_later(*args: Any, **options: Any) -> Any:
        connects.append(1)
        if len(connects) == 1:
            raise DatabaseUnavailable("not now")
        if len(connects) == 2:
            running.work_off(work)
            raise DatabaseUnavailable("still not")
        raise AssertionError("it has ended by now")

    monkeypatch.setattr(watch, "connect", connect_later)
    assert handle.wait(_PATIENCE) == "done"


def test_end_between_the_mark_and_the_look_is_told(database: running.Database) -> None:
    """The row is gone by then, and was never seen; but whoever ended it has notified."""

    @job
    def work() -> None: ...

    handle = work.delay()
    listener = connect(database.url, application_name="greenjobs wait", timeout_seconds=_PATIENCE)
    with contextlib.closing(psycopg2.connect(database.url)) as holder:
        with holder.cursor() as cursor:
            cursor.execute("LOCK TABLE background_history")  # which the look reads, and the mark does not
        waiting = waiting_in(lambda: watch._listen(listener, handle.id, time.monotonic() + _PATIENCE))
        held_up = "SELECT 1 FROM pg_locks WHERE pid = %s AND relation = 'background_history'::regclass AND NOT granted"
        eventually(lambda: database.rows(held_up, listener.info.backend_pid), "it does not look", seconds=_PATIENCE)
        with holder.cursor() as cursor:
            cursor.execute(
                "UPDATE background_jobs SET state = 'running', attempt = 1, claimed_by = 1, claimed_at = now()"
            )
        assert storage.end(holder, [1], [storage.Ended(Fence(handle.id, 1), "discarded")]) == {handle.id}
        holder.commit()
        assert waiting.get(timeout=_PATIENCE).status == "discarded"
    listener.close()


def test_notification_that_has_arrived_is_heard_although_the_time_is_up(database: running.Database) -> None:
    listener = connect(database.url, application_name="greenjobs wait", timeout_seconds=_PATIENCE)
    with contextlib.closing(listener):
        storage.listen_for_end(listener, 1)
        database.rows("SELECT pg_notify('greenjobs_ended_' || 'background_jobs'::regclass::oid || '_1', 'discarded')")
        eventually(lambda: watch._is_readable(listener, 0), "nothing arrives", seconds=_PATIENCE)
        assert watch._hear(listener, time.monotonic()) == "discarded"
        assert watch._hear(listener, time.monotonic()) is None


def test_row_that_was_deleted_by_hand_is_gone(database: running.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells of it: the look of every few seconds sees it."""
    monkeypatch.setattr(watch, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(watch, "_NOTIFICATION_SECONDS", 0.1)

    @job
    def work() -> None: ...

    handle = work.delay()
    wait = waiting_in(lambda: handle.wait(_PATIENCE))
    listens(database)
    database.rows("DELETE FROM background_jobs")
    assert wait.get(timeout=_PATIENCE) == "gone"


def test_behind_a_pooler_a_wait_looks_now_and_then(
    database: running.Database, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = watch.connect

    def pooled(*args: Any, **options: Any) -> Any:
        connection = real(*args, **options)
        connection.is_pooled = True
        return connection

    def refuse(*args: object) -> None:
        raise AssertionError("a pooler passes no notification on")

    monkeypatch.setattr(watch, "connect", pooled)
    monkeypatch.setattr(storage, "listen_for_end", refuse)

    @job(keep="1 day", keep_result=True)
    def work() -> int:
        gate.pass_through()
        return 7

    handle = work.delay()
    with pytest.raises(JobNotEnded):
        handle.wait(0.05)
    with running.started(Runner().register(work)):
        gate.wait_entered()
        wait = waiting_in(lambda: handle.result(_PATIENCE))
        gate.opened.set()
        assert wait.get(timeout=_PATIENCE) == 7


def test_wait_listens_on_the_direct_way(database_url: str, gate: Gate) -> None:
    separator = "&" if "?" in database_url else "?"
    direct = f"{database_url}{separator}options=-c%20greenjobs.way%3Ddirect"
    with running.application(database_url, session_url=direct) as database:

        @job
        def work() -> None: ...

        seen = []
        real = watch.connect

        def note(url: str, **options: Any) -> Any:
            seen.append(url)
            return real(url, **options)

        handle = work.delay()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watch, "connect", note)
            waiting = waiting_in(lambda: handle.wait(_PATIENCE))
            listens(database)
            waiting.kill()
        assert seen == [direct]
        assert database.count("is_watched") == 1


def test_waiting_leaves_other_greenlets_alone(database: running.Database) -> None:
    """A green program goes on while somebody waits in it."""

    @job
    def work() -> None: ...

    handle = work.delay()
    turns = 0

    def turn() -> None:
        nonlocal turns
        while True:
            gevent.sleep(0.001)
            turns += 1

    waiting = waiting_in(lambda: handle.wait(_PATIENCE))
    listens(database)
    turning = gevent.spawn(turn)
    eventually(lambda: turns > 20, "the other greenlet does not go on", seconds=_PATIENCE)
    assert not waiting.ready()
    turning.kill()
    waiting.kill()


def test_job_that_waits_for_another_is_interrupted_by_its_timeout(database: running.Database) -> None:
    """JobTimeout is a TimeoutError, and so an OSError: it must not be taken for a bad day of the network."""
    caught = []

    @job
    def never() -> None: ...

    @job(timeout=0.3, max_retries=0)
    def impatient(id: int) -> None:
        try:
            jobs.handle(id).wait()
        except TimeoutError as error:
            caught.append(type(error).__name__)

    other = never.options(delay=3600).delay()
    impatient.delay(other.id)
    running.work_off(impatient)
    assert caught == ["JobTimeout"]


# --- transactions -----------------------------------------------------------------------------------------------------


def test_wait_in_the_transaction_that_enqueued_is_refused_at_once(database: running.Database) -> None:
    @job(keep="1 day")
    def work() -> None: ...

    connection = psycopg2.connect(database.url)
    with connection:
        handle = work.options(connection=connection).delay()
        assert handle.status() == "available"
        with pytest.raises(JobNotCommitted, match=rf"job {handle.id} .*commit, and wait then"):
            handle.wait()
    running.work_off(work)
    with connection:
        connection.cursor().execute("SELECT 1")  # another transaction of the same connection
        assert handle.wait(0) == "done"
    connection.close()


def test_job_of_a_transaction_that_rolled_back_is_gone(database: running.Database) -> None:
    @job
    def work() -> None: ...

    connection = psycopg2.connect(database.url)
    handle = work.options(connection=connection).delay()
    connection.rollback()
    assert handle.wait(0) == "gone"
    broken = work.options(connection=connection).delay()
    with pytest.raises(psycopg2.Error):
        connection.cursor().execute("SELECT 1 / 0")
    assert broken.wait(0) == "gone"
    connection.close()
    assert broken.status() == "gone"


def test_job_that_is_done_and_gone_is_no_uncommitted_one_in_the_next_transaction(database: running.Database) -> None:
    @job
    def work() -> None: ...

    connection = psycopg2.connect(database.url)
    with connection:
        handle = work.options(connection=connection).delay()
    running.work_off(work)
    with connection:
        connection.cursor().execute("SELECT 1")
        assert handle.wait(0) == "gone"
    connection.close()


# --- deaths -----------------------------------------------------------------------------------------------------------

APPLICATION = """
    import os, time
    from greenjobs import current_job, job

    @job(keep="1 day", keep_result=True)
    def work():
        print("working", flush=True)
        while not os.path.exists("may-end"):
            time.sleep(0.01)
        return current_job.row.crashes

    @job
    def unkept():
        print("working", flush=True)
        while not os.path.exists("may-end"):
            time.sleep(0.01)
"""


@pytest.mark.parametrize(("name", "outcome"), [("work", 1), ("unkept", "done")])
def test_wait_goes_on_when_the_runner_is_killed_and_another_takes_over(
    database: running.Database, tmp_path: Path, name: str, outcome: object
) -> None:
    processes.write_application(tmp_path, APPLICATION)
    database.rows("INSERT INTO background_jobs (job_type, data) VALUES (%s, '{}')", name)
    handle: JobHandle = jobs.handle(1)
    wait = handle.result if name == "work" else handle.wait
    with processes.runner(tmp_path, database.url) as first:
        first.wait_for_line("^working")
        waiting = waiting_in(lambda: wait(2 * _PATIENCE))
        listens(database)
        first.kill()
    (tmp_path / "may-end").touch()
    with processes.runner(tmp_path, database.url):
        assert waiting.get(timeout=2 * _PATIENCE) == outcome


def test_job_that_killed_too_many_runners_has_failed_for_who_waits(database: running.Database) -> None:
    @job
    def work() -> None: ...

    handle = work.delay()
    dead = connect(database.url, application_name="dead", timeout_seconds=10)
    runner = storage.register_runner(dead, hostname="here", pid=1, version="0", queues={}, job_types=["work"])
    storage.claim(dead, runner=runner, queue="default", job_types=["work"], limit=1)
    wait = waiting_in(lambda: handle.result(_PATIENCE))
    listens(database)
    dead.close()
    (rescued,) = storage.rescue(database.connection, [runner], most_crashes=1)
    assert rescued.has_failed
    with pytest.raises(JobFailed, match="RunnerDied: its runner died 1 times"):
        wait.get(timeout=_PATIENCE)


# --- who is notified --------------------------------------------------------------------------------------------------


def test_nobody_is_notified_of_jobs_that_nobody_watches(database: running.Database) -> None:
    connection = connect(database.url, application_name="test", timeout_seconds=10)
    storage.enqueue(connection, [NewJobs("work", ["{}"] * 2, "default")])
    rows = storage.claim(connection, runner=11, queue="default", job_types=["work"], limit=2)
    for row in rows:
        storage.listen_for_end(connection, row.id)
    storage.watch(connection, rows[1].id)
    storage.acknowledge(connection, [11], [Fence(row.id, row.attempt) for row in rows])
    connection.poll()
    table = database.value("SELECT 'background_jobs'::regclass::oid::bigint")
    assert [(each.channel, each.payload) for each in connection.notifies] == [
        (f"greenjobs_ended_{table}_{rows[1].id}", "done")
    ]
    connection.close()


def test_runners_hear_nothing_of_ends(database: running.Database) -> None:
    ear = psycopg2.connect(database.url)
    ear.autocommit = True
    ear.cursor().execute(f"LISTEN {storage.CHANNEL}")
    connection = connect(database.url, application_name="test", timeout_seconds=10)
    storage.enqueue(connection, [NewJobs("work", ["{}"], "default")])
    (row,) = storage.claim(connection, runner=11, queue="default", job_types=["work"], limit=1)
    storage.watch(connection, row.id)
    storage.acknowledge(connection, [11], [Fence(row.id, row.attempt)])
    ear.cursor().execute("SELECT 1")
    ear.poll()
    assert ear.notifies == []
    ear.close()
    connection.close()


# --- without gevent ---------------------------------------------------------------------------------------------------

THREADS = """
    from concurrent.futures import ThreadPoolExecutor
    from app import work

    def call(number):
        return work.delay(number).result(timeout=60)

    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(call, range(100))) == [2 * number for number in range(100)]

    import sys
    assert "gevent" not in sys.modules
    print("all right", flush=True)
"""


def test_threads_of_a_process_without_gevent_wait_as_well(database: running.Database, tmp_path: Path) -> None:
    code = """
        from greenjobs import job

        @job(keep="1 day", keep_result=True)
        def work(number: int) -> int:
            return 2 * number
    """
    processes.write_application(tmp_path, code)
    processes.write_application(tmp_path, THREADS, name="threads.py")
    with processes.runner(tmp_path, database.url):
        assert processes.run("python", "threads.py", folder=tmp_path, database_url=database.url) == "all right\n"
