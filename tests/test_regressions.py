"""Cases that once went wrong between two modules: each was seen to fail before it was mended."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import gevent
import gevent.event
import psycopg2
import pytest
import running
from waiting import eventually

import greenjobs
from greenjobs import call, job
from greenjobs.errors import DatabaseUnavailable
from greenjobs.runner import Runner


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        yield database


@dataclass(frozen=True)
class Frozen(Exception):
    code: int


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_stopping_right_after_the_start_loses_nothing(database: running.Database) -> None:
    ran: list[int] = []

    @job
    def work(number: int) -> None:
        ran.append(number)

    work.delay_many([(n,) for n in range(500)])
    for _ in range(10):
        with running.started(Runner().register(work).configure_queue("default", pool=5)):
            gevent.idle()
    waiting = database.column("SELECT (data->'number')::int FROM background_jobs WHERE state = 'available'")
    assert sorted(ran + waiting) == list(range(500))
    assert database.count("state <> 'available' OR crashes > 0") == 0


def test_runners_that_come_and_go_leave_each_other_alone(database: running.Database) -> None:
    ran: list[int] = []

    @job
    def work(number: int) -> None:
        ran.append(number)
        gevent.sleep(0.002)

    work.delay_many([(n,) for n in range(400)])
    with running.started(Runner().register(work).configure_queue("default", pool=3)):
        for round in range(1, 6):
            with running.started(Runner().register(work).configure_queue("default", pool=3)):
                eventually(lambda round=round: len(ran) >= 20 * round, "some jobs ran", seconds=30)
        database.wait_for("true", count=0)
    assert sorted(ran) == list(range(400))


def test_three_calls_of_shutdown_at_once_leave_nothing_claimed(database: running.Database) -> None:
    @job
    def work() -> None: ...

    work.delay_many([()] * 1000)
    handle = Runner().register(work).configure_queue("default", pool=5).start()
    for _ in range(3):
        handle.shutdown()
    assert handle.wait_for_shutdown(30)
    assert database.count("state <> 'available' OR crashes > 0") == 0


def test_stopped_runner_closes_its_connections(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with running.started(Runner().register(work)):
        pass
    eventually(lambda: not {"greenjobs session", "greenjobs runner"} & set(database.sessions()), "sessions are closed")


def test_stopped_runner_leaves_no_greenlets_behind(database: running.Database) -> None:
    def alive() -> int:
        gc.collect()
        return sum(1 for each in gc.get_objects() if isinstance(each, gevent.Greenlet) and not each.dead)

    @job
    def work() -> None: ...

    running.work_off(work)
    before = alive()
    for _ in range(3):
        work.delay()
        running.work_off(work)
    eventually(lambda: alive() <= before, "no greenlets are left")


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Frozen(5), SyntaxError("bad", ("file", 1, 1, 5))])
def test_error_that_resists_is_a_failure_like_any_other(database: running.Database, error: Exception) -> None:
    @job(max_retries=0)
    def fail() -> None:
        raise error

    fail.delay()
    running.work_off(fail)
    assert database.column("SELECT state FROM background_jobs") == ["failed"]


def test_logging_that_fails_costs_no_outcome(database: running.Database) -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError

    @job(max_retries=0)
    def fail() -> None:
        raise ValueError

    fail.delay()
    broken, log = Broken(), logging.getLogger("greenjobs.execution")
    log.addFilter(broken)
    try:
        running.work_off(fail)
    finally:
        log.removeFilter(broken)
    assert database.column("SELECT state FROM background_jobs") == ["failed"]


def test_runner_whose_acknowledge_is_refused_for_good_ends_and_says_why(database: running.Database) -> None:
    database.rows("CREATE TABLE receipts (job BIGINT REFERENCES background_jobs (id))")

    @job
    def work() -> None: ...

    database.rows("INSERT INTO receipts VALUES (%s)", work.delay().id)
    handle = Runner().register(work).start()
    with pytest.raises(psycopg2.errors.ForeignKeyViolation):
        handle.wait_for_shutdown(30)


# --- enqueuing --------------------------------------------------------------------------------------------------------


def test_enqueue_that_the_database_does_not_take_is_given_up_in_time(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url, enqueue_timeout=0.5)

    @job
    def work() -> None: ...

    holder = psycopg2.connect(database.url)
    holder.cursor().execute("LOCK TABLE background_jobs IN ACCESS EXCLUSIVE MODE")
    try:
        with gevent.Timeout(30), pytest.raises(DatabaseUnavailable, match=r"0\.5 s"):
            work.delay()
    finally:
        holder.close()
    assert database.count() == 0


def test_failed_bulk_on_an_autocommit_connection_of_the_caller_enqueues_nothing(database: running.Database) -> None:
    @job
    def work(number: int) -> None: ...

    database.rows(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.data->>'number' = '1500' THEN RAISE EXCEPTION 'refused'; END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON background_jobs FOR EACH ROW EXECUTE FUNCTION refuse()
        """
    )
    connection = psycopg2.connect(database.url)
    connection.autocommit = True
    with pytest.raises(psycopg2.errors.RaiseException):
        work.options(connection=connection).delay_many((n,) for n in range(2000))
    connection.close()
    assert database.count() == 0


def test_unique_bulk_keeps_the_order_of_its_items(database: running.Database) -> None:
    @job(unique=True)
    def train(n: int) -> None: ...

    ids = [handle.id for handle in train.delay_many([(n,) for n in range(50)])]
    assert ids == sorted(ids)


@pytest.mark.parametrize("statement_size", [1000, 3])
def test_bulks_of_the_same_unique_jobs_in_opposite_order_both_succeed(
    database: running.Database, monkeypatch: pytest.MonkeyPatch, statement_size: int
) -> None:
    """Inserted in the order of the calls, each would come to wait for the other's keys, in one statement or in two."""

    @job(unique=True)
    def train(n: int) -> None: ...

    for name, when in (("slow_before", "BEFORE"), ("slow_after", "AFTER")):
        database.rows(
            f"""
            CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM pg_sleep(0.02);
                RETURN NEW;
            END $$;
            CREATE TRIGGER {name} {when} INSERT ON background_jobs FOR EACH ROW EXECUTE FUNCTION {name}()
            """
        )
    monkeypatch.setattr(call, "BATCH_SIZE", statement_size)
    calls = [(n,) for n in range(10)]
    gevent.joinall([gevent.spawn(train.delay_many, each) for each in (calls, calls[::-1])], raise_error=True)
    assert database.count() == 10


def test_wakeup_is_not_lost_in_a_with_block_on_an_autocommit_connection(database: running.Database) -> None:
    """psycopg2 begins a transaction there, and goes on saying that the connection is idle and in autocommit."""
    ran = gevent.event.Event()

    @job
    def quick() -> None:
        ran.set()

    connection = psycopg2.connect(database.url)
    connection.autocommit = True
    with running.started(Runner().register(quick).configure_queue("default", poll_interval=3600)):
        with connection:
            quick.options(connection=connection).delay()
            # The worker says that it waits, and has looked twice since, before the job is there for it.
            eventually(lambda: database.value("SELECT count(*) FROM background_waiting") == 1, "the worker waits")
        assert ran.wait(30)
    connection.close()


def test_queue_is_named_without_the_spaces_around_it(database: running.Database) -> None:
    @job(queue="emails")
    def work() -> None: ...

    with running.started(Runner().register(work).configure_queue(" emails ")) as handle:
        assert list(handle.workers) == ["emails"]
