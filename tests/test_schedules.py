"""Schedules: declared and made at run time, their ticks, each enqueued once by any number of runners, and their ends.

Ticks are made due by setting them back in the database, not by waiting.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import gevent
import processes
import pytest
import running
from click.testing import CliRunner
from psycopg2 import extensions
from running import Database
from waiting import eventually

from greenjobs import job, schedules, storage
from greenjobs.cli import main
from greenjobs.errors import ConfigError, JobDefinitionError, OptionError, PayloadError, UnknownSchedule
from greenjobs.job import Job
from greenjobs.pool import connect
from greenjobs.runner import Runner
from greenjobs.scheduler import Scheduler
from greenjobs.service import Service

# A tick that no test meets by chance.
NEVER_NOW = "0 0 1 1 *"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with running.application(database_url) as database:
        yield database


class Fleet:
    """Schedulers without runners around them, each with connections and a place in the register of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._ends: list[Any] = []

    def scheduler(self, *jobs: Job[..., Any], lines: tuple[str, ...] = ()) -> tuple[Scheduler, extensions.connection]:
        """A scheduler that was not started, and the session that keeps its runner alive."""
        service = Service(self.url, on_standby=lambda: None)
        session = connect(self.url, application_name="session", timeout_seconds=10)
        types = sorted(job.name for job in jobs)
        id = storage.register_runner(session, hostname="here", pid=1, version="0", queues={}, job_types=types)
        service.runner_ids.append(id)
        scheduler = Scheduler({job.name: job for job in jobs}, lines, service)
        self._ends += [scheduler.stop, service.close, session.close]
        return scheduler, session

    def close(self) -> None:
        for end in self._ends:
            end()


@pytest.fixture
def fleet(database_url: str) -> Iterator[Fleet]:
    fleet = Fleet(database_url)
    yield fleet
    fleet.close()


def make_job(name: str = "report", **settings: Any) -> Job[..., Any]:
    def report(kind: str = "short") -> None:
        pass

    return job(name=name, **settings)(report)


def set_back(database: Database, ago: str, name: str = "report") -> datetime:
    """Let the next tick be that long ago; returns it."""
    at = database.value(
        "UPDATE background_schedules SET next_tick_at = now() - %s::interval WHERE name = %s RETURNING next_tick_at",
        *(ago, name),
    )
    assert isinstance(at, datetime)
    return at


def row(database: Database, columns: str, name: str = "report") -> Any:
    rows = database.rows(f"SELECT {columns} FROM background_schedules WHERE name = %s", name)
    return rows[0] if rows else None


# --- what is refused when the module is imported ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"cron": "* * * *"},
        {"cron": ["* * * * *", "61 * * * *"]},
        {"cron": []},
        {"cron": 5},
        {"cron": "* * * * *", "timezone": "Europe/Pariss"},
        {"cron": "* * * * *", "catch_up": "some"},
        {"cron": "* * * * *", "overlap": "no"},
        {"timezone": "UTC"},
        {"catch_up": "all"},
        {"overlap": "no"},
        {"cron": "* * * * *", "overlap_key": "kind"},
    ],
)
def test_a_job_with_a_wrong_schedule_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(JobDefinitionError, match=r"^wrong_one: .*(cron|timezone|catch_up|overlap)"):
        make_job("wrong_one", **settings)


def test_a_job_that_cannot_be_called_without_arguments_is_refused_by_name() -> None:
    def greet(whom: str) -> None:
        pass

    with pytest.raises(JobDefinitionError, match=r"^greet: .*'whom'.*schedules\.add"):
        job(cron="* * * * *")(greet)


# --- what is refused at run time and in the settings ------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"cron": "* * * *"},
        {"timezone": "Mars"},
        {"catch_up": "some"},
        {"overlap": "no"},
        {"name": ""},
        {"name": "two\nlines"},
        {"name": "x" * 201},
        {"queue": "two words"},
        {"priority": 99_999},
    ],
)
def test_add_refuses_what_cannot_be(wrong: dict[str, Any], database: Database) -> None:
    given: dict[str, Any] = {"name": "mine", "cron": NEVER_NOW, **wrong}
    with pytest.raises(OptionError, match=next(iter(wrong))):
        schedules.add(make_job(), **given)
    assert schedules.find() == []


