"""greenjobs.connection(): what is committed, how many there are, who waits, and what never comes back to the pool."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import gevent
import psycopg2
import pytest
import running
from gevent.event import Event
from psycopg2 import errors, extras

import greenjobs
from greenjobs import config, job, waits
from greenjobs.errors import DatabaseUnavailable, GreenjobsError, JobTimeout
from greenjobs.lending import JobPool, job_pool
from greenjobs.runner import Runner


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url, job_connections=2, job_connection_timeout=20) as database:
        database.rows("CREATE TABLE notes (what text)")
        yield database


def lent_from(database: running.Database) -> JobPool:
    return job_pool(config.current(), database.url)


def notes(database: running.Database) -> list[str]:
    return database.column("SELECT what FROM notes ORDER BY what")


def backend() -> int:
    with greenjobs.connection() as connection:
        return connection.info.backend_pid


def occupy(seconds: float) -> None:
    with greenjobs.connection():
        gevent.sleep(seconds)


def test_block_is_committed_at_its_end(database: running.Database) -> None:
    with greenjobs.connection() as connection:
        connection.cursor().execute("INSERT INTO notes VALUES ('written')")
        assert notes(database) == []
    assert notes(database) == ["written"]


def test_block_is_rolled_back_after_an_error_which_comes_out_as_it_is(database: running.Database) -> None:
    with pytest.raises(LookupError, match="mine"), greenjobs.connection() as connection:
        connection.cursor().execute("INSERT INTO notes VALUES ('written')")
        raise LookupError("mine")
    assert notes(database) == []
    assert lent_from(database)._idle, "the connection is as good as before"


def test_what_is_kept_is_for_one_block_at_a_time(database: running.Database) -> None:
    """Else two jobs that share it would end each other's transactions."""
    kept = greenjobs.connection()
    with kept as first:
        first.cursor().execute("INSERT INTO notes VALUES ('written')")
        with pytest.raises(GreenjobsError, match="in use in another block; call it anew for each"), kept:
            pass
        assert notes(database) == []
    with kept as again:
        assert again is first
    assert (notes(database), lent_from(database).in_use) == (["written"], 0)


def test_connection_is_the_runners_own_database_inside_a_job(database: running.Database) -> None:
    """Also where the runner was given another one than the settings name."""

    @job
    def write() -> None:
        with greenjobs.connection() as connection:
            connection.cursor().execute("INSERT INTO notes VALUES ('written')")

    write.delay()
    greenjobs.configure(database_url="postgresql://nowhere.invalid/none")
    running.work_off(write, database_url=database.url)
    assert notes(database) == ["written"]


def test_no_more_are_opened_than_the_setting_says(database: running.Database) -> None:
    running_now, most = 0, 0

    @job
    def count() -> None:
        nonlocal running_now, most
        with greenjobs.connection() as connection:
            running_now += 1
            most = max(most, running_now)
            connection.cursor().execute("SELECT pg_sleep(0.005)")
            running_now -= 1

    count.delay_many([()] * 40)
    running.work_off(count, pool=20)
    assert most == 2
    assert database.sessions().count("greenjobs job") == 2


def test_jobs_that_keep_all_of_them_hold_up_neither_claims_nor_enqueuing(database: running.Database) -> None:
    gate, ran = Event(), Event()

    @job
    def hold() -> None:
        with greenjobs.connection():
            gate.wait()

    @job
    def enqueue() -> None:
        note.delay()

    @job
    def note() -> None:
        ran.set()

    hold.delay_many([()] * 5)
    with running.started(Runner().register(hold, enqueue, note)):
        database.wait_for("state = 'running'", count=5)
        enqueue.delay()
        assert ran.wait(running.PATIENCE_SECONDS), "the others do not run"
        gate.set()


def test_who_waits_in_vain_is_told_the_setting(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url, job_connections=1, job_connection_timeout=0.05)
    with greenjobs.connection(), pytest.raises(DatabaseUnavailable, match=r"all 1 .* 0\.05 s .*\(job_connections\)"):
        backend()
    waited = lent_from(database).waits
    assert (waited.count, waited.given_up) == (1, 1)


def test_waits_are_measured(database: running.Database) -> None:
    gevent.joinall([gevent.spawn(occupy, 0.05) for _ in range(6)], raise_error=True)
    waited = lent_from(database).waits
    assert waited.count == 4
    assert waited.given_up == 0
    assert waited.total_seconds >= waited.longest_seconds > 0.05


def test_connection_that_is_free_counts_as_no_wait(database: running.Database) -> None:
    backend()
    assert (lent_from(database).waits.count, lent_from(database).waits.longest_seconds) == (0, 0.0)


