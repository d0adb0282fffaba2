"""What keeps the hot path fast: plans, read-ahead and its limits, and who is woken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
import running
from waiting import eventually

from greenjobs import inspection, job, pool, storage
from greenjobs.runner import Runner
from greenjobs.service import Service
from greenjobs.statement import PlanningConnection, Statement

JOB_TYPES = ["mail"]


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url, read_ahead=100) as database:
        yield database


@pytest.fixture
def full_table(database: running.Database) -> running.Database:
    """100,000 available jobs in two queues, as many for later, some failed, some of a dead runner."""
    database.rows(
        """
        INSERT INTO background_jobs (job_type, data, queue, priority, state, run_at)
        SELECT
            'mail', '{}'::jsonb, (ARRAY['emails', 'default'])[n % 2 + 1], (n % 10)::smallint, 'available', now()
        FROM generate_series(1, 100000) AS n
        UNION ALL
        SELECT 'mail', '{}'::jsonb, 'emails', 0::smallint, 'scheduled', now() + make_interval(secs => n)
        FROM generate_series(1, 100000) AS n
        UNION ALL
        SELECT 'mail', '{}'::jsonb, 'emails', 0::smallint, 'failed', now()
        FROM generate_series(1, 1000)
        """
    )
    # Those that exclude others, before and among the others: one key has most of them.
    database.rows(
        """
        INSERT INTO background_jobs (job_type, data, queue, priority, exclusive_key)
        SELECT 'mail', '{}'::jsonb, 'emails', (n % 10)::smallint, CASE WHEN n % 10 = 0 THEN md5(n::text) ELSE 'all' END
        FROM generate_series(1, 20000) AS n
        """
    )
    database.rows("UPDATE background_jobs SET crashes = 1 WHERE id % 1000 = 0 AND state = 'available'")
    database.rows("VACUUM ANALYZE background_jobs")
    return database


def run_everything(connection: PlanningConnection) -> None:
    """Every statement that runners repeat, so that all are prepared."""
    claim: dict[str, Any] = {"runner": 1, "queue": "emails", "job_types": JOB_TYPES, "limit": 2}
    rows = storage.claim(connection, **claim)
    storage.claim(connection, **claim, after=storage.claim_order(rows[-1]))
    storage.claim(connection, **claim, suspects=True)
    exclusive = storage.claim_exclusive(connection, **claim)
    storage.claim_exclusive(connection, **claim, keys=["all"])
    storage.wake_next(connection, ["all"], queues=["emails"])
    storage.acknowledge(connection, [1], [storage.Fence(row.id, row.attempt) for row in (rows[0], *exclusive)])
    storage.promote(connection, limit=10)
    storage.route(connection, {"mail": "emails"})
    inspection.look(connection, queues=["emails"], job_types=JOB_TYPES)
    inspection.seconds_until_due(connection)
    inspection.chores(connection, [1])


CALLS = {
    "claim_from_top": "(1, 'emails', '{mail}', 50)",
    "claim_behind": "(1, 'emails', '{mail}', 50, -3::smallint, 700)",
    "claim_suspect": "(1, 'emails', '{mail}', 1)",
    "claim_exclusive": "(1, 'emails', '{mail}', 50, 5, 10000000, 300, 'a')",
    "claim_next": "(1, 'emails', '{mail}', 50, 5, 10000000, '{all}')",
    "wake_next": "('{all}', '{emails}')",
    "acknowledge": "('{1,2,3}', '{1,1,1}', '{1}')",
    "promote": "(1000)",
    "route": "('{mail}', '{emails}')",
    "look": "('{emails,default}', '{mail}')",
    "next_due": "",
    "chores": "('{1}')",
}


@pytest.mark.parametrize("analyzed", [True, False], ids=["analyzed", "planned-while-empty"])
def test_no_statement_of_a_runner_scans_the_table_or_sorts_it(
    database: running.Database, request: pytest.FixtureRequest, analyzed: bool
) -> None:
    """Plans are made once, perhaps while the table is empty, and have to be right for a hundred thousand rows."""
    service = Service(database.url, on_standby=lambda: None)
    with service.pool.connection() as connection:
        assert isinstance(connection, PlanningConnection)
        if analyzed:
            request.getfixturevalue("full_table")
        else:
            database.rows(
                "INSERT INTO background_jobs (job_type, data, queue)"
                " SELECT 'mail', '{}', 'emails' FROM generate_series(1, 9)"
            )
        run_everything(connection)
        planned = {name.removeprefix("greenjobs_").rpartition("_")[0]: name for name in connection.planned}
        assert planned.keys() == CALLS.keys()
        with connection.cursor() as cursor:
            for name, arguments in CALLS.items():
                cursor.execute(f"EXPLAIN EXECUTE {planned[name]}{arguments}")
                plan = "\n".join(row[0] for row in cursor.fetchall())
                assert "Seq Scan on background_jobs" not in plan, f"{name}:\n{plan}"
                # Their few results are grouped, or put in order.
                if name not in ("promote", "route", "claim_exclusive", "claim_next"):
                    assert "Sort" not in plan, f"{name}:\n{plan}"
    service.close()


def test_claim_without_our_settings_is_planned_through_the_index_as_well(full_table: running.Database) -> None:
    """Behind a pooler the planner is on its own."""
    connection = pool.connect(full_table.url, application_name="test", timeout_seconds=60)
    run_everything(connection)
    planned = {name.removeprefix("greenjobs_").rpartition("_")[0]: name for name in connection.planned}
    with connection.cursor() as cursor:
        for name, index in {
            "claim_from_top": "background_jobs_available",
            "claim_behind": "background_jobs_available",
            "claim_exclusive": "background_jobs_exclusive",
            "claim_next": "background_jobs_lines",
        }.items():
            cursor.execute(f"EXPLAIN EXECUTE {planned[name]}{CALLS[name]}")
            plan = "\n".join(row[0] for row in cursor.fetchall())
            assert index in plan
            assert "Seq Scan on background_jobs" not in plan
            assert "Sort" not in plan or index != "background_jobs_available"
    connection.close()


def test_claim_of_jobs_that_exclude_others_reads_few_rows_whatever_waits(full_table: running.Database) -> None:
    """Twenty thousand of them wait, eighteen thousand with one key, one job of which runs."""
    connection = pool.connect(full_table.url, application_name="test", timeout_seconds=60)
    claim: dict[str, Any] = {"runner": 1, "queue": "emails", "job_types": JOB_TYPES, "limit": 1}
    assert len(storage.claim_exclusive(connection, **claim, keys=["all"])) == 1
    storage.claim_exclusive(connection, **claim)
    (statement,) = (name for name in connection.planned if name.startswith("greenjobs_claim_exclusive_"))
    with connection.cursor() as cursor:
        cursor.execute(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE {statement}"
            "(1, 'emails', '{mail}', 1, 100, 10000000, 202, 'a')"
        )
        ((plan,),) = cursor.fetchall()[0]
        assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 5000
        assert plan["Plan"]["Actual Rows"] == 1
    connection.close()


def test_statement_goes_on_unprepared_when_the_server_forgets_it(database: running.Database) -> None:
    """As behind a pooler that gives another session of the server to every transaction."""
    statement = Statement("double", "SELECT 2 * %(number)s::int", number="int")
    connection = pool.connect(database.url, application_name="test", timeout_seconds=60)
    with connection.cursor() as cursor:
        statement.run(cursor, {"number": 4})
        cursor.execute("DEALLOCATE ALL")
        statement.run(cursor, {"number": 5})
        assert cursor.fetchone() == (10,)
        assert connection.is_pooled
    connection.close()


# --- read-ahead -------------------------------------------------------------------------------------------------------


def test_read_ahead_stays_within_its_bound_and_is_given_back_when_jobs_turn_slow(database: running.Database) -> None:
    """Fast jobs make the worker claim ahead; then all slots are taken by jobs that wait, and the rest must not."""
    may_end = threading.Event()
    most_held = 0

    @job
    def quick() -> None:
        nonlocal most_held
        most_held = max(most_held, len(handle.workers["default"].held_rows()))

    @job
    def slow() -> None:
        may_end.wait(running.PATIENCE_SECONDS)

    quick.delay_many([()] * 4000)
    slow.delay_many([()] * 500)
    with running.started(Runner().register(quick, slow).configure_queue("default", pool=5)) as handle:
        database.wait_for("state = 'running' AND job_type = 'slow'", count=5)
        eventually(lambda: len(handle.workers["default"].running) == 5, "five slow jobs run")
        assert 5 < most_held <= 5 + 100
        assert database.count("state = 'available'") == 495
        may_end.set()
    assert database.count("crashes > 0 OR retries > 0") == 0


def test_slow_jobs_are_not_claimed_ahead(database: running.Database) -> None:
    held = []
    started = threading.Semaphore(0)

    @job
    def slow() -> None:
        held.append(len(handle.workers["default"].held_rows()))
        started.release()
        threading.Event().wait(0.25)

    slow.delay_many([()] * 30)
    with running.started(Runner().register(slow).configure_queue("default", pool=3)) as handle:
        for _ in range(30):
            assert started.acquire(timeout=running.PATIENCE_SECONDS)
    assert max(held) == 3


def test_read_ahead_is_given_back_when_the_runner_stops(database: running.Database) -> None:
    begun = threading.Event()

    @job
    def quick() -> None:
        begun.set()

    quick.delay_many([()] * 20_000)
    with running.started(Runner().register(quick).configure_queue("default", pool=5)):
        assert begun.wait(running.PATIENCE_SECONDS)
    assert database.count("state <> 'available'") == 0


# --- who is woken -----------------------------------------------------------------------------------------------------


class Ear:
    """Hears every notification of the database."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg2.connect(url)
        self.connection.autocommit = True
        self.connection.cursor().execute(f"LISTEN {storage.CHANNEL}")

    def heard(self) -> list[str]:
        """What was sent since the last look; everything that was committed before it, for notifications keep order."""
        with self.connection.cursor() as cursor:
            cursor.execute(f"NOTIFY {storage.CHANNEL}, 'end of the look'")
        payloads: list[str] = []
        while "end of the look" not in payloads:
            self.connection.poll()
            payloads += [notify.payload for notify in self.connection.notifies]
            self.connection.notifies.clear()
        return payloads[: payloads.index("end of the look")]