def test_add_refuses_arguments_that_the_function_does_not_take(database: Database) -> None:
    with pytest.raises(TypeError, match="colour"):
        schedules.add(make_job(), name="mine", cron=NEVER_NOW, kwargs={"colour": 1})


def test_add_refuses_arguments_that_cannot_be_stored(database: Database) -> None:
    with pytest.raises(PayloadError, match="kind"):
        schedules.add(make_job(), name="mine", cron=NEVER_NOW, args=[float("nan")])


def test_add_takes_jobs_only(database: Database) -> None:
    with pytest.raises(OptionError, match="decorated with @job"):
        schedules.add(print, name="mine", cron=NEVER_NOW)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [schedules.remove, schedules.pause, schedules.resume])
def test_a_schedule_that_is_not_there_is_named(change: Any, database: Database) -> None:
    schedules.add(make_job(), name="mine", cron=NEVER_NOW)
    with pytest.raises(UnknownSchedule, match="'yours'; known: 'mine'"):
        change("yours")


@pytest.mark.parametrize(
    "line",
    [
        "report at * * * * *",
        "nightly: report",
        "nightly: report at",
        "nightly: report at 61 * * * *",
        "nightly: report at * * * * * in Mars",
        "nightly: unknown_job at * * * * *",
        "nightly: report(colour=1) at * * * * *",
        "nightly: report(kind=open('x')) at * * * * *",
        "nightly: report(**{}) at * * * * *",
        "nightly: report(kind= at * * * * *",
        "nightly: report at * * * * *; catch_up=some",
        "nightly: report at * * * * *; overlap=perhaps",
        "nightly: report at * * * * *; colour=red",
        "nightly: report at * * * * *; queue=a; queue=b",
        "nightly: report at * * * * *; priority=high",
        "nightly: report at * * * * *; queue=two words",
    ],
)
def test_a_wrong_line_of_the_settings_is_quoted(line: str, database: Database) -> None:
    with pytest.raises(ConfigError, match=r"^schedules has the line "):
        schedules.declared({"report": make_job()}, [line])


def test_two_schedules_of_one_name_are_refused(database: Database) -> None:
    report = make_job(cron=NEVER_NOW)
    with pytest.raises(ConfigError, match="two schedules are named 'report'"):
        schedules.declared({"report": report}, [f"report: report at {NEVER_NOW}"])


def test_a_line_of_the_settings_says_all_that_a_schedule_can(database: Database) -> None:
    report = make_job()
    line = (
        'nightly: report(kind="at 5; in full") at 30 2 * * MON,FRI in Europe/Paris; '
        "catch_up=all; overlap=false; queue=slow; priority=-5"
    )
    (found,) = schedules.declared({"report": report}, [line]).values()
    assert (found.name, found.job, json.loads(found.data)) == ("nightly", report, {"kind": "at 5; in full"})
    assert (found.timetable.cron, found.timetable.timezone) == ("30 2 * * MON,FRI", "Europe/Paris")
    assert (found.timetable.catch_up, found.timetable.overlap) == ("all", False)
    assert (found.queue, found.priority, found.source) == ("slow", -5, "settings")


def test_a_line_for_a_job_that_this_runner_does_not_run_is_left_out(database: Database) -> None:
    make_job("elsewhere")
    assert schedules.declared({"report": make_job()}, [f"nightly: elsewhere at {NEVER_NOW}"]) == {}


# --- where schedules come from ----------------------------------------------------------------------------------------