def test_long_waits_are_warned_of_once_in_a_while(
    database: running.Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waits, "LONG_WAIT_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING, "greenjobs"):
        gevent.joinall([gevent.spawn(occupy, 0.03) for _ in range(10)], raise_error=True)
        assert len(caplog.messages) == 1
        assert "all 2 were busy; job_connections is the setting that allows more" in caplog.messages[0]
        monkeypatch.setattr(waits, "_WARNING_SECONDS", 0.0)
        gevent.joinall([gevent.spawn(occupy, 0.03) for _ in range(3)], raise_error=True)
    assert "as 7 others did for more than 0.01 s" in caplog.messages[-1]


def test_what_was_set_on_a_connection_is_gone_when_it_is_lent_again(database: running.Database) -> None:
    with greenjobs.connection() as connection:
        connection.set_session(isolation_level="SERIALIZABLE", readonly=True, autocommit=True)
        connection.cursor_factory = extras.DictCursor
        connection.cursor().execute("SELECT 1")
        first = connection.info.backend_pid
    with greenjobs.connection() as connection:
        assert connection.info.backend_pid == first
        assert not connection.autocommit
        cursor = connection.cursor()
        assert not isinstance(cursor, extras.DictCursor)
        cursor.execute("SHOW transaction_isolation")
        assert cursor.fetchone() == ("read committed",)
        cursor.execute("INSERT INTO notes VALUES ('written')")
    assert notes(database) == ["written"]


def test_what_is_begun_after_it_was_given_back_is_not_committed_by_the_next(database: running.Database) -> None:
    with greenjobs.connection() as kept:
        pass
    kept.cursor().execute("INSERT INTO notes VALUES ('stray')")
    with greenjobs.connection() as connection:
        connection.cursor().execute("INSERT INTO notes VALUES ('written')")
    assert notes(database) == ["written"]


def test_restoring_asks_the_server_nothing(database: running.Database) -> None:
    """It is done for every loan."""
    with greenjobs.connection() as connection:
        connection.cursor().execute("INSERT INTO notes VALUES ('written')")
        pid = connection.info.backend_pid
    assert database.value("SELECT query FROM pg_stat_activity WHERE pid = %s", pid) == "COMMIT"


def test_broken_connection_is_not_lent_again(database: running.Database) -> None:
    with pytest.raises(psycopg2.OperationalError), greenjobs.connection() as connection:
        database.terminate_sessions("greenjobs job")
        connection.cursor().execute("SELECT 1")
    with greenjobs.connection() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)


def test_statement_that_is_interrupted_by_a_timeout_leaves_no_broken_connection(database: running.Database) -> None:
    @job(timeout=0.1, max_retries=0)
    def sleep() -> None:
        with greenjobs.connection() as connection:
            cursor = connection.cursor()
            cursor.execute("INSERT INTO notes VALUES ('half')")
            cursor.execute("SELECT pg_sleep(600)")

    sleep.delay_many([()] * 6)
    running.work_off(sleep, pool=6)
    assert database.count("state = 'failed' AND errors->-1->>'error' = 'JobTimeout'") == 6
    pool = lent_from(database)
    assert (len(pool._idle), pool._open, dict(pool._lent)) == (0, 0, {})
    running_statements = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND state = 'active' AND query LIKE '%%pg_sleep(600)'"
    )
    assert database.value(running_statements) == 0
    assert notes(database) == []
    assert backend()


def test_job_that_is_cancelled_while_it_waits_for_one_takes_none(database: running.Database) -> None:
    @job(timeout=0.1, max_retries=0)
    def wait() -> None:
        with greenjobs.connection():
            raise AssertionError("there was none")

    wait.delay()
    with greenjobs.connection(), greenjobs.connection():
        running.work_off(wait)
    assert database.count("errors->-1->>'error' = 'JobTimeout'") == 1
    assert len(lent_from(database)._idle) == 2
    assert lent_from(database).waits.given_up == 1


def test_transaction_of_a_server_that_became_a_standby_makes_all_connections_new(database: running.Database) -> None:
    first = backend()
    with pytest.raises(errors.ReadOnlySqlTransaction), greenjobs.connection() as connection:
        cursor = connection.cursor()
        cursor.execute("SET TRANSACTION READ ONLY")  # as every transaction is there
        cursor.execute("INSERT INTO notes VALUES ('written')")
    assert backend() != first


def test_plain_threads_share_the_pool(database: running.Database) -> None:
    def write() -> None:
        with greenjobs.connection() as connection:
            connection.cursor().execute("INSERT INTO notes VALUES ('written')")

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(running.PATIENCE_SECONDS)
    assert notes(database) == ["written"] * 8


def test_timeout_that_the_job_catches_is_no_commit(database: running.Database) -> None:
    """What was written before is gone, and the end of the block says so."""
    seen = []

    @job(timeout=0.1, max_retries=0)
    def stubborn() -> None:
        with greenjobs.connection() as connection:
            cursor = connection.cursor()
            cursor.execute("INSERT INTO notes VALUES ('half')")
            with contextlib.suppress(JobTimeout):
                cursor.execute("SELECT pg_sleep(600)")
            seen.append("went on")

    stubborn.delay()
    running.work_off(stubborn)
    assert (seen, notes(database)) == (["went on"], [])
    assert database.count("state = 'failed' AND errors->-1->>'error' = 'InterfaceError'") == 1
