"""current_job.transaction(): what commits together, what does not, who is refused, and what is said about it."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import psycopg2
import pytest
import running
from gevent.event import Event
from psycopg2 import errors, extensions, extras
from waiting import eventually

import greenjobs
from greenjobs import Discard, Retry, Snooze, current_job, events, inspection, job, storage
from greenjobs.errors import CompletionError, JobLost, NoCurrentJob, OptionError, SchemaError
from greenjobs.events import AttemptEnded
from greenjobs.job import Job
from greenjobs.runner import Runner


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        database.rows("CREATE TABLE notes (what text)")
        yield database


@pytest.fixture
def inside(database: running.Database) -> Iterator[running.Database]:
    """For jobs that look at the database while the test does."""
    inside = running.Database(database.url)
    yield inside
    inside.connection.close()


@pytest.fixture
def ended() -> Iterator[list[AttemptEnded]]:
    seen: list[AttemptEnded] = []
    events.subscribe(seen.append)
    yield seen
    events.unsubscribe(seen.append)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The warnings and errors of greenjobs so far."""
    with caplog.at_level(logging.WARNING, "greenjobs"):
        yield lambda: [
            f"{record.levelname} {record.getMessage()}"
            for record in caplog.records
            if record.levelno >= logging.WARNING
        ]


def write(connection: Any, what: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO notes VALUES (%s)", (what,))


def notes(database: running.Database) -> list[str]:
    return database.column("SELECT what FROM notes ORDER BY what")


def take_away(database: running.Database, id: int) -> None:
    """As a rescuer does, and the runner that claims it next."""
    database.rows("UPDATE background_jobs SET claimed_by = -1, attempt = attempt + 1 WHERE id = %s", id)


# --- together ---------------------------------------------------------------------------------------------------------


def test_what_was_written_and_the_end_of_the_job_are_committed_together(
    database: running.Database, said: Callable[[], list[str]], ended: list[AttemptEnded]
) -> None:
    seen = []

    @job
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "written")
            seen.append((notes(database), database.state(current_job.id)))
        seen.append((notes(database), database.state(current_job.id)))

    work.delay()
    running.work_off(work)
    assert seen == [([], "running"), (["written"], None)]
    assert [(each.outcome, each.error) for each in ended] == [("done", None)]
    assert said() == []


def test_nothing_of_it_is_written_when_the_block_raises_and_the_job_is_tried_again(
    database: running.Database, said: Callable[[], list[str]]
) -> None:
    @job(backoff=[0.01])
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, f"attempt {current_job.attempt}")
            note.delay()
            if current_job.retries == 0:
                raise ValueError("first")

    @job(queue="others")
    def note() -> None: ...

    id = work.delay().id
    with running.started(Runner().register(work)):
        eventually(lambda: database.state(id) is None, "the job does not end", seconds=running.PATIENCE_SECONDS)
    assert notes(database) == ["attempt 2"]
    assert database.count("job_type = 'note'") == 1
    assert len(said()) == 1


def test_jobs_that_are_enqueued_in_the_block_share_its_fate(database: running.Database) -> None:
    seen: list[Any] = []

    @job(queue="others")
    def note(what: str) -> None: ...

    @job(queue="others", unique=True)
    def note_once(what: str) -> None: ...

    @job(max_retries=0)
    def work(fails: bool) -> None:
        note.delay("before")
        with current_job.transaction():
            note.delay("inside")
            note.delay_many([("many",), ("many",)])
            note.options(priority=5, delay=60).delay("later")
            note_once.delay("once")
            seen.append(note_once.delay("once").duplicate)
            seen.append(database.count("queue = 'others'"))
            if fails:
                raise ValueError("rolled back")
        note.delay("after")

    work.delay(True)
    running.work_off(work)
    assert seen == [True, 1]
    assert database.column("SELECT data->>'what' FROM background_jobs WHERE queue = 'others'") == ["before"]
    work.delay(False)
    running.work_off(work)
    assert seen == [True, 1, True, 2]
    counts = "SELECT data->>'what', count(*) FROM background_jobs WHERE queue = 'others' GROUP BY 1 ORDER BY 1"
    assert database.rows(counts) == [
        ("after", 1),
        ("before", 2),
        ("inside", 1),
        ("later", 1),
        ("many", 2),
        ("once", 1),
    ]