def test_a_runner_declares_the_schedules_of_its_jobs(database: Database) -> None:
    report = make_job(cron=NEVER_NOW, timezone="Europe/Paris", catch_up="all", overlap=False)
    running.work_off(report)
    found = row(database, "job_type, cron, timezone, data, catch_up, overlap, source")
    assert found == ("report", NEVER_NOW, "Europe/Paris", {}, "all", False, "code")


def test_a_job_can_have_several_schedules(database: Database) -> None:
    running.work_off(make_job(cron=["0 8 * * *", "0 18 * * *"]))
    assert [each.name for each in schedules.find()] == ["report 0 18 * * *", "report 0 8 * * *"]


def test_a_runner_declares_the_schedules_of_the_settings(database_url: str) -> None:
    lines = f"\nyearly: report at {NEVER_NOW}\n\ndaily: report(kind='full') at @daily in Europe/Paris\n"
    with running.application(database_url, schedules=lines) as database:
        running.work_off(make_job())
        assert row(database, "cron, data, source", "daily") == ("@daily", {"kind": "full"}, "settings")
        assert row(database, "cron, data, source", "yearly") == (NEVER_NOW, {}, "settings")


def test_a_runner_that_starts_for_the_first_time_enqueues_no_old_ticks(database: Database) -> None:
    running.work_off(make_job(cron="* * * * *", catch_up="all"))
    assert row(database, "next_tick_at > now(), last_tick_at") == (True, None)


def test_a_schedule_goes_on_where_it_was_when_it_is_declared_again(database: Database, fleet: Fleet) -> None:
    scheduler, _ = fleet.scheduler(make_job(cron=NEVER_NOW))
    scheduler.declare(takes_all=True)
    seen = set_back(database, "1 day")
    scheduler.declare(takes_all=True)
    assert row(database, "next_tick_at") == (seen,)


def test_ticks_before_a_change_of_the_expression_are_not_caught_up(database: Database, fleet: Fleet) -> None:
    fleet.scheduler(make_job(cron=NEVER_NOW))[0].declare(takes_all=True)
    set_back(database, "1 day")
    fleet.scheduler(make_job(cron="0 0 2 1 *"))[0].declare(takes_all=True)
    assert row(database, "cron, next_tick_at > now()") == ("0 0 2 1 *", True)


def test_add_replaces_what_was_added_under_the_same_name(database: Database) -> None:
    report = make_job()
    schedules.add(report, name="mine", cron=NEVER_NOW)
    schedules.add(report, name="mine", cron="@daily", args=["full"], queue="slow", priority=3)
    assert row(database, "cron, data, queue, priority, source", "mine") == (
        "@daily",
        {"kind": "full"},
        "slow",
        3,
        "api",
    )


def test_add_cannot_take_the_name_of_a_declared_schedule(database: Database) -> None:
    report = make_job(cron=NEVER_NOW)
    running.work_off(report)
    with pytest.raises(OptionError, match="'report' is declared"):
        schedules.add(report, name="report", cron="@daily")


def test_a_runner_does_not_start_when_a_schedule_of_the_same_name_was_made_at_run_time(database: Database) -> None:
    schedules.add(make_job(), name="report", cron="@daily")
    with pytest.raises(ConfigError, match="greenjobs schedules remove 'report'"):
        running.work_off(make_job(cron=NEVER_NOW))


# --- ticks ------------------------------------------------------------------------------------------------------------


def test_a_tick_enqueues_the_job_as_the_schedule_says(database: Database, fleet: Fleet) -> None:
    report = make_job()
    schedules.add(report, name="report", cron=NEVER_NOW, args=["full"], queue="slow", priority=7)
    set_back(database, "2 years")
    assert fleet.scheduler(report)[0].enqueue_due()
    columns = "job_type, data, queue, priority, state, to_char(run_at AT TIME ZONE 'UTC', 'MM-DD HH24:MI:SS')"
    expected = ("report", {"kind": "full"}, "slow", 7, "available", "01-01 00:00:00")
    assert database.rows(f"SELECT {columns} FROM background_jobs") == [expected]