@pytest.fixture
def ear(database: running.Database) -> Iterator[Ear]:
    ear = Ear(database.url)
    yield ear
    ear.connection.close()


def test_nobody_is_notified_while_nobody_waits(ear: Ear) -> None:
    @job
    def mail() -> None: ...

    mail.delay()
    mail.delay_many([()] * 10)
    assert ear.heard() == []


def test_one_job_wakes_one_of_two_runners(database: running.Database, ear: Ear) -> None:
    ran = threading.Event()

    @job
    def mail() -> None:
        ran.set()

    # So long that no poll tells them to look.
    first, second = (Runner().register(mail).configure_queue("default", poll_interval=3600) for _ in range(2))
    with running.started(first), running.started(second):
        eventually(lambda: database.value("SELECT count(*) FROM background_waiting") == 2, "both wait")
        ear.heard()
        mail.delay()
        assert ran.wait(running.PATIENCE_SECONDS)
        woken = [payload for payload in ear.heard() if payload.endswith(":default")]
        assert len(woken) == 1
        assert not woken[0].startswith("*")


def test_transaction_wakes_once_however_many_jobs_it_enqueues(database: running.Database, ear: Ear) -> None:
    @job
    def mail() -> None: ...

    with psycopg2.connect(database.url) as connection:
        for _ in range(20):
            mail.options(connection=connection).delay()
        mail.options(connection=connection).delay_many([()] * 20)
        assert ear.heard() == []
    connection.close()
    assert ear.heard() == ["*:default"]


def test_job_for_much_later_notifies_nobody_and_one_that_is_due_soon_the_promoters(ear: Ear) -> None:
    @job
    def mail() -> None: ...

    mail.options(delay=60).delay()
    assert ear.heard() == []
    mail.options(delay=1).delay()
    assert ear.heard() == ["due"]