def test_job_that_is_enqueued_on_another_connection_is_not_part_of_it(database: running.Database) -> None:
    @job(queue="others")
    def note() -> None: ...

    @job(max_retries=0)
    def work() -> None:
        with contextlib.closing(psycopg2.connect(database.url)) as own, current_job.transaction():
            note.options(connection=own).delay()
            own.commit()
            raise ValueError("rolled back")

    work.delay()
    running.work_off(work)
    assert database.count("queue = 'others'") == 1


def test_job_that_another_greenlet_enqueues_is_not_part_of_it(database: running.Database) -> None:
    """Even one that was given the context of the job."""

    @job(queue="others")
    def note() -> None: ...

    @job(max_retries=0)
    def work() -> None:
        with current_job.transaction():
            gevent.spawn(contextvars.copy_context().run, note.delay).get()
            assert database.count("queue = 'others'") == 1
            raise ValueError("rolled back")

    work.delay()
    running.work_off(work)
    assert database.count("queue = 'others'") == 1
    assert database.value("SELECT errors->-1->>'error' FROM background_jobs WHERE job_type = 'work'") == "ValueError"


def test_two_jobs_at_once_each_have_their_own(database: running.Database) -> None:
    both = [Event(), Event()]

    @job(queue="others")
    def note(number: int) -> None: ...

    @job(max_retries=0)
    def work(number: int) -> None:
        with current_job.transaction() as connection:
            both[number].set()
            both[1 - number].wait()
            write(connection, str(number))
            note.delay(number)
            if number:
                raise ValueError("rolled back")

    work.delay_many([(0,), (1,)])
    running.work_off(work)
    assert notes(database) == ["0"]
    assert database.column("SELECT data->'number' FROM background_jobs WHERE queue = 'others'") == [0]


def test_unique_job_can_be_enqueued_again_in_its_own_completion(database: running.Database) -> None:
    ran = []

    @job(unique=True)
    def work(left: str) -> None:
        ran.append(current_job.id)
        with current_job.transaction():
            if len(ran) < 3:
                assert not work.delay(left).duplicate

    work.delay("x")
    running.work_off(work)
    assert len(ran) == 3
    assert database.count() == 0


# --- a connection of the job's own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [extensions.cursor, extras.RealDictCursor])
def test_connection_of_the_callers_is_committed_with_all_that_it_did_before(
    database: running.Database, factory: Any
) -> None:
    @job(queue="others")
    def note() -> None: ...

    @job(max_retries=0)
    def work(fails: bool) -> None:
        with contextlib.closing(psycopg2.connect(database.url, cursor_factory=factory)) as own:
            write(own, f"before {fails}")
            with current_job.transaction(own) as connection:
                assert connection is own
                write(own, f"inside {fails}")
                note.delay()
                if fails:
                    raise ValueError("rolled back")
            assert own.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE
            write(own, "after")  # not committed

    work.delay_many([(True,), (False,)])
    running.work_off(work)
    assert notes(database) == ["before False", "inside False"]
    assert (database.count("queue = 'others'"), database.count("state = 'failed'")) == (1, 1)


def test_cursor_stands_for_its_connection(database: running.Database) -> None:
    @job
    def work() -> None:
        own = psycopg2.connect(database.url)
        with contextlib.closing(own), current_job.transaction(own.cursor()) as cursor:
            cursor.execute("INSERT INTO notes VALUES ('written')")

    work.delay()
    running.work_off(work)
    assert (notes(database), database.count()) == (["written"], 0)


class Session(extensions.connection):
    """A connection that wants to be committed by itself, as sessions of other libraries do."""

    committed = 0

    def commit(self) -> None:
        self.committed += 1
        super().commit()


def test_commit_goes_through_what_was_given(database: running.Database) -> None:
    seen = []

    @job
    def work() -> None:
        with contextlib.closing(psycopg2.connect(database.url, connection_factory=Session)) as session:
            with current_job.transaction(session):
                write(session, "written")
            seen.append(session.committed)

    work.delay()
    running.work_off(work)
    assert (seen, notes(database), database.count()) == ([1], ["written"], 0)


def fail_once(database: running.Database, work: Job[[], None]) -> tuple[str, str]:
    """Run the job, which must fail; returns the error."""
    work.delay()
    running.work_off(work)
    ((error, message),) = database.rows("SELECT errors->-1->>'error', errors->-1->>'message' FROM background_jobs")
    return error, message