def test_a_tick_is_written_down_with_its_job(database: Database, fleet: Fleet) -> None:
    report = make_job()
    schedules.add(report, name="report", cron=NEVER_NOW, catch_up="all")
    set_back(database, "3 years")
    fleet.scheduler(report)[0].enqueue_due()
    id, run_at = database.rows("SELECT id, run_at FROM background_jobs ORDER BY id DESC LIMIT 1")[0]
    assert row(database, "last_job_id, last_tick_at") == (id, run_at)


def test_a_job_runs_when_its_tick_comes(database: Database) -> None:
    ran = gevent.event.Event()

    @job(cron="* * * * * *")
    def note() -> None:
        ran.set()

    with running.started(Runner().register(note)):
        assert ran.wait(running.PATIENCE_SECONDS)


def test_a_schedule_that_is_made_while_a_runner_runs_is_noticed(database: Database) -> None:
    ran = gevent.event.Event()

    @job
    def note() -> None:
        ran.set()

    with running.started(Runner().register(note)):
        schedules.add(note, name="every second", cron="* * * * * *")
        assert ran.wait(running.PATIENCE_SECONDS)


@pytest.mark.parametrize(("catch_up", "minutes_ago"), [("none", []), ("last", [6]), ("all", [9, 8, 7, 6])])
def test_what_a_runner_that_was_down_catches_up(
    catch_up: str, minutes_ago: list[int], database: Database, fleet: Fleet
) -> None:
    """The ticks of four minutes, the last of them six minutes ago; so that none is on time."""
    report = make_job()
    minute = database.value("SELECT date_trunc('minute', now())")
    ticks = {ago: minute - timedelta(minutes=ago) for ago in (9, 8, 7, 6)}
    minutes = ",".join(str(tick.minute) for tick in ticks.values())
    schedules.add(report, name="report", cron=f"{minutes} * * * *", catch_up=catch_up)
    set_back(database, "15 minutes")
    fleet.scheduler(report)[0].enqueue_due()
    assert database.column("SELECT run_at FROM background_jobs ORDER BY id") == [ticks[ago] for ago in minutes_ago]
    assert row(database, "next_tick_at > now()") == (True,)


def test_many_missed_ticks_are_all_enqueued_in_order(database: Database, fleet: Fleet) -> None:
    report = make_job()
    schedules.add(report, name="report", cron="*/10 * * * * *", catch_up="all")
    since = set_back(database, "1 hour")
    fleet.scheduler(report)[0].enqueue_due()
    ticks = database.column("SELECT run_at FROM background_jobs ORDER BY id")
    assert {later - earlier for earlier, later in itertools.pairwise(ticks)} == {timedelta(seconds=10)}
    assert timedelta() <= ticks[0] - since < timedelta(seconds=10)
    assert row(database, "next_tick_at - last_tick_at") == (timedelta(seconds=10),)


