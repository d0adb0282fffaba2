"""Counts of how attempts end: what is counted, that nothing is lost or counted twice, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import databases
import gevent
import psycopg2
import pytest
import running
from click.testing import CliRunner
from gevent.event import Event
from waiting import eventually

import greenjobs
from greenjobs import counting, counts, job, maintenance, pool, storage
from greenjobs.cli import main
from greenjobs.control import Discard, Snooze
from greenjobs.errors import OptionError, SchemaError
from greenjobs.runner import Runner
from greenjobs.tally import Tally

PATIENCE_SECONDS = running.PATIENCE_SECONDS

COUNTED = ("done", "retried", "failed", "discarded", "cancelled", "snoozed", "run_seconds", "waited_seconds")


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests here: making one takes longer than most of them do."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    with running.application(shared_url) as database:
        yield database
        database.rows("TRUNCATE background_jobs, background_runners, background_waiting, background_counts")


def sums(database: running.Database) -> dict[str, int]:
    """How many ended how, all minutes, queues and types together, without what did not happen."""
    outcomes = COUNTED[:6]
    (row,) = database.rows(f"SELECT {', '.join(f'sum({name})::int' for name in outcomes)} FROM background_counts")
    return {name: count for name, count in zip(outcomes, row, strict=True) if count}


def counted(queue: str = "default", job_type: str = "mail", **more: float) -> dict[str, Any]:
    return {"queue": queue, "job_type": job_type, **dict.fromkeys(COUNTED, 0), **more}


def register(database: running.Database) -> int:
    return int(
        database.value(
            "INSERT INTO background_runners (hostname, pid, version, queues, job_types)"
            " VALUES ('here', 1, '0', '{}', '{}') RETURNING id"
        )
    )


# --- what is counted --------------------------------------------------------------------------------------------------


def test_every_outcome_is_counted_by_queue_and_type(database: running.Database) -> None:
    @job(max_retries=1, backoff=0)
    def work(how: str) -> None:
        if how == "fail":
            raise ValueError
        if how == "discard":
            raise Discard("of no use")
        if how == "snooze":
            raise Snooze(3600)

    @job(queue="mails")
    def mail() -> None: ...

    work.delay_many([("end",)] * 5 + [("fail",)] * 3 + [("discard",)] * 2 + [("snooze",)])
    mail.delay_many([()] * 4)
    with running.started(Runner().register(work, mail)):
        database.wait_for("state IN ('available', 'running')", count=0)
        database.wait_for("state = 'failed'", count=3)
    totals = {(total.queue, total.job_type): total for total in counts.totals(since="1h")}
    assert totals.keys() == {("default", "work"), ("mails", "mail")}
    work_total, mail_total = totals["default", "work"], totals["mails", "mail"]
    assert [getattr(work_total, name) for name in COUNTED[:6]] == [5, 3, 3, 2, 0, 1]
    assert [getattr(mail_total, name) for name in COUNTED[:6]] == [4, 0, 0, 0, 0, 0]
    assert (work_total.attempts, mail_total.attempts) == (14, 4)


def test_seconds_are_those_that_attempts_ran_and_had_waited(database: running.Database) -> None:
    @job
    def work() -> None:
        gevent.sleep(0.05)

    work.delay()
    database.rows("UPDATE background_jobs SET run_at = now() - interval '90 s', created_at = now() - interval '90 s'")
    running.work_off(work)
    (total,) = counts.totals(since="1h")
    assert total.mean_run_seconds is not None
    assert total.mean_waited_seconds is not None
    assert 0.05 <= total.mean_run_seconds < PATIENCE_SECONDS
    assert 90 <= total.mean_waited_seconds < 90 + PATIENCE_SECONDS


def test_cancelled_jobs_are_counted_and_interrupted_ones_are_not(database: running.Database) -> None:
    begun = Event()

    @job
    def work() -> None:
        begun.set()
        Event().wait(PATIENCE_SECONDS)

    handle = work.delay()
    with running.started(Runner().register(work)) as runner:
        assert begun.wait(PATIENCE_SECONDS)
        handle.cancel()
        database.wait_for("true", count=0)
        begun.clear()
        work.delay()
        assert begun.wait(PATIENCE_SECONDS)
        runner.shutdown(urgency=2)
        assert runner.wait_for_shutdown(PATIENCE_SECONDS)
    assert sums(database) == {"cancelled": 1}


def test_job_that_is_cancelled_before_it_started_is_counted(database: running.Database) -> None:
    """It was claimed ahead of those that run."""
    cancelled = []

    @job
    def work() -> None:
        worker = handle.workers["default"]
        ahead = [row.id for row in worker.held_rows() if row.id not in worker.running]
        if ahead and not cancelled:
            cancelled.append(ahead[-1])
            handle.cancel(ahead[-1])

    work.delay_many([()] * 4000)
    with running.started(Runner().register(work).configure_queue("default", pool=5)) as handle:
        database.wait_for("true", count=0)
    assert len(cancelled) == 1
    assert sums(database) == {"done": 3999, "cancelled": 1}


def test_job_whose_runners_died_is_counted_as_failed_by_who_finds_it(database: running.Database) -> None:
    @job
    def work() -> None: ...

    work.delay()
    dead = register(database)
    database.rows("UPDATE background_jobs SET state = 'running', claimed_by = %s, crashes = 2, attempt = 3", dead)
    with running.started(Runner().register(work)):
        database.wait_for("state = 'failed'")
    assert sums(database) == {"failed": 1}


def test_tally_is_empty_once_it_is_taken() -> None:
    tally = Tally()
    assert tally.take() is None
    tally.add("failed", 2.0, 0.5)
    tally.add("interrupted", 2.0, 0.5)
    assert tally.take() == {**dict.fromkeys(COUNTED, 0), "failed": 1, "run_seconds": 2.0, "waited_seconds": 0.5}
    assert tally.take() is None


# --- writing ----------------------------------------------------------------------------------------------------------


def test_counts_are_written_while_the_runner_runs_and_not_while_it_is_idle(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_PAUSE_SECONDS", 0.01)
    written, add = [], storage.add_counts
    looks, take = [], counting.Counting._take

    def add_counts(connection: Any, runner: int, turn: int, counts: Sequence[Any]) -> None:
        written.append((turn, list(counts)))
        add(connection, runner, turn, counts)

    def look(self: counting.Counting) -> list[dict[str, Any]]:
        looks.append(True)
        return take(self)

    monkeypatch.setattr(storage, "add_counts", add_counts)
    monkeypatch.setattr(counting.Counting, "_take", look)

    @job
    def work() -> None: ...

    with running.started(Runner().register(work)):
        work.delay()
        eventually(lambda: sums(database) == {"done": 1}, "the first was not counted")
        work.delay()
        eventually(lambda: sums(database) == {"done": 2}, "the second was not counted")
        seen = len(looks)
        eventually(lambda: len(looks) > seen + 10, "it does not look any more")
    assert [turn for turn, _ in written] == [1, 2]


def test_nothing_is_lost_or_counted_twice_when_connections_break(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions end at any moment, before, within and after a writing; the outcomes of jobs, too, are tried again."""
    monkeypatch.setattr(counting, "_PAUSE_SECONDS", 0.001)
    ran = 0

    @job
    def work() -> None:
        nonlocal ran
        ran += 1
        gevent.sleep(0.001)

    work.delay_many([()] * 2000)
    with running.started(Runner().register(work).configure_queue("default", pool=4)):
        broken = 0
        while database.count() and broken < 20:  # every time its runner waits a little longer before it tries again
            broken += database.terminate_sessions("greenjobs runner")
            gevent.sleep(0.02)
        database.wait_for("true", count=0)
    assert broken > 0
    assert sums(database) == {"done": ran}