def test_commit_inside_the_block_is_noticed_at_its_end(database: running.Database) -> None:
    """The connection is the caller's: it cannot be prevented there."""

    @job(max_retries=0)
    def work() -> None:
        with contextlib.closing(psycopg2.connect(database.url)) as own, current_job.transaction(own):
            write(own, "too early")
            own.commit()
            write(own, "rolled back")

    error, message = fail_once(database, work)
    assert error == "CompletionError"
    assert "has been committed or rolled back inside the block" in message
    assert notes(database) == ["too early"]


@pytest.mark.parametrize("how", ["commit", "rollback", "with"])
def test_lent_connection_refuses_to_be_committed_inside_the_block(database: running.Database, how: str) -> None:
    @job(max_retries=0)
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "written")
            if how == "with":
                with connection:
                    write(connection, "written")
            else:
                getattr(connection, how)()

    error, message = fail_once(database, work)
    assert error == "CompletionError"
    assert f"{'commit' if how == 'with' else how}() in a block of current_job.transaction()" in message
    assert notes(database) == []


@pytest.mark.parametrize("how", ["reset", "set_isolation_level"])
def test_lent_connection_refuses_what_rolls_back_without_saying_so(database: running.Database, how: str) -> None:
    @job(max_retries=0)
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "lost")
            if how == "reset":
                connection.reset()
            else:
                connection.set_isolation_level(extensions.ISOLATION_LEVEL_SERIALIZABLE)
            write(connection, "half")

    error, message = fail_once(database, work)
    assert error == "CompletionError"
    assert f"{how}() in a block of current_job.transaction()" in message
    assert notes(database) == []


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "end; select 1"])
def test_statement_that_ends_the_transaction_of_the_block_is_noticed(
    database: running.Database, statement: str
) -> None:
    @job(max_retries=0)
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "before")
            connection.cursor().execute(statement)
            write(connection, "after")

    error, message = fail_once(database, work)
    assert error == "CompletionError"
    assert "has been committed or rolled back inside the block" in message


def test_isolation_level_may_be_set_before_anything_is_written(database: running.Database) -> None:
    levels = []

    @job
    def work() -> None:
        with current_job.transaction() as connection, connection.cursor() as cursor:
            connection.set_isolation_level(extensions.ISOLATION_LEVEL_SERIALIZABLE)
            cursor.execute("SHOW transaction_isolation")
            levels.extend(cursor.fetchone())
            write(connection, "written")

    work.delay()
    running.work_off(work)
    assert (levels, notes(database), database.count()) == (["serializable"], ["written"], 0)


def test_lent_connection_may_be_committed_when_it_is_lent_again(database: running.Database) -> None:
    @job
    def work() -> None:
        with current_job.transaction():
            pass
        with greenjobs.connection() as connection:
            write(connection, "committed")
            connection.commit()
            connection.rollback()

    work.delay()
    running.work_off(work)
    assert notes(database) == ["committed"]


@pytest.mark.parametrize("lent", [True, False])
def test_connection_in_autocommit_is_refused(database: running.Database, lent: bool) -> None:
    @job(max_retries=0)
    def work() -> None:
        with contextlib.closing(psycopg2.connect(database.url)) as own:
            own.autocommit = True
            with current_job.transaction(None if lent else own) as connection:
                connection.autocommit = True

    error, message = fail_once(database, work)
    assert error == "CompletionError"
    assert "is in autocommit, where every statement is committed by itself; set autocommit = False" in message


def test_what_is_no_connection_is_refused(database: running.Database) -> None:
    @job(max_retries=0)
    def work() -> None:
        with current_job.transaction("postgresql://…"):
            pass

    assert fail_once(database, work)[0] == OptionError.__name__


def test_connection_to_a_database_without_the_tables_is_refused(
    database: running.Database, empty_database_url: str
) -> None:
    @job(max_retries=0)
    def work() -> None:
        with contextlib.closing(psycopg2.connect(empty_database_url)) as own, current_job.transaction(own):
            pass

    error, message = fail_once(database, work)
    assert error == SchemaError.__name__
    assert "the tables of greenjobs are not in its database" in message


# --- fenced -----------------------------------------------------------------------------------------------------------