def test_eight_schedulers_enqueue_each_tick_once(database: Database, fleet: Fleet) -> None:
    report = make_job()
    for number in range(10):
        schedules.add(report, name=f"number {number}", cron="*/15 * * * * *", catch_up="all", args=[str(number)])
        set_back(database, "10 minutes", f"number {number}")
    schedulers = [fleet.scheduler(report)[0] for _ in range(8)]
    greenlets = [gevent.spawn(scheduler.enqueue_due) for scheduler in schedulers]
    gevent.joinall(greenlets, timeout=running.PATIENCE_SECONDS, raise_error=True)
    counts = database.rows(
        "SELECT count(*), count(DISTINCT run_at), extract(epoch FROM max(run_at) - min(run_at))::int"
        " FROM background_jobs GROUP BY data"
    )
    assert len(counts) == 10
    # Those of ten minutes, and of as long as it took.
    assert all(total == distinct == seconds // 15 + 1 >= 40 for total, distinct, seconds in counts)


def take_and_enqueue(database: Database, report: Job[..., Any], connection: extensions.connection) -> None:
    """What a scheduler does with a tick that is due, up to the commit."""
    schedules.add(report, name="report", cron=NEVER_NOW)
    seen = set_back(database, "2 years")
    definition = {"job_type": "report", "cron": NEVER_NOW, "timezone": "UTC", "catch_up": "last"}
    assert storage.take_ticks(connection, "report", **definition, seen=seen, next=seen + timedelta(days=1000))
    report.options(connection=connection).delay()


def wait_for_the_lock(database: Database) -> None:
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    eventually(lambda: database.value(waits) == 1, "the other scheduler does not wait for the row")


@pytest.fixture
def first(database: Database) -> Iterator[extensions.connection]:
    connection = connect(database.url, application_name="first", timeout_seconds=10)
    connection.autocommit = False
    yield connection
    connection.close()


def test_a_tick_whose_runner_dies_before_the_commit_is_enqueued_by_another(
    database: Database, fleet: Fleet, first: extensions.connection
) -> None:
    report = make_job()
    take_and_enqueue(database, report, first)
    other = gevent.spawn(fleet.scheduler(report)[0].enqueue_due)
    wait_for_the_lock(database)
    database.terminate_sessions("first")
    assert other.get(timeout=running.PATIENCE_SECONDS)
    assert row(database, "last_job_id") == (database.value("SELECT id FROM background_jobs"),)


def test_a_tick_that_another_runner_has_enqueued_is_left_alone(
    database: Database, fleet: Fleet, first: extensions.connection
) -> None:
    report = make_job()
    take_and_enqueue(database, report, first)
    other = gevent.spawn(fleet.scheduler(report)[0].enqueue_due)
    wait_for_the_lock(database)
    first.commit()
    assert other.get(timeout=running.PATIENCE_SECONDS)
    assert (database.count(), row(database, "last_job_id")) == (1, (None,))


def test_every_second_is_enqueued_once_though_runners_are_killed(database: Database, tmp_path: Path) -> None:
    processes.write_application(
        tmp_path,
        """
        from greenjobs import job

        @job(cron="* * * * * *", catch_up="all")
        def tick():
            pass

        """,
    )
    database.rows("CREATE TABLE ticks (run_at timestamptz)")
    database.rows(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN INSERT INTO ticks VALUES (new.run_at); RETURN new; END'"
    )
    database.rows("CREATE TRIGGER note BEFORE INSERT ON background_jobs FOR EACH ROW EXECUTE FUNCTION note()")

    def more(count: int) -> bool:
        return int(database.value("SELECT count(*) FROM ticks")) >= count

    with (
        processes.runner(tmp_path, database.url) as first,
        processes.runner(tmp_path, database.url),
    ):
        eventually(lambda: more(1), "no tick", seconds=running.PATIENCE_SECONDS)
        first.kill()
        so_far = int(database.value("SELECT count(*) FROM ticks"))
        eventually(lambda: more(so_far + 2), "no tick after the kill", seconds=running.PATIENCE_SECONDS)
    ticks = database.column("SELECT run_at FROM ticks ORDER BY run_at")
    assert ticks == [ticks[0] + timedelta(seconds=count) for count in range(len(ticks))]


# --- overlap ----------------------------------------------------------------------------------------------------------


def due_again(database: Database, fleet: Fleet, report: Job[..., Any]) -> int:
    """Let one tick be due, and the scheduler see it; returns how many job rows there are."""
    set_back(database, "2 years")
    fleet.scheduler(report)[0].enqueue_due()
    return database.count()


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ("state = 'available'", 1),
        ("state = 'scheduled', run_at = now() + interval '1 hour', retries = 1", 1),
        ("state = 'running', claimed_by = 1, claimed_at = now()", 1),
        ("state = 'failed'", 2),
    ],
)
def test_without_overlap_a_tick_waits_for_the_job_of_the_one_before(
    change: str, count: int, database: Database, fleet: Fleet
) -> None:
    report = make_job()
    schedules.add(report, name="report", cron=NEVER_NOW, overlap=False)
    assert due_again(database, fleet, report) == 1
    database.rows(f"UPDATE background_jobs SET {change}")
    assert due_again(database, fleet, report) == count