def test_counts_outlast_a_database_that_is_away_while_they_gather(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_PAUSE_SECONDS", 0.01)
    refused, add = Event(), storage.add_counts

    def add_counts(connection: Any, runner: int, turn: int, counts: Sequence[Any]) -> None:
        if not refused.is_set():
            refused.set()
            raise psycopg2.OperationalError("no space left on device")
        add(connection, runner, turn, counts)

    monkeypatch.setattr(storage, "add_counts", add_counts)

    @job
    def work() -> None: ...

    work.delay()
    with running.started(Runner().register(work)):
        assert refused.wait(PATIENCE_SECONDS)
        work.delay_many([()] * 3)
        eventually(lambda: sums(database) == {"done": 4}, "the counts were not written")


def test_writing_that_was_committed_and_not_answered_is_not_done_again(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, add = [], storage.add_counts

    def add_counts(connection: Any, runner: int, turn: int, counts: Sequence[Any]) -> None:
        turns.append(turn)
        add(connection, runner, turn, counts)
        if len(turns) == 1:
            raise psycopg2.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(storage, "add_counts", add_counts)

    @job
    def work() -> None: ...

    work.delay_many([()] * 7)
    running.work_off(work)
    assert turns == [1, 1]
    assert sums(database) == {"done": 7}


def test_writing_that_is_still_on_its_way_when_it_is_tried_again_counts_once(database: running.Database) -> None:
    """The first has not committed yet; the second waits for it, and finds that it was done."""
    runner = register(database)
    first = psycopg2.connect(database.url)
    storage.add_counts(first, runner, 1, [counted(done=5)])
    second = pool.connect(database.url, application_name="second", timeout_seconds=10)
    again = gevent.spawn(storage.add_counts, second, runner, 1, [counted(done=5)])
    waits = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'second' AND wait_event_type = 'Lock'"
    eventually(lambda: database.value(waits), "it does not wait")
    first.commit()
    again.get(timeout=PATIENCE_SECONDS)
    assert sums(database) == {"done": 5}
    storage.add_counts(second, runner, 2, [counted(done=1)])
    assert sums(database) == {"done": 6}
    first.close()
    second.close()


def test_runners_that_write_the_same_minute_add_up_and_never_deadlock(database: running.Database) -> None:
    """Both go through twenty rows, in opposite orders as they are given."""
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = database.value(deadlocks)
    rows = [counted(f"queue {number % 4}", f"type {number}", done=1, failed=2) for number in range(20)]

    def write(runner: int, rows: Sequence[dict[str, Any]]) -> None:
        connection = pool.connect(database.url, application_name="test", timeout_seconds=10)
        for turn in range(1, 101):
            storage.add_counts(connection, runner, turn, rows)
        connection.close()

    runners = [(register(database), each) for each in (rows, rows[::-1], rows, rows[::-1])]
    writers = [gevent.spawn(write, *each) for each in runners]
    for writer in gevent.joinall(writers, timeout=2 * PATIENCE_SECONDS, raise_error=True):
        assert writer.successful()
    assert sums(database) == {"done": 4 * 100 * 20, "failed": 4 * 100 * 20 * 2}
    assert database.value(deadlocks) == before


def test_two_runners_add_to_the_same_rows(database: running.Database) -> None:
    @job
    def work() -> None:
        gevent.sleep(0)

    work.delay_many([()] * 500)
    with running.started(Runner().register(work)), running.started(Runner().register(work)):
        database.wait_for("true", count=0)
    assert sums(database) == {"done": 500}
    assert database.column("SELECT counted FROM background_runners WHERE counted > 0")


def test_runner_that_lost_its_session_goes_on_counting(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_PAUSE_SECONDS", 0.01)

    @job
    def work() -> None: ...

    work.delay()
    with running.started(Runner().register(work)) as runner:
        eventually(lambda: sums(database) == {"done": 1}, "the first was not counted")
        first = runner.runner_id
        database.terminate_sessions("greenjobs session")
        eventually(lambda: runner.runner_id not in (None, first), "there is no other session")
        work.delay()
        eventually(lambda: sums(database) == {"done": 2}, "the second was not counted")


# --- how long they are kept -------------------------------------------------------------------------------------------


def insert(
    database: running.Database, *ages: str, queue: str = "default", job_type: str = "mail", done: int = 1
) -> None:
    for age in ages:
        database.rows(
            "INSERT INTO background_counts (minute, queue, job_type, done, run_seconds, waited_seconds)"
            " VALUES (date_trunc('minute', now()) - %s::interval, %s, %s, %s, 2, 6)",
            *(age, queue, job_type, done),
        )


def test_oldest_counts_are_pruned_first_and_so_many_at_once(database: running.Database) -> None:
    insert(database, "3 days", "2 days", "1 day", "0 days")

    def prune(limit: int) -> int:
        return storage.prune_counts(database.connection, age_seconds=3600, limit=limit)

    assert prune(1) == 1
    assert database.value("SELECT now() - min(minute) < interval '2 days 2 minutes' FROM background_counts")
    assert (prune(10), prune(10)) == (2, 0)
    assert database.value("SELECT count(*) FROM background_counts") == 1


@pytest.mark.parametrize(("keep_counts", "left"), [("2 days", 2), ("forever", 3)])
def test_runner_deletes_counts_that_were_kept_long_enough(
    database: running.Database, monkeypatch: pytest.MonkeyPatch, keep_counts: str, left: int
) -> None:
    greenjobs.configure(database_url=database.url, keep_counts=keep_counts)
    has_looked, look = Event(), maintenance.Maintenance.prune_counts

    def prune_counts(self: maintenance.Maintenance) -> None:
        look(self)
        has_looked.set()

    monkeypatch.setattr(maintenance.Maintenance, "prune_counts", prune_counts)
    insert(database, "3 days", "1 day", "0 days")

    @job
    def work() -> None: ...

    with running.started(Runner().register(work)):
        assert has_looked.wait(PATIENCE_SECONDS)
    assert database.value("SELECT count(*) FROM background_counts") == left


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def history(database: running.Database) -> running.Database:
    insert(database, "2 days", "50 minutes", "2 minutes", done=10)
    insert(database, "2 minutes", job_type="report", done=5)
    insert(database, "1 minute", queue="mails", done=3)
    return database


def test_minutes_are_read_oldest_first(history: running.Database) -> None:
    read = counts.minutes(since="1h")
    assert [(each.queue, each.job_type, each.done) for each in read] == [
        ("default", "mail", 10),
        ("default", "mail", 10),
        ("default", "report", 5),
        ("mails", "mail", 3),
    ]
    stored = history.column("SELECT minute FROM background_counts ORDER BY minute")
    assert [each.minute for each in read] == stored[1:]
    assert (read[0].mean_run_seconds, read[0].mean_waited_seconds) == (0.2, 0.6)


@pytest.mark.parametrize(
    "since", [3600, 3600.0, "1h", timedelta(hours=1), datetime.now(timezone.utc) - timedelta(minutes=55)], ids=repr
)
def test_since_has_many_forms(history: running.Database, since: counts.Since) -> None:
    assert sum(each.done for each in counts.minutes(since=since)) == 28


def test_totals_are_by_queue_and_type(history: running.Database) -> None:
    totals = counts.totals(since="3 days")
    assert [(each.queue, each.job_type, each.done) for each in totals] == [
        ("default", "mail", 30),
        ("default", "report", 5),
        ("mails", "mail", 3),
    ]
    assert 3 * 86400 <= totals[0].seconds < 3 * 86400 + 60 + PATIENCE_SECONDS


def test_rates_are_those_of_the_last_minutes_by_queue(history: running.Database) -> None:
    rates = counts.rates()
    assert [(each.queue, each.job_type, each.done) for each in rates] == [("default", None, 15), ("mails", None, 3)]
    assert 5 * 60 <= rates[0].seconds < 6 * 60 + PATIENCE_SECONDS
    assert rates[0].done_per_minute == pytest.approx(15 / (rates[0].seconds / 60))
    assert rates[0].failed_per_minute == 0


@pytest.mark.parametrize(
    ("filters", "done"),
    [
        ({"queue": "mails"}, 3),
        ({"queue": ["mails", "default"]}, 28),
        ({"job_type": "report"}, 5),
        ({"queue": "mails", "job_type": "report"}, 0),
        ({"job_type": []}, 0),
    ],
    ids=repr,
)
def test_filters_must_all_hold(history: running.Database, filters: dict[str, Any], done: int) -> None:
    assert sum(each.done for each in counts.minutes(since="1h", **filters)) == done
    assert sum(each.done for each in counts.totals(since="1h", **filters)) == done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"since": "yesterday"}, "since is 'yesterday'; allowed: an aware datetime, seconds"),
        ({"since": -1}, "since is -1; allowed"),
        ({"since": None}, "since is None; allowed"),
        ({"since": datetime(2026, 1, 1)}, r"since is datetime.*, which has no time zone"),
        ({"since": 1, "queue": 5}, "queue is 5; allowed: a name, or a list of names"),
        ({"since": 1, "job_type": ["a", ""]}, r"job_type is \['a', ''\]; allowed"),
    ],
)
def test_what_cannot_be_asked_is_refused(database: running.Database, arguments: dict[str, Any], message: str) -> None:
    for read in (counts.minutes, counts.totals):
        with pytest.raises(OptionError, match=message):
            read(**arguments)


