"""Ticks as jobs see them, schedules that are made in a transaction, and overlap=False of a job with cron."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg2
import pytest
import running
from psycopg2 import extras
from running import Database
from waiting import eventually

from greenjobs import current_job, job, schedules
from greenjobs.errors import ConfigError, OptionError
from greenjobs.runner import Runner

# A tick that no test meets by chance.
NEVER_NOW = "0 0 1 1 *"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with running.application(database_url) as database:
        yield database


def set_back(database: Database) -> None:
    """Let the tick of last New Year be due."""
    database.rows("UPDATE background_schedules SET next_tick_at = next_tick_at - interval '1 year'")


# --- the tick of a job ------------------------------------------------------------------------------------------------


def test_job_knows_the_tick_that_enqueued_it_and_goes_on_knowing(database: Database) -> None:
    ticks: list[datetime | None] = []

    @job(cron=NEVER_NOW, timezone="Europe/Paris", max_retries=1, backoff=0)
    def report() -> None:
        ticks.append(current_job.tick_at)
        if len(ticks) == 1:
            raise ValueError("once more")

    with running.started(Runner().register(report).configure_queue("default")):
        eventually(lambda: database.value("SELECT count(*) FROM background_schedules") == 1, "it is not declared")
        set_back(database)
        eventually(lambda: len(ticks) == 2, "it did not run twice", seconds=running.PATIENCE_SECONDS)
    assert ticks[0] == ticks[1] == database.value("SELECT last_tick_at FROM background_schedules")
    assert ticks[0] is not None and ticks[0].utcoffset() == timedelta(0)


def test_job_that_no_schedule_enqueued_has_no_tick(database: Database) -> None:
    ticks: list[datetime | None] = []

    @job
    def report() -> None:
        ticks.append(current_job.tick_at)

    report.delay()
    report.options(max_retries=3).delay()
    running.work_off(report)
    assert ticks == [None, None]


def test_tick_leaves_the_settings_of_the_job_as_they_are(database: Database) -> None:
    seen: list[tuple[int, Any]] = []

    @job(cron=NEVER_NOW, max_retries=7, timeout=60)
    def report() -> None:
        seen.append((current_job.max_retries, current_job.tick_at))

    with running.started(Runner().register(report)):
        set_back(database)
        eventually(lambda: seen, "it did not run", seconds=running.PATIENCE_SECONDS)
    assert seen[0][0] == 7


def test_tick_that_came_too_late_for_expires_is_discarded(database: Database) -> None:
    """A job of a schedule is due at its tick, also when nobody was there to enqueue it."""
    ran: list[int] = []

    @job(cron=NEVER_NOW, expires=timedelta(hours=1))
    def report() -> None:
        ran.append(1)

    with running.started(Runner().register(report)):
        set_back(database)
        eventually(
            lambda: (
                database.value("SELECT last_job_id FROM background_schedules") is not None and database.count() == 0
            ),
            "the tick was not discarded",
            seconds=running.PATIENCE_SECONDS,
        )
    assert ran == []


# --- in a transaction -------------------------------------------------------------------------------------------------


def make_report(**settings: Any) -> Any:
    def report(kind: str = "short") -> None: ...

    return job(**settings)(report)


@pytest.mark.parametrize("as_cursor", [False, True])
def test_schedule_is_there_when_the_transaction_commits(database: Database, as_cursor: bool) -> None:
    report = make_report()
    connection = psycopg2.connect(database.url, cursor_factory=extras.RealDictCursor)
    given = connection.cursor() if as_cursor else connection
    schedules.add(report, name="nightly", cron="0 3 * * *", connection=given)
    assert schedules.find() == []
    connection.commit()
    assert [schedule.name for schedule in schedules.find()] == ["nightly"]
    connection.close()


def test_schedule_is_gone_when_the_transaction_rolls_back(database: Database) -> None:
    report = make_report()
    schedules.add(report, name="nightly", cron="0 3 * * *")
    with psycopg2.connect(database.url) as connection:
        schedules.add(report, name="nightly", cron="0 4 * * *", connection=connection)
        schedules.add(report, name="weekly", cron="0 4 * * MON", connection=connection)
        connection.rollback()
    connection.close()
    assert [(schedule.name, schedule.cron) for schedule in schedules.find()] == [("nightly", "0 3 * * *")]


def test_schedule_of_a_long_transaction_has_missed_nothing(database: Database) -> None:
    """Ticks begin with the call, however long ago the transaction began."""
    with psycopg2.connect(database.url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT now()")
        (began_at,) = cursor.fetchone() or (None,)

        def has_ticked() -> Any:
            cursor.execute("SELECT clock_timestamp() > now() + interval '1 second'")
            return (cursor.fetchone() or (False,))[0]

        eventually(has_ticked, "no tick of every second has come")
        schedules.add(make_report(), name="every second", cron="* * * * * *", connection=connection)
    connection.close()
    (schedule,) = schedules.find()
    assert schedule.next_tick_at > began_at + timedelta(seconds=1)


def test_what_is_no_connection_is_refused(database: Database) -> None:
    with pytest.raises(OptionError, match="allowed: a psycopg2 connection or cursor"):
        schedules.add(make_report(), name="nightly", cron="0 3 * * *", connection=database)


def test_runners_see_it_when_it_is_committed(database: Database) -> None:
    ran: list[Any] = []

    @job
    def report() -> None:
        ran.append(current_job.tick_at)

    with running.started(Runner().register(report)):
        with psycopg2.connect(database.url) as connection:
            schedules.add(report, name="nightly", cron="* * * * * *", connection=connection)
        connection.close()
        eventually(lambda: ran, "it did not run", seconds=running.PATIENCE_SECONDS)


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_cron_without_overlap_leaves_ticks_out_and_excludes_other_calls(database: Database) -> None:
    """A tick is left out while the job of the one before waits or runs; calls wait for each other, and for ticks."""
    report = make_report(cron=NEVER_NOW, overlap=False)
    (timetable,) = report.timetables
    assert not timetable.overlap
    handle = Runner().register(report).configure_queue("other").start()
    set_back(database)
    eventually(lambda: database.count() == 1, "the tick was not enqueued", seconds=running.PATIENCE_SECONDS)
    set_back(database)
    eventually(
        lambda: database.value("SELECT next_tick_at > now() FROM background_schedules"),
        "the tick was not looked at",
        seconds=running.PATIENCE_SECONDS,
    )
    handle.shutdown()
    assert handle.wait_for_shutdown(running.PATIENCE_SECONDS)
    report.delay()
    assert database.count() == 2
    assert len(set(database.column("SELECT exclusive_key FROM background_jobs"))) == 1


def test_overlap_of_a_schedule_says_nothing_about_the_job(database: Database) -> None:
    report = make_report()
    schedules.add(report, name="nightly", cron=NEVER_NOW, overlap=False)
    report.delay()
    assert database.column("SELECT exclusive_key FROM background_jobs") == [None]


def test_schedule_whose_arguments_have_no_overlap_key_is_refused(database: Database) -> None:
    report = make_report(overlap=False, overlap_key="{kind.shape}")
    with pytest.raises(OptionError, match=r"^report: overlap_key .* fails for this call"):
        schedules.add(report, name="nightly", cron=NEVER_NOW)
    with pytest.raises(ConfigError, match="overlap_key .* fails for this call"):
        schedules.declared({"report": report}, ["nightly: report at @daily"])


def test_tick_that_has_no_overlap_key_is_reported_and_the_next_ones_come(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The key is another since the schedule was made; nothing of the scheduler must break over it."""
    fails = True

    def key(kind: str) -> str:
        if fails:
            raise KeyError(kind)
        return kind

    report = make_report(overlap=False, overlap_key=key)
    fails = False
    schedules.add(report, name="nightly", cron=NEVER_NOW)
    fails = True
    with caplog.at_level(logging.ERROR), running.started(Runner().register(report).configure_queue("other")):
        set_back(database)
        eventually(
            lambda: any("cannot be enqueued: report: overlap_key" in record.message for record in caplog.records),
            "it is not reported",
            seconds=running.PATIENCE_SECONDS,
        )
        assert database.count() == 0
        fails = False
        set_back(database)
        eventually(lambda: database.count() == 1, "the next did not come", seconds=running.PATIENCE_SECONDS)


def test_tick_is_that_of_the_schedule_and_not_when_it_was_enqueued(database: Database) -> None:
    seen: list[datetime | None] = []

    @job(cron=NEVER_NOW)
    def report() -> None:
        seen.append(current_job.tick_at)

    with running.started(Runner().register(report)):
        set_back(database)
        eventually(lambda: seen, "it did not run", seconds=running.PATIENCE_SECONDS)
    year = datetime.now(timezone.utc).year
    assert seen == [datetime(year, 1, 1, tzinfo=timezone.utc)]