def test_without_overlap_the_next_tick_comes_when_the_job_is_done(database: Database, fleet: Fleet) -> None:
    report = make_job()
    schedules.add(report, name="report", cron=NEVER_NOW, overlap=False)
    due_again(database, fleet, report)
    database.rows("DELETE FROM background_jobs")
    assert due_again(database, fleet, report) == 1


def test_with_overlap_a_tick_waits_for_nothing(database: Database, fleet: Fleet) -> None:
    report = make_job()
    schedules.add(report, name="report", cron=NEVER_NOW)
    due_again(database, fleet, report)
    assert due_again(database, fleet, report) == 2


def test_a_unique_job_that_waits_already_is_not_enqueued_again(database: Database, fleet: Fleet) -> None:
    report = make_job(unique=True)
    schedules.add(report, name="report", cron=NEVER_NOW)
    due_again(database, fleet, report)
    assert due_again(database, fleet, report) == 1


# --- pause, resume, remove --------------------------------------------------------------------------------------------


def test_a_paused_schedule_enqueues_nothing(database: Database, fleet: Fleet) -> None:
    report = make_job()
    schedules.add(report, name="report", cron=NEVER_NOW, catch_up="all")
    schedules.pause("report")
    assert due_again(database, fleet, report) == 0


def test_what_came_during_a_pause_is_not_caught_up(database: Database, fleet: Fleet) -> None:
    report = make_job()
    schedules.add(report, name="report", cron=NEVER_NOW, catch_up="all")
    schedules.pause("report")
    set_back(database, "5 years")
    schedules.resume("report")
    fleet.scheduler(report)[0].enqueue_due()
    assert (database.count(), row(database, "paused, next_tick_at > now()")) == (0, (False, True))


def test_resuming_what_is_not_paused_loses_no_tick(database: Database) -> None:
    schedules.add(make_job(), name="report", cron=NEVER_NOW)
    seen = set_back(database, "1 day")
    schedules.resume("report")
    assert row(database, "next_tick_at") == (seen,)


def test_a_pause_outlives_the_next_deploy(database: Database) -> None:
    running.work_off(make_job(cron=NEVER_NOW))
    schedules.pause("report")
    running.work_off(make_job(cron="0 0 2 1 *"))
    assert row(database, "paused") == (True,)


def test_a_removed_schedule_is_gone_and_its_jobs_are_not(database: Database, fleet: Fleet) -> None:
    report = make_job()
    schedules.add(report, name="report", cron=NEVER_NOW)
    due_again(database, fleet, report)
    schedules.remove("report")
    assert (schedules.find(), database.count()) == ([], 1)


def test_a_schedule_that_a_live_runner_declares_cannot_be_removed(database: Database, fleet: Fleet) -> None:
    fleet.scheduler(make_job(cron=NEVER_NOW))[0].declare(takes_all=True)
    with pytest.raises(OptionError, match="'report' is declared in the code"):
        schedules.remove("report")


def test_a_schedule_whose_runners_are_gone_can_be_removed(database: Database) -> None:
    running.work_off(make_job(cron=NEVER_NOW))
    schedules.remove("report")
    assert schedules.find() == []


# --- rolling deploys --------------------------------------------------------------------------------------------------


def end(database: Database, session: extensions.connection, *, ago: str = "2 minutes") -> None:
    """The runner of this session ended that long ago."""
    session.close()
    lives = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    id = database.value("SELECT declared_by FROM background_schedules")
    eventually(lambda: database.value(lives, id) == 0, "the session did not end")
    database.rows("UPDATE background_runners SET ended_at = now() - %s::interval WHERE id = %s", ago, id)