def test_counts_of_an_unmigrated_database_say_what_to_type(empty_database_url: str) -> None:
    with running.application(empty_database_url), pytest.raises(SchemaError, match="type `greenjobs migrate`"):
        counts.rates()


def command(database: running.Database, *arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, [*arguments, "--database-url", database.url])
    assert result.exit_code == status, result.output
    return result.output


def test_status_shows_rates(history: running.Database) -> None:
    lines = [line.split() for line in command(history, "status").splitlines()]
    assert ["last", "5", "minutes", "done/min", "failed/min", "run", "waited"] in lines
    (row,) = [line for line in lines if line[:1] == ["mails"]]
    assert 0.5 <= float(row[1]) <= 0.6
    assert row[2:] == ["0.0", "0.667", "s", "2", "s"]
    first, second = json.loads(command(history, "status", "--json"))["rates"]
    assert (first["queue"], second["queue"], second["done"]) == ("default", "mails", 3)
    assert second["mean_run_seconds"] == pytest.approx(2 / 3)


def test_status_says_nothing_of_rates_where_nothing_ended_lately(database: running.Database) -> None:
    insert(database, "10 minutes")
    assert "done/min" not in command(database, "status")
    assert json.loads(command(database, "status", "--json"))["rates"] == []


def test_counts_command_prints_totals(history: running.Database) -> None:
    lines = [line.split() for line in command(history, "counts", "--since", "1h").splitlines()]
    assert lines[0] == ["queue", "type", *COUNTED[:6], "run", "waited"]
    assert lines[1] == ["default", "mail", "20", "0", "0", "0", "0", "0", "0.2", "s", "0.6", "s"]
    assert len(lines) == 4
    shown = json.loads(
        command(history, "counts", "--since", "3 days", "--type", "mail", "--queue", "default", "--json")
    )
    assert [(each["queue"], each["job_type"], each["done"]) for each in shown] == [("default", "mail", 30)]
    assert "since is 'never'; allowed" in command(history, "counts", "--since", "never", status=2)