def test_job_that_was_taken_away_is_rolled_back(
    database: running.Database, said: Callable[[], list[str]], ended: list[AttemptEnded]
) -> None:
    @job(queue="others")
    def note() -> None: ...

    @job
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "written")
            note.delay()
            take_away(database, current_job.id)

    id = work.delay().id
    running.work_off(work)
    assert (notes(database), database.count("queue = 'others'")) == ([], 0)
    assert database.rows("SELECT claimed_by, state, retries FROM background_jobs WHERE id = %s", id) == [
        (-1, "running", 0)
    ]
    assert [(each.outcome, type(each.error)) for each in ended] == [("interrupted", JobLost)]
    assert (
        f"WARNING job {id} (work) is no longer held here (claim 1); what its transaction wrote is rolled back" in said()
    )


@pytest.mark.parametrize("goes_on", ["returns", "raises", "again"])
def test_job_that_does_not_listen_is_lost_all_the_same(
    database: running.Database, inside: running.Database, goes_on: str, ended: list[AttemptEnded]
) -> None:
    """Whatever it does about JobLost, it is not done: another database, for example, may hold a row of the same id."""

    @job
    def work() -> None:
        try:
            with current_job.transaction() as connection:
                write(connection, "written")
                take_away(inside, current_job.id)
        except BaseException:
            inside.rows("UPDATE background_jobs SET claimed_by = (SELECT max(id) FROM background_runners), attempt = 1")
        if goes_on == "raises":
            raise ValueError("mine")
        if goes_on == "again":
            with current_job.transaction() as connection:
                write(connection, "written")

    id = work.delay().id
    with running.started(Runner().register(work)):
        database.wait_for("state = 'scheduled'")
    row = database.rows(
        "SELECT retries, errors, run_at > now() + interval '50 s' FROM background_jobs WHERE id = %s", id
    )
    assert notes(database) == []
    if goes_on == "raises":
        assert row[0][0] == 1
    else:
        assert row == [(0, None, True)]
        assert [each.outcome for each in ended] == ["interrupted"]


def test_who_takes_the_job_while_it_commits_finds_it_gone(database: running.Database) -> None:
    """The rescuer waits for the lock of the row; of the two that want it, one gets it."""
    rescuer = psycopg2.connect(database.url)
    rescued: list[int] = []

    def rescue() -> None:
        with rescuer.cursor() as cursor:
            cursor.execute("UPDATE background_jobs SET claimed_by = -1 WHERE state = 'running'")
            rescued.append(cursor.rowcount)

    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    class SlowToCommit(extensions.connection):
        def commit(self) -> None:
            others.append(gevent.spawn(rescue))
            eventually(lambda: database.value(waiting) == 1, "nobody waits for the row")
            super().commit()

    others: list[Any] = []

    @job
    def work() -> None:
        own = psycopg2.connect(database.url, connection_factory=SlowToCommit)
        with contextlib.closing(own), current_job.transaction(own):
            write(own, "written")

    work.delay()
    running.work_off(work)
    gevent.joinall(others, raise_error=True)
    rescuer.close()
    assert (rescued, notes(database), database.count()) == ([0], ["written"], 0)


def test_runner_that_got_another_id_completes_what_it_claimed_under_the_former(database: running.Database) -> None:
    began, go_on = Event(), Event()

    @job
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, f"attempt {current_job.attempt}")
            began.set()
            go_on.wait()

    work.delay()
    with running.started(Runner().register(work)) as handle:
        began.wait()
        first = handle.runner_id
        database.terminate_sessions("greenjobs session")
        eventually(lambda: handle.runner_id not in (None, first), "no session", seconds=running.PATIENCE_SECONDS)
        go_on.set()
        eventually(lambda: database.count() == 0, "it does not complete", seconds=running.PATIENCE_SECONDS)
    assert notes(database) == ["attempt 1"]