def test_the_runner_that_started_last_has_the_last_word(database: Database, fleet: Fleet) -> None:
    old, _ = fleet.scheduler(make_job(cron="@daily"))
    new, _ = fleet.scheduler(make_job(cron="@hourly"))
    old.declare(takes_all=True)
    new.declare(takes_all=True)
    old.declare()
    assert row(database, "cron") == ("@hourly",)


def test_when_the_new_runners_end_the_word_of_the_old_counts_again(database: Database, fleet: Fleet) -> None:
    old, _ = fleet.scheduler(make_job(cron="@daily"))
    new, session = fleet.scheduler(make_job(cron="@hourly"))
    old.declare(takes_all=True)
    new.declare(takes_all=True)
    end(database, session)
    old.declare()
    assert row(database, "cron") == ("@daily",)


def test_what_an_old_runner_still_declares_stays_and_is_left_to_it(database: Database, fleet: Fleet) -> None:
    old, _ = fleet.scheduler(make_job(cron=NEVER_NOW))
    old.declare(takes_all=True)
    new, _ = fleet.scheduler(make_job())
    new.declare(takes_all=True)
    database.rows("UPDATE background_schedules SET next_tick_at = now() - interval '2 years'")
    new.enqueue_due()
    assert database.count() == 0
    old.enqueue_due()
    assert database.count() == 1


def test_what_nobody_declares_any_more_is_deleted(database: Database, fleet: Fleet) -> None:
    old, session = fleet.scheduler(make_job(cron=NEVER_NOW))
    old.declare(takes_all=True)
    end(database, session)
    fleet.scheduler(make_job())[0].declare()
    assert schedules.find() == []


def test_what_belonged_to_a_runner_that_ended_just_now_is_not_deleted_yet(database: Database, fleet: Fleet) -> None:
    """Another old runner, which declares it too, has the time to take it over."""
    old, session = fleet.scheduler(make_job(cron=NEVER_NOW))
    other, _ = fleet.scheduler(make_job(cron=NEVER_NOW))
    new, _ = fleet.scheduler(make_job())
    old.declare(takes_all=True)
    end(database, session, ago="10 seconds")
    new.declare()
    other.declare()
    database.rows("UPDATE background_runners SET ended_at = ended_at - interval '1 hour'")
    new.declare()
    assert row(database, "cron") == (NEVER_NOW,)


def test_a_schedule_of_a_job_that_a_runner_does_not_know_is_not_its_business(database: Database, fleet: Fleet) -> None:
    old, session = fleet.scheduler(make_job(cron=NEVER_NOW))
    old.declare(takes_all=True)
    end(database, session)
    fleet.scheduler(make_job("another"))[0].declare(takes_all=True)
    assert row(database, "cron") == (NEVER_NOW,)


def test_a_schedule_made_at_run_time_outlives_all_runners(database: Database, fleet: Fleet) -> None:
    schedules.add(make_job(), name="report", cron=NEVER_NOW)
    fleet.scheduler(make_job())[0].declare(takes_all=True)
    assert row(database, "source") == ("api",)


