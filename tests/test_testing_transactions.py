"""Jobs in the transaction of a test: what they are lent, how they complete there, and what is kept of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
import sqlalchemy as sa
from psycopg2 import sql
from running import Database, application
from sqlalchemy import orm

import greenjobs
from greenjobs import Discard, current_job, job, jobs, testing
from greenjobs.errors import CompletionError, JobNotEnded, NoResult, OptionError


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with application(database_url) as database:
        database.rows("CREATE TABLE notes (text text NOT NULL)")
        yield database


@pytest.fixture
def connection(database: Database) -> Iterator[Any]:
    """The connection that a test is using. It is rolled back at the end, and then nothing is left."""
    with contextlib.closing(psycopg2.connect(database.url)) as connection:
        with testing.using(connection):
            yield connection
        connection.rollback()
    for table in ("notes", "background_jobs", "background_history", "background_runners"):
        assert database.value(f"SELECT count(*) FROM {table}") == 0


def note(connection: Any, text: str | None) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO notes VALUES (%s)", (text,))


def notes(connection: Any) -> list[str]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT text FROM notes ORDER BY text")
        return [text for (text,) in cursor.fetchall()]


# --- current_job.transaction() ----------------------------------------------------------------------------------------


def test_job_completes_in_the_transaction_of_the_test(connection: Any, database: Database) -> None:
    @job
    def follow_up() -> None: ...

    @job
    def work() -> None:
        with current_job.transaction() as own:
            note(own, "done")
            follow_up.delay()

    work.delay()
    assert [(ran.job_type, ran.outcome) for ran in testing.drain()] == [("work", "done"), ("follow_up", "done")]
    assert notes(connection) == ["done"]
    assert testing.enqueued_jobs() == []
    assert database.column("SELECT text FROM notes") == []


def test_error_in_the_block_undoes_what_the_block_did_and_nothing_else(connection: Any) -> None:
    @job
    def follow_up() -> None: ...

    @job(max_retries=0)
    def work() -> None:
        with greenjobs.connection() as other:
            note(other, "before")
        with current_job.transaction() as own:
            note(own, "never")
            follow_up.delay()
            raise ValueError("no")

    note(connection, "of the test")
    work.delay()
    with pytest.raises(ValueError, match="no"):
        testing.drain()
    assert notes(connection) == ["before", "of the test"]
    assert [found.state for found in jobs.find()] == ["failed"]


def test_error_of_the_database_in_the_block_leaves_the_transaction_usable(connection: Any) -> None:
    @job(max_retries=0)
    def work() -> None:
        with current_job.transaction() as own:
            note(own, "never")
            note(own, None)

    work.delay()
    (ran,) = testing.drain(raise_errors=False)
    assert isinstance(ran.error, psycopg2.errors.NotNullViolation)
    assert notes(connection) == []


def test_what_ends_the_block_before_its_end_is_refused_as_in_a_runner(connection: Any) -> None:
    @job
    def work(what: str) -> None:
        with current_job.transaction() as own:
            getattr(own, what)()

    for what in ("commit", "rollback"):
        work.delay(what)
        with pytest.raises(CompletionError, match=rf"{what}\(\) in a block of current_job\.transaction\(\)"):
            testing.drain()


def test_job_that_fails_after_its_block_is_done(connection: Any) -> None:
    @job
    def work() -> None:
        with current_job.transaction() as own:
            note(own, "done")
        raise ValueError

    work.delay()
    (ran,) = testing.drain()
    assert (ran.outcome, type(ran.error)) == ("done", ValueError)
    assert notes(connection) == ["done"]


def test_jobs_that_complete_so_may_be_many(connection: Any) -> None:
    @job
    def work(left: int) -> None:
        with current_job.transaction() as own:
            note(own, f"{left:03}")
            if left:
                work.delay(left - 1)

    work.delay(99)
    assert len(testing.drain()) == 100
    assert len(notes(connection)) == 100


def test_rolled_back_block_takes_the_jobs_with_it_where_the_test_commits(database: Database) -> None:
    @job
    def follow_up() -> None: ...

    @job(max_retries=0)
    def work() -> None:
        with current_job.transaction() as own:
            note(own, "never")
            follow_up.delay()
            raise ValueError

    work.delay()
    assert [ran.job_type for ran in testing.drain(raise_errors=False)] == ["work"]
    assert database.count("job_type = 'follow_up'") == 0
    assert database.column("SELECT text FROM notes") == []


def test_job_that_runs_inline_completes_in_the_transaction_of_the_test(connection: Any) -> None:
    @job
    def work() -> None:
        with current_job.transaction() as own:
            note(own, "done")

    with testing.inline():
        work.delay()
    assert notes(connection) == ["done"]


# --- greenjobs.connection() -------------------------------------------------------------------------------------------


def test_what_a_job_commits_by_parts_stays_when_it_fails(connection: Any) -> None:
    @job(max_retries=0)
    def work() -> None:
        with greenjobs.connection() as own:
            note(own, "1")
            own.commit()
            note(own, "2")
            own.rollback()
            with own:
                note(own, "3")
            note(own, "4")
            raise ValueError

    work.delay()
    testing.drain(raise_errors=False)
    assert notes(connection) == ["1", "3"]


def test_block_whose_statement_failed_commits_nothing_as_in_postgresql(connection: Any) -> None:
    @job
    def work() -> None:
        with greenjobs.connection() as own:
            note(own, "never")
            with contextlib.suppress(psycopg2.Error):
                note(own, None)

    work.delay()
    assert [ran.outcome for ran in testing.drain()] == ["done"]
    assert notes(connection) == []


def test_connection_is_lent_outside_of_jobs_too(connection: Any, database: Database) -> None:
    @job
    def work() -> None: ...

    with greenjobs.connection() as lent:
        note(lent, "of a view")
        work.options(connection=lent).delay()
    with contextlib.suppress(ValueError), greenjobs.connection() as lent:
        note(lent, "never")
        work.options(connection=lent).delay()
        raise ValueError
    assert notes(connection) == ["of a view"]
    assert database.column("SELECT text FROM notes") == []
    testing.assert_enqueued(work, count=1)


def test_lent_connection_is_used_like_one_of_psycopg2(connection: Any) -> None:
    connection.cursor_factory = psycopg2.extras.RealDictCursor
    with greenjobs.connection() as lent:
        assert isinstance(lent, psycopg2.extensions.connection)
        assert (lent.closed, lent.autocommit, lent.encoding) == (0, False, "UTF8")
        with lent.cursor() as cursor:
            psycopg2.extras.execute_values(cursor, "INSERT INTO notes VALUES %s", [("a",), ("b",)])
            cursor.execute(sql.SQL("SELECT * FROM {} ORDER BY 1").format(sql.Identifier("notes")))
            assert cursor.fetchall() == [("a",), ("b",)]
        with lent.cursor(cursor_factory=psycopg2.extras.DictCursor) as cursor:
            cursor.execute("SELECT '{\"n\": 1}'::jsonb AS document")
            assert cursor.fetchone()["document"] == {"n": 1}
        with lent.cursor("on_the_server") as cursor:
            cursor.execute("SELECT text FROM notes")
            assert len(cursor.fetchall()) == 2
        lent.autocommit = False
    assert connection.cursor_factory is psycopg2.extras.RealDictCursor


@pytest.mark.parametrize("name", ["autocommit", "isolation_level", "readonly"])
def test_lent_connection_cannot_have_a_session_of_its_own(connection: Any, name: str) -> None:
    with greenjobs.connection() as lent, pytest.raises(OptionError, match="without testing.using"):
        setattr(lent, name, True)


def test_lent_connection_that_is_closed_is_no_more_and_that_of_the_test_is(connection: Any) -> None:
    with pytest.raises(psycopg2.InterfaceError), greenjobs.connection() as lent:
        note(lent, "never")
        lent.close()
        lent.cursor()
    assert lent.closed
    assert notes(connection) == []


def test_session_that_begins_and_goes_on_beyond_the_block_does_no_harm(database: Database) -> None:
    engine = sa.create_engine("postgresql+psycopg2://", creator=lambda: psycopg2.connect(database.url))
    with contextlib.closing(engine.connect()) as connection, connection.begin() as transaction:
        session = orm.Session(bind=connection, join_transaction_mode="create_savepoint")

        @job
        def work() -> None:
            with greenjobs.connection() as own:
                session.execute(sa.text("INSERT INTO notes VALUES ('of the session')"))
                note(own, "of the job")
            session.execute(sa.text("INSERT INTO notes VALUES ('after')"))
            with current_job.transaction() as own:
                note(own, "completed")
            session.commit()

        with testing.using(connection):
            work.delay()
            assert [ran.outcome for ran in testing.drain()] == ["done"]
        found = session.scalars(sa.text("SELECT text FROM notes ORDER BY text")).all()
        assert found == ["after", "completed", "of the job", "of the session"]
        session.close()
        transaction.rollback()
    engine.dispose()
    assert database.column("SELECT text FROM notes") == []


def test_end_of_the_test_inside_of_a_block_gives_the_job_back(connection: Any) -> None:
    @job
    def work() -> None:
        with current_job.transaction() as own:
            note(own, "never")
            pytest.fail("the test ends here")

    work.delay()
    with pytest.raises(pytest.fail.Exception):
        testing.drain()
    assert notes(connection) == []
    assert [enqueued.state for enqueued in testing.enqueued_jobs()] == ["available"]


def test_job_that_commits_the_connection_of_the_test_inside_of_a_block_is_told_on(database: Database) -> None:
    with contextlib.closing(psycopg2.connect(database.url)) as connection, testing.using(connection):

        @job
        def work(complete: bool) -> None:
            with current_job.transaction() if complete else greenjobs.connection() as own, own.cursor() as cursor:
                cursor.execute("SELECT")
                cursor.connection.commit()

        for complete in (True, False):
            work.delay(complete)
            with pytest.raises(testing.DrainError, match="committed or rolled back the transaction"):
                testing.drain()


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_transaction", [True, False])
def test_result_is_kept_and_read_as_after_a_runner(database: Database, in_transaction: bool) -> None:
    @job(keep="1d", keep_result=True)
    def double(n: int) -> tuple[int, int]:
        return n, 2 * n

    with testing.rolled_back() if in_transaction else contextlib.nullcontext():
        handle = double.delay(4)
        testing.drain()
        assert handle.status() == "done"
        assert handle.wait(timeout=0) == "done"
        assert handle.result(timeout=0) == (4, 8)
        (found,) = jobs.find(state="done")
        assert (found.id, found.result) == (handle.id, [4, 8])
    assert database.value("SELECT count(*) FROM background_history") == (0 if in_transaction else 1)


def test_job_that_is_not_kept_is_gone(connection: Any) -> None:
    @job
    def work() -> int:
        return 1

    handle = work.delay()
    testing.drain()
    assert handle.status() == "gone"
    with pytest.raises(NoResult):
        handle.result()


def test_call_says_otherwise_than_the_job_how_long_it_is_kept(connection: Any) -> None:
    @job
    def work() -> None: ...

    handle = work.options(keep="1h").delay()
    testing.drain()
    assert handle.status() == "done"


def test_discarded_job_is_kept_with_its_reason(connection: Any) -> None:
    @job(keep="1d")
    def work() -> None:
        raise Discard("no such order")

    handle = work.delay()
    testing.drain()
    assert handle.status() == "discarded"
    (found,) = jobs.find(state="discarded")
    assert found.error == "Discard: no such order"


def test_result_of_the_block_in_which_a_job_completes_is_kept(connection: Any) -> None:
    @job(keep="1d", keep_result=True)
    def work() -> int:
        with current_job.transaction(result=7):
            pass
        return 8

    handle = work.delay()
    testing.drain()
    assert handle.result() == 7


def test_what_is_kept_stays_so_when_the_test_rolls_back_to_its_savepoint(connection: Any) -> None:
    @job(keep="1d", keep_result=True)
    def returned() -> int:
        return 1

    @job(keep="1d", keep_result=True)
    def completed() -> int:
        with current_job.transaction(result=2):
            pass
        return 3

    handles = [returned.delay(), completed.delay()]
    with connection.cursor() as cursor:
        cursor.execute("SAVEPOINT of_a_session")
        testing.drain()
        cursor.execute("ROLLBACK TO SAVEPOINT of_a_session")
    assert [handle.result() for handle in handles] == [1, 2]


def test_waiting_for_a_job_that_no_runner_sees_says_so_at_once(connection: Any) -> None:
    @job
    def work() -> None: ...

    handle = work.delay()
    for wait in (handle.result, jobs.handle(handle.id).wait):
        with pytest.raises(JobNotEnded, match=r"is available, in the transaction of the test.*testing\.drain\(\)"):
            wait()


# --- the clock --------------------------------------------------------------------------------------------------------


def test_clock_goes_on_though_that_of_the_transaction_stands_still(connection: Any) -> None:
    @job
    def work() -> None: ...

    assert notes(connection) == []  # with which it begins
    before = datetime.now(timezone.utc)
    work.options(run_at=before).delay()
    work.options(delay=3600).delay()
    assert [enqueued.run_at >= before + timedelta(hours=1) for enqueued in testing.enqueued_jobs()] == [False, True]
    assert len(testing.drain()) == 1
    with testing.travel(hours=1):
        assert len(testing.drain()) == 1