def test_job_that_is_adopted_while_its_completion_is_on_its_way_completes(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement was sent with the ids of before, and reaches a row that is held under a new one."""
    original = storage.acknowledge
    calls = []

    def adopt_meanwhile(connection: Any, runners: Any, done: Any) -> set[int]:
        if not connection.autocommit and not calls:
            calls.append(runners)
            database.rows("UPDATE background_jobs SET claimed_by = 1000000")
            handle._service.runner_ids.append(1000000)
        return original(connection, runners, done)

    monkeypatch.setattr(storage, "acknowledge", adopt_meanwhile)

    @job
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, f"attempt {current_job.attempt}")

    work.delay()
    handle = Runner().register(work).shutdown_when_queue_empty().start()
    assert handle.wait_for_shutdown(running.PATIENCE_SECONDS)
    assert (len(calls), notes(database), database.count()) == (1, ["attempt 1"], 0)


# --- after it has completed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", [ValueError("mine"), Retry("again"), Snooze(5), Discard("no"), SystemExit(1)])
def test_what_it_raises_after_it_has_completed_changes_nothing(
    database: running.Database, raised: BaseException, said: Callable[[], list[str]], ended: list[AttemptEnded]
) -> None:
    hooks: list[AttemptEnded] = []

    @job(on_failure=hooks.append, on_discard=hooks.append, max_retries=0)
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "written")
        raise raised

    id = work.delay().id
    running.work_off(work)
    assert (notes(database), database.count()) == (["written"], 0)
    assert [(each.outcome, each.error) for each in ended] == [("done", raised)]
    assert hooks == []
    completed = f"job {id} (work) raised after it had completed in its own transaction: it is done, and not tried again"
    assert said() == [f"ERROR {completed}"]


@pytest.mark.parametrize("again", ["after", "inside"])
def test_it_completes_once(database: running.Database, again: str, ended: list[AttemptEnded]) -> None:
    @job(max_retries=0)
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "first")
            if again == "inside":
                with current_job.transaction():
                    pass
        with current_job.transaction() as connection:
            write(connection, "second")

    work.delay()
    running.work_off(work)
    (event,) = ended
    assert isinstance(event.error, CompletionError)
    if again == "inside":
        assert (notes(database), event.outcome) == ([], "failed")
        assert "is in a block of current_job.transaction() already" in str(event.error)
    else:
        assert (notes(database), event.outcome) == (["first"], "done")
        assert "has completed already" in str(event.error)


def test_block_that_was_rolled_back_can_be_tried_again_in_the_same_attempt(database: running.Database) -> None:
    @job
    def work() -> None:
        for number in range(3):
            with contextlib.suppress(errors.DivisionByZero), current_job.transaction() as connection:
                write(connection, f"try {number}")
                connection.cursor().execute("SELECT 1 / %s", (number,))
                return

    work.delay()
    running.work_off(work)
    assert (notes(database), database.count()) == (["try 1"], 0)


def test_error_that_the_block_catches_does_not_let_the_job_complete_half(database: running.Database) -> None:
    """psycopg2 lets a failed transaction be committed, which rolls it back and says nothing."""

    @job(max_retries=0)
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "half")
            with contextlib.suppress(errors.DivisionByZero):
                connection.cursor().execute("SELECT 1 / 0")

    assert fail_once(database, work)[0] == "InFailedSqlTransaction"
    assert notes(database) == []


def test_job_that_is_interrupted_after_it_has_completed_is_done(
    database: running.Database, said: Callable[[], list[str]], ended: list[AttemptEnded]
) -> None:
    completed = Event()

    @job
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "written")
        completed.set()
        gevent.sleep(600)

    work.delay()
    with running.started(Runner().register(work)) as handle:
        completed.wait()
        handle.shutdown(urgency=2)
        assert handle.wait_for_shutdown(running.PATIENCE_SECONDS)
    assert (notes(database), database.count()) == (["written"], 0)
    assert [each.outcome for each in ended] == ["done"]
    assert said() == []


def test_suspect_that_has_completed_makes_way_for_the_next_at_once(database: running.Database) -> None:
    """Of jobs whose runner died, a runner holds one at a time; and looks for the next when that has ended."""
    ran = []

    @job
    def work(number: int) -> None:
        with current_job.transaction():
            ran.append(number)

    work.delay_many([(number,) for number in range(5)])
    database.rows("UPDATE background_jobs SET crashes = 1")
    runner = Runner().register(work).configure_queue("default", pool=5, poll_interval=600)
    with running.started(runner) as handle:
        handle._maintenance.look(["default"])
        eventually(lambda: len(ran) == 5, "the suspects do not follow", seconds=running.PATIENCE_SECONDS)
    assert database.count() == 0


def test_audit_misses_nothing_while_a_completed_job_goes_on(database: running.Database) -> None:
    completed, go_on = Event(), Event()

    @job
    def work() -> None:
        with current_job.transaction():
            pass
        completed.set()
        go_on.wait()

    id = work.delay().id
    with running.started(Runner().register(work)) as handle:
        completed.wait()
        assert handle.held_ids() == {id}
        assert inspection.held_jobs(database.connection, [handle.runner_id or 0], age_seconds=0) == []
        handle._maintenance.audit()
        go_on.set()
    assert database.count() == 0


# --- refused ----------------------------------------------------------------------------------------------------------


def test_there_is_none_outside_a_job(database: running.Database) -> None:
    with pytest.raises(NoCurrentJob), current_job.transaction():
        pass


def test_other_greenlet_of_the_job_cannot_complete_it(database: running.Database) -> None:
    def complete() -> None:
        with current_job.transaction():
            pass

    @job(max_retries=0)
    def work() -> None:
        gevent.spawn(contextvars.copy_context().run, complete).get()

    error, message = fail_once(database, work)
    assert error == "CompletionError"
    assert "in a greenlet or thread that it started; only the job's own can complete it" in message


@pytest.mark.parametrize("raises", [True, False])
def test_job_that_ends_inside_its_block_has_failed(database: running.Database, raises: bool) -> None:
    left_open = []

    @job(max_retries=0)
    def work() -> None:
        block = current_job.transaction()
        left_open.append(block)
        write(block.__enter__(), "written")
        if raises:
            raise ValueError("mine")

    error, _ = fail_once(database, work)
    assert error == ("ValueError" if raises else "CompletionError")
    left_open[0].__exit__(None, None, None)
    assert (notes(database), database.sessions().count("greenjobs job")) == ([], 1)


# --- interrupted, cut off ---------------------------------------------------------------------------------------------


def test_timeout_inside_the_block_rolls_back(database: running.Database) -> None:
    @job(timeout=0.1, max_retries=0)
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "half")
            connection.cursor().execute("SELECT pg_sleep(600)")

    assert fail_once(database, work)[0] == "JobTimeout"
    assert notes(database) == []
    with greenjobs.connection() as connection:
        write(connection, "the pool goes on")


def test_job_that_is_cancelled_inside_the_block_is_gone_and_wrote_nothing(database: running.Database) -> None:
    began = Event()

    @job
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, "half")
            began.set()
            gevent.sleep(600)

    handle = work.delay()
    with running.started(Runner().register(work)):
        began.wait()
        assert handle.cancel() == "asked"
        eventually(lambda: database.count() == 0, "it is not cancelled", seconds=running.PATIENCE_SECONDS)
    assert notes(database) == []


@pytest.mark.parametrize("when", ["before the acknowledge", "before the commit"])
def test_session_that_ends_before_it_commits_takes_all_of_it_along(
    database: running.Database, inside: running.Database, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    original = storage.acknowledge

    def cut(connection: Any, *arguments: Any) -> set[int]:
        """The first one of a job's own."""
        if connection.autocommit or current_job.retries:
            return original(connection, *arguments)
        if when == "before the acknowledge":
            inside.terminate_sessions("greenjobs job")
        held = original(connection, *arguments)
        inside.terminate_sessions("greenjobs job")
        return held

    monkeypatch.setattr(storage, "acknowledge", cut)

    @job(backoff=[0.01])
    def work() -> None:
        with current_job.transaction() as connection:
            write(connection, f"attempt {current_job.attempt}")

    work.delay()
    with running.started(Runner().register(work)):
        eventually(lambda: database.count() == 0, "the job does not end", seconds=running.PATIENCE_SECONDS)
    assert notes(database) == ["attempt 2"]


class Unanswered(extensions.connection):
    """Its commits are done, and the answer is lost."""

    def commit(self) -> None:
        super().commit()
        self.close()
        raise psycopg2.OperationalError("server closed the connection unexpectedly")


def test_commit_that_was_done_and_not_answered_is_not_done_again(
    database: running.Database, said: Callable[[], list[str]]
) -> None:
    @job(backoff=[0.01])
    def work() -> None:
        with current_job.transaction(psycopg2.connect(database.url, connection_factory=Unanswered)) as connection:
            write(connection, f"attempt {current_job.attempt}")

    id = work.delay().id
    running.work_off(work)
    assert (notes(database), database.count()) == (["attempt 1"], 0)
    assert said()[-1] == f"WARNING job {id} is no longer held here (claim 1): its outcome changes nothing"