def test_a_schedule_that_cannot_be_worked_out_here_is_left_to_others_and_said_once(
    database: Database, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    report = make_job()
    schedules.add(report, name="report", cron=NEVER_NOW)
    schedules.add(report, name="healthy", cron=NEVER_NOW)
    database.rows("UPDATE background_schedules SET next_tick_at = now() - interval '2 years'")
    database.rows("UPDATE background_schedules SET timezone = 'Europe/Atlantis' WHERE name = 'report'")
    scheduler, _ = fleet.scheduler(report)
    with caplog.at_level(logging.ERROR):
        assert not scheduler.enqueue_due()
        assert not scheduler.enqueue_due()
    assert (database.count(), len(caplog.records)) == (1, 1)


def test_a_schedule_whose_unique_key_cannot_be_made_holds_up_no_other(
    database: Database, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tick is enqueued when the key can be made."""
    customers = dict[str, str]()
    report = make_job(unique_key=lambda kind: customers[kind])
    healthy = make_job("healthy")
    schedules.add(report, name="a", cron=NEVER_NOW)
    schedules.add(healthy, name="b", cron=NEVER_NOW)
    database.rows("UPDATE background_schedules SET next_tick_at = now() - interval '1 year'")
    scheduler, _ = fleet.scheduler(report, healthy)
    with caplog.at_level(logging.ERROR):
        assert not scheduler.enqueue_due()
        assert not scheduler.enqueue_due()
    assert database.column("SELECT job_type FROM background_jobs") == ["healthy"]
    (record,) = caplog.records
    assert "the schedule 'a' (report) cannot be enqueued: report: unique_key failed: KeyError" in record.message
    customers["short"] = "all"
    assert scheduler.enqueue_due()
    assert database.count("job_type = 'report'") == 1


# --- the command line -------------------------------------------------------------------------------------------------


def invoke(database: Database, *arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["schedules", "--database-url", database.url, *arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_schedules_are_listed_with_their_next_and_last_runs(database: Database) -> None:
    schedules.add(make_job(), name="nightly", cron="30 2 * * *", timezone="Europe/Paris")
    database.rows(
        "UPDATE background_schedules SET last_tick_at = '2026-07-01 00:30+00', next_tick_at = '2100-01-01 01:30+00'"
    )
    output = invoke(database)
    for word in ("nightly", "report", "30 2 * * *", "2100-01-01 02:30:00+01:00", "2026-07-01 02:30:00+02:00"):
        assert word in output


def test_schedules_are_listed_as_json(database: Database) -> None:
    schedules.add(make_job(), name="nightly", cron="30 2 * * *", timezone="Europe/Paris", args=["full"])
    (found,) = json.loads(invoke(database, "--json"))
    assert (found["name"], found["data"], found["last_tick_at"]) == ("nightly", {"kind": "full"}, None)
    assert datetime.fromisoformat(found["next_tick_at"]) > datetime.now(timezone.utc)


def test_a_schedule_is_paused_resumed_and_removed(database: Database) -> None:
    schedules.add(make_job(), name="nightly", cron=NEVER_NOW)
    assert invoke(database, "pause", "nightly") == "paused nightly\n"
    assert "paused" in invoke(database)
    assert invoke(database, "resume", "nightly") == "resumed nightly\n"
    assert invoke(database, "remove", "nightly") == "removed nightly\n"
    assert invoke(database) == "no schedules\n"


def test_a_name_that_is_not_there_is_one_line_and_a_status(database: Database) -> None:
    assert invoke(database, "pause", "nightly", status=2) == "greenjobs: no schedule is named 'nightly'; known: none\n"


def test_the_database_can_be_named_after_the_command(database: Database) -> None:
    schedules.add(make_job(), name="nightly", cron=NEVER_NOW)
    arguments = ["schedules", "pause", "nightly", "--database-url", database.url]
    assert CliRunner().invoke(main, arguments).output == "paused nightly\n"


# --- the page in docs/ ------------------------------------------------------------------------------------------------


def test_every_example_of_the_page_does_what_it_says(database_url: str, tmp_path: Path) -> None:
    page = (processes.ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:`([\w.]+)`:\n\n)?```(\w+)\n(.*?)```", page, re.DOTALL)
    for name, _, text in blocks:
        if name:
            (tmp_path / name).write_text(text, encoding="utf-8")
    (script,) = (text for name, language, text in blocks if language == "python" and not name)
    assert "customer 17" in processes.run("python", "-c", script, folder=tmp_path, database_url=database_url)
    (commands,) = (text for _, language, text in blocks if language == "sh")
    output = processes.run("sh", "-e", "-c", commands, folder=tmp_path, database_url=database_url)
    for name in (
        "look_for_orders",
        "report 30 8 * * MON-FRI",
        "report 0 10 * * SAT",
        "weekly",
        "monthly",
        "customer 23",
    ):
        assert re.search(rf"^{re.escape(name)}  ", output, re.MULTILINE), output
    assert output.endswith("paused weekly\nresumed weekly\n")
