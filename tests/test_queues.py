"""Queues while runners serve them: paused, resumed and resized, seen in real runners and on the command line."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import databases
import gevent
import psycopg2
import pytest
import running
from click.testing import CliRunner, Result
from gevent.event import Event
from waiting import eventually

import greenjobs
from greenjobs import inspection, job, queues, storage
from greenjobs.cli import main
from greenjobs.errors import ConfigError, OptionError, SchemaError, UnknownQueue
from greenjobs.runner import Runner, RunnerHandle

PATIENCE_SECONDS = running.PATIENCE_SECONDS


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing but rows behind."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[running.Database]:
    monkeypatch.setenv("GREENJOBS_DATABASE_URL", shared_url)
    with running.application(shared_url) as database:
        yield database
        database.rows("TRUNCATE background_jobs, background_runners, background_waiting, background_queues")


class Held:
    """A job of the queue "emails" that runs until it is let go."""

    def __init__(self) -> None:
        self.started = 0
        self.may_end = Event()

        @job(queue="emails")
        def send() -> None:
            self.started += 1
            assert self.may_end.wait(PATIENCE_SECONDS), "nobody let the job go"

        self.job = send

    def wait_started(self, count: int) -> None:
        eventually(lambda: self.started >= count, f"{count} jobs did not start", seconds=PATIENCE_SECONDS)

    def runner(self, pool: int = 2, **options: Any) -> Runner:
        # So long an interval that no poll tells anybody to look.
        options.setdefault("poll_interval", 3600)
        return Runner().register(self.job).configure_queue("emails", pool=pool, **options)

    @contextlib.contextmanager
    def serve(self, **options: Any) -> Iterator[RunnerHandle]:
        """A runner of these jobs at work, which may all end when the block ends."""
        with running.started(self.runner(**options)) as handle:
            try:
                yield handle
            finally:
                self.may_end.set()


@pytest.fixture
def held(database: running.Database) -> Iterator[Held]:
    held = Held()
    yield held
    held.may_end.set()


def wait_paused(*handles: RunnerHandle, is_paused: bool = True) -> None:
    eventually(
        lambda: all(handle.workers["emails"].is_paused is is_paused for handle in handles),
        f"not all runners have is_paused {is_paused}",
        seconds=PATIENCE_SECONDS,
    )


def wait_pool(handle: RunnerHandle, pool: int) -> None:
    eventually(lambda: handle.workers["emails"].pool == pool, f"pool is not {pool}", seconds=PATIENCE_SECONDS)


def rounds_of_care(handle: RunnerHandle, count: int = 2) -> None:
    """Wait until the periodic chores have been done so many times more, wherever they are now."""
    maintenance = handle._maintenance
    seen = maintenance._looks_at_queues
    eventually(lambda: maintenance._looks_at_queues >= seen + count, "no chores", seconds=PATIENCE_SECONDS)


# --- pausing ----------------------------------------------------------------------------------------------------------


def test_paused_queue_starts_nothing_and_lets_finish_what_runs(database: running.Database, held: Held) -> None:
    with held.serve(pool=2) as handle:
        held.job.delay()
        held.wait_started(1)
        assert queues.pause("emails") == ["emails"]
        wait_paused(handle)
        held.job.delay_many([()] * 3)  # enqueuing goes on
        handle._maintenance.look(["emails"])
        rounds_of_care(handle)
        assert held.started == 1
        assert database.count("state = 'available'") == 3
        held.may_end.set()
        database.wait_for("true", count=3)
        assert held.started == 1


def test_pause_reaches_every_runner(database: running.Database, held: Held) -> None:
    with held.serve() as first, held.serve() as second:
        queues.pause("emails")
        wait_paused(first, second)


def test_other_queues_go_on(database: running.Database, held: Held) -> None:
    ran = Event()

    @job(queue="other")
    def work() -> None:
        ran.set()

    runner = held.runner().register(work).configure_queue("other")
    with running.started(runner) as handle:
        queues.pause("emails")
        wait_paused(handle)
        work.delay()
        assert ran.wait(PATIENCE_SECONDS)


def test_read_ahead_is_given_back_when_its_queue_is_paused(database: running.Database) -> None:
    ran = 0
    begun = Event()

    @job(queue="emails")
    def quick() -> None:
        nonlocal ran
        ran += 1
        if ran == 500:
            begun.set()
        if ran > 500:  # so that they are not all done before the pause is heard of
            gevent.sleep(0.001)

    quick.delay_many([()] * 20_000)
    with running.started(Runner().register(quick).configure_queue("emails", pool=5)) as handle:
        assert begun.wait(PATIENCE_SECONDS)
        queues.pause("emails")
        wait_paused(handle)
        eventually(lambda: handle.workers["emails"].is_idle, "something is still held", seconds=PATIENCE_SECONDS)
        database.wait_for("state = 'running'", count=0)
        left = database.count("state = 'available'")
        assert left == 20_000 - ran > 0
        assert database.count("retries > 0 OR crashes > 0") == 0


def test_claim_that_is_under_way_when_its_queue_is_paused_is_given_back(
    database: running.Database, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed, may_answer = Event(), Event()
    claim = storage.claim

    def slow_claim(*args: Any, **kwargs: Any) -> Any:
        rows = claim(*args, **kwargs)
        if rows:
            claimed.set()
            assert may_answer.wait(PATIENCE_SECONDS)
        return rows

    monkeypatch.setattr(storage, "claim", slow_claim)
    held.job.delay()
    with held.serve() as handle:
        assert claimed.wait(PATIENCE_SECONDS)
        queues.pause("emails")
        wait_paused(handle)
        may_answer.set()
        database.wait_for("state = 'available'")
        assert held.started == 0


def test_pause_survives_a_restart(database: running.Database, held: Held) -> None:
    queues.pause("emails", force=True)
    held.job.delay()
    with held.serve() as handle:
        assert handle.workers["emails"].is_paused
        rounds_of_care(handle)
        assert (held.started, database.count("state = 'available'")) == (0, 1)


def test_suspect_of_a_paused_queue_is_not_claimed(database: running.Database, held: Held) -> None:
    queues.pause("emails", force=True)
    held.job.delay()
    database.rows("UPDATE background_jobs SET crashes = 1")
    with held.serve(poll_interval=0.01) as handle:
        rounds_of_care(handle)
        handle._maintenance.look(["emails"])
        assert (held.started, database.count("state = 'available'")) == (0, 1)


def test_missed_notification_heals_itself(database: running.Database, held: Held) -> None:
    """The row alone, as if the notification had got lost."""
    with held.serve() as handle:
        database.rows("INSERT INTO background_queues (name, paused) VALUES ('emails', true)")
        wait_paused(handle)
        held.job.delay()
        database.rows("DELETE FROM background_queues")
        held.wait_started(1)


def test_pause_reaches_a_runner_that_has_a_lease(database: running.Database, held: Held) -> None:
    """There is nothing it could be notified by."""
    greenjobs.configure(database_url=database.url, session="lease")
    with held.serve() as handle:
        queues.pause("emails")
        wait_paused(handle)
        queues.resume("emails")
        wait_paused(handle, is_paused=False)


def test_answer_that_is_out_of_date_changes_nothing(database: running.Database, held: Held) -> None:
    """Chores and a notification may look at the same time, and their answers come in any order."""
    with held.serve() as handle:
        maintenance = handle._maintenance
        earlier = maintenance._begin_look_at_queues()
        found = inspection.queue_settings(database.connection)
        queues.pause("emails")
        wait_paused(handle)
        maintenance._adjust_queues(earlier, found)
        assert handle.workers["emails"].is_paused


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_resumed_queue_starts_at_once_in_every_runner(
    database: running.Database, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the notification alone, not by a poll, nor by the chores."""
    queues.pause("emails", force=True)
    held.job.delay_many([()] * 4)
    with held.serve(pool=2) as first, held.serve(pool=2) as second:
        for handle in (first, second):
            monkeypatch.setattr(handle._maintenance, "_do_chores", lambda: None)
        assert queues.resume("emails") == ["emails"]
        held.wait_started(4)
        assert [len(handle.workers["emails"].running) for handle in (first, second)] == [2, 2]


def test_worker_that_waited_when_it_was_paused_is_woken_when_it_is_resumed(
    database: running.Database, held: Held
) -> None:
    with held.serve() as handle:
        eventually(lambda: database.value("SELECT count(*) FROM background_waiting") == 1, "it does not wait")
        queues.pause("emails")
        wait_paused(handle)
        held.job.delay()
        queues.resume("emails")
        held.wait_started(1)


def test_resumed_queue_of_which_nothing_else_was_said_leaves_no_row(database: running.Database) -> None:
    queues.pause("emails", force=True)
    queues.resume("emails")
    assert database.value("SELECT count(*) FROM background_queues") == 0
    queues.resize("emails", 5, force=True)
    queues.pause("emails")
    queues.resume("emails")
    assert database.rows("SELECT name, paused, pool FROM background_queues") == [("emails", False, 5)]
    queues.pause("emails")
    queues.resize("emails", None)
    assert database.rows("SELECT name, paused, pool FROM background_queues") == [("emails", True, None)]
    queues.resume("emails")
    assert database.value("SELECT count(*) FROM background_queues") == 0


# --- resizing ---------------------------------------------------------------------------------------------------------


def test_larger_pool_takes_effect_at_once(database: running.Database, held: Held) -> None:
    held.job.delay_many([()] * 10)
    with held.serve(pool=2) as handle:
        held.wait_started(2)
        assert queues.resize("emails", 5) is True
        held.wait_started(5)
        rounds_of_care(handle)
        assert (held.started, len(handle.workers["emails"].running)) == (5, 5)


def test_smaller_pool_lets_finish_what_runs(database: running.Database) -> None:
    permits = gevent.lock.Semaphore(0)
    now: list[int] = []
    done = 0

    @job(queue="emails")
    def send() -> None:
        nonlocal done
        now.append(len(handle.workers["emails"].running))
        assert permits.acquire(timeout=PATIENCE_SECONDS)
        done += 1

    send.delay_many([()] * 9)
    with running.started(Runner().register(send).configure_queue("emails", pool=4)) as handle:
        worker = handle.workers["emails"]
        eventually(lambda: len(now) == 4, "four did not start", seconds=PATIENCE_SECONDS)
        queues.resize("emails", 2)
        wait_pool(handle, 2)
        assert len(worker.running) == 4
        for ended in (1, 2):
            permits.release()
            eventually(lambda ended=ended: done == ended, "it did not end", seconds=PATIENCE_SECONDS)
        rounds_of_care(handle)
        assert (len(worker.running), len(now)) == (2, 4)
        permits.release()
        eventually(lambda: len(now) == 5, "the next did not start", seconds=PATIENCE_SECONDS)
        assert now[4] == 2
        for _ in range(10):
            permits.release()
        database.wait_for("true", count=0)
        assert max(now[4:]) == 2


def test_smaller_pool_counts_for_jobs_that_never_wait(database: running.Database) -> None:
    """One carrier runs such jobs in a row, and there are as many carriers as the pool allows."""
    seen: list[tuple[int, int]] = []

    @job(queue="emails")
    def send() -> None:
        worker = handle.workers["emails"]
        gevent.sleep(0)
        seen.append((worker.pool, len(worker.running)))

    send.delay_many([()] * 3000)
    with running.started(Runner().register(send).configure_queue("emails", pool=8)) as handle:
        eventually(lambda: len(seen) > 100, "nothing runs", seconds=PATIENCE_SECONDS)
        queues.resize("emails", 1)
        database.wait_for("true", count=0)
    small = [count for pool, count in seen if pool == 1]
    assert small and set(small[8:]) == {1}


def test_default_size_is_what_each_runner_was_started_with(database: running.Database, held: Held) -> None:
    with held.serve(pool=2) as first, held.serve(pool=3) as second:
        queues.resize("emails", 7)
        wait_pool(first, 7)
        wait_pool(second, 7)
        assert queues.resize("emails", None) is True
        wait_pool(first, 2)
        wait_pool(second, 3)


def test_size_survives_a_restart(database: running.Database, held: Held) -> None:
    queues.resize("emails", 1, force=True)
    held.job.delay_many([()] * 3)
    with held.serve(pool=3) as handle:
        held.wait_started(1)
        rounds_of_care(handle)
        assert held.started == 1


@pytest.mark.parametrize("pool", [0, -1, 10_001, 1.5, "many", True, [], "default"], ids=repr)
def test_wrong_size_is_refused_with_queue_value_and_what_is_allowed(database: running.Database, pool: Any) -> None:
    with pytest.raises(OptionError, match=re.escape(f"the queue 'emails': pool is {pool!r}; allowed: a whole number")):
        queues.resize("emails", pool, force=True)
    assert database.value("SELECT count(*) FROM background_queues") == 0


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "two words", "a:b", 5, None], ids=repr)
@pytest.mark.parametrize(
    "act", [queues.pause, queues.resume, queues.get, lambda name: queues.resize(name, 5)], ids=range(4)
)
def test_what_is_no_name_of_a_queue_is_refused(database: running.Database, act: Any, name: Any) -> None:
    with pytest.raises(OptionError, match=re.escape(f"queue is {name!r}; allowed: ")):
        act(name)


@pytest.mark.parametrize("act", [queues.pause, queues.resume])
def test_no_name_at_all_is_refused(database: running.Database, act: Any) -> None:
    with pytest.raises(OptionError, match="at least one"):
        act()


@pytest.mark.parametrize(
    "act", [queues.pause, queues.resume, lambda *names: queues.resize(names[-1], 5)], ids=["pause", "resume", "resize"]
)
def test_queue_that_nobody_knows_is_refused_with_the_near_match(
    database: running.Database, held: Held, act: Any
) -> None:
    held.job.delay()
    with pytest.raises(UnknownQueue, match="'email' has no jobs, and no live runner serves it; did you mean 'emails'?"):
        act("emails", "email")
    assert database.value("SELECT count(*) FROM background_queues") == 0


def test_queue_is_known_by_a_job_or_a_live_runner_or_what_was_said_of_it(
    database: running.Database, held: Held
) -> None:
    with pytest.raises(UnknownQueue, match="known: none"):
        queues.pause("emails")
    (id,) = database.column("INSERT INTO background_jobs (job_type, data, queue) VALUES ('x', '{}', 'a') RETURNING id")
    queues.pause("a")
    database.rows("DELETE FROM background_jobs WHERE id = %s", id)
    assert queues.pause("a") == []
    with held.serve():
        assert queues.pause("emails") == ["emails"]
        assert queues.resume("emails") == ["emails"]
    with pytest.raises(UnknownQueue, match="'emails'"):
        queues.pause("emails")
    assert queues.pause("emails", force=True) == ["emails"]


def test_several_are_paused_and_resumed_together(database: running.Database) -> None:
    assert queues.pause("b", "a", "b", force=True) == ["b", "a"]
    assert queues.pause("c", "a", force=True) == ["c"]
    assert queues.resume("a", "b", "c") == ["a", "b", "c"]


def test_nothing_is_changed_when_one_of_several_is_unknown(database: running.Database, held: Held) -> None:
    held.job.delay()
    with pytest.raises(UnknownQueue, match="'typo'"):
        queues.pause("emails", "typo")
    assert queues.get("emails") is not None
    assert not queues.get("emails").paused  # type: ignore[union-attr]


def test_pauses_of_the_same_queues_in_another_order_do_not_deadlock(database: running.Database) -> None:
    names = [f"queue-{number}" for number in range(30)]
    for _ in range(5):
        acts = [gevent.spawn(queues.pause, *order, force=True) for order in (names, names[::-1]) for _ in range(3)]
        gevent.joinall(acts, timeout=PATIENCE_SECONDS, raise_error=True)
        assert sorted(name for act in acts for name in act.value) == sorted(names)
        acts = [gevent.spawn(queues.resume, *order) for order in (names, names[::-1])]
        gevent.joinall(acts, timeout=PATIENCE_SECONDS)
        resumed = [name for act in acts if act.successful() for name in act.value]
        assert sorted(resumed) == sorted(names)
        for act in acts:  # who came second may find no such queue any more
            assert act.successful() or isinstance(act.exception, UnknownQueue)


def test_missing_table_says_what_to_type(empty_database_url: str) -> None:
    greenjobs.configure(database_url=empty_database_url)
    try:
        with pytest.raises(SchemaError, match="`greenjobs migrate`"):
            queues.find()
    finally:
        greenjobs.configure()


def test_queues_are_an_attribute_of_the_package() -> None:
    assert greenjobs.queues is queues


# --- looking ----------------------------------------------------------------------------------------------------------


def test_record_has_counts_pools_and_runners(database: running.Database, held: Held) -> None:
    held.job.delay_many([()] * 3)
    held.job.options(delay=3600).delay()
    database.rows("INSERT INTO background_jobs (job_type, data, queue, state) VALUES ('x', '{}', 'emails', 'failed')")
    with held.serve(pool=2) as handle:
        held.wait_started(2)
        queues.resize("emails", 1)
        queue = queues.get("emails")
        assert queue is not None
        assert (queue.name, queue.waiting, queue.running, queue.scheduled, queue.failed) == ("emails", 1, 2, 1, 1)
        assert (queue.paused, queue.pool) == (False, 1)
        (server,) = queue.servers
        assert (server.runner, server.pool, server.share) == (handle.runner_id, 2, None)
        held.may_end.set()
    assert queues.get("emails").servers == []  # type: ignore[union-attr]


def test_find_has_all_queues_by_name(database: running.Database, held: Held) -> None:
    database.rows("INSERT INTO background_jobs (job_type, data, queue) VALUES ('x', '{}', 'zoo'), ('y', '{}', NULL)")
    queues.pause("art", force=True)
    with held.serve():
        assert [(queue.name, queue.paused) for queue in queues.find()] == [
            ("art", True),
            ("emails", False),
            ("zoo", False),
        ]


def test_get_of_an_unknown_queue_is_none(database: running.Database) -> None:
    assert queues.get("emails") is None


# --- until empty ------------------------------------------------------------------------------------------------------


def test_runner_until_empty_does_not_wait_for_a_paused_queue_and_says_so(
    database: running.Database, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    ran = Event()

    @job(queue="other")
    def work() -> None:
        ran.set()

    held.job.delay()
    work.delay()
    queues.pause("emails")
    runner = held.runner().register(work).configure_queue("other").shutdown_when_queue_empty()
    with caplog.at_level(logging.INFO, "greenjobs"):
        assert runner.start().wait_for_shutdown(PATIENCE_SECONDS)
    assert ran.is_set()
    assert "not waiting for what is in paused queues: emails" in caplog.text
    assert (held.started, database.count("state = 'available'")) == (0, 1)


# --- on the command line ----------------------------------------------------------------------------------------------


def command(*arguments: object, status: int = 0) -> Result:
    """Run the command in this process, as one without a terminal."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


class TestCommand:
    def test_list_is_a_table(self, database: running.Database, held: Held) -> None:
        held.job.delay_many([()] * 3)
        queues.pause("emails")
        queues.resize("art", 7, force=True)
        with held.serve(pool=2) as handle:
            queues.resize("emails", 10)
            for arguments in (("queues",), ("queues", "list")):
                header, art, emails = command(*arguments).stdout.splitlines()
                assert " ".join(header.split()) == "queue waiting running scheduled failed pool runners"
                assert " ".join(art.split()) == "art 0 0 0 0 7 none"
                assert re.fullmatch(
                    rf"emails +3 +0 +0 +0  10 \(2\)  {handle.runner_id} +paused since 20\S+ \S+", emails
                )

    def test_list_of_nothing(self, database: running.Database) -> None:
        assert command("queues").stdout == "no queues\n"

    def test_json_has_the_records(self, database: running.Database) -> None:
        queues.pause("emails", force=True)
        for arguments in (("queues", "--json"), ("queues", "list", "--json")):
            (queue,) = json.loads(command(*arguments).stdout)
            assert (queue["name"], queue["waiting"], queue["paused"], queue["pool"]) == ("emails", 0, True, None)
            assert queue["servers"] == []
            assert queue["changed_at"].startswith("20")

    def test_pause_and_resume_say_what_was_done(self, database: running.Database, held: Held) -> None:
        held.job.delay()
        assert command("queues", "pause", "emails").stdout == "paused emails\n"
        assert command("queues", "pause", "emails").stdout == "emails was paused already\n"
        assert command("queues", "resume", "emails").stdout == "resumed emails\n"
        assert command("queues", "resume", "emails").stdout == "emails was not paused\n"

    def test_resize_says_what_was_done(self, database: running.Database, held: Held) -> None:
        held.job.delay()
        assert command("queues", "resize", "emails", 10).stdout == "emails has a pool of 10 in every runner\n"
        assert command("queues", "resize", "emails", 10).stdout.endswith("in every runner, as before\n")
        assert (
            command("queues", "resize", "emails", "default").stdout
            == "emails has the pools that its runners were started with\n"
        )

    @pytest.mark.parametrize("size", ["many", "1.5", "0", "99999", "-1"])
    def test_wrong_size_is_refused_in_one_line(self, database: running.Database, size: str) -> None:
        result = command("queues", "resize", "emails", "--", size, status=2)
        assert result.stderr.startswith("greenjobs: the queue 'emails': ")
        assert len(result.stderr.splitlines()) == 1

    @pytest.mark.parametrize("arguments", [("pause", "emials"), ("resize", "emials", 5)], ids=["pause", "resize"])
    def test_typo_is_noticed_and_yes_means_it(self, database: running.Database, held: Held, arguments: Any) -> None:
        held.job.delay()
        result = command("queues", *arguments, status=2)
        assert "did you mean 'emails'?; if you mean it, say --yes" in result.stderr
        command("queues", *arguments, "--yes")
        assert database.column("SELECT name FROM background_queues") == ["emials"]

    def test_database_may_be_named_before_or_after(self, database: running.Database, monkeypatch: Any) -> None:
        monkeypatch.delenv("GREENJOBS_DATABASE_URL")
        url = ("--database-url", database.url)
        assert command("queues", *url, "pause", "emails", "--yes").stdout == "paused emails\n"
        assert command("queues", "resume", "emails", *url).stdout == "resumed emails\n"

    def test_status_shows_what_is_paused_and_resized(self, database: running.Database) -> None:
        queues.pause("emails", "bulk", force=True)
        queues.resize("bulk", 5)
        queues.resize("art", 6, force=True)
        lines = command("status").stdout.splitlines()
        assert "queue emails is paused" in lines
        assert "queue bulk is paused and has a pool of 5 in every runner" in lines
        assert "queue art has a pool of 6 in every runner" in lines
        assert json.loads(command("status", "--json").stdout)["changed_queues"] == {
            "art": {"paused": False, "pool": 6},
            "bulk": {"paused": True, "pool": 5},
            "emails": {"paused": True, "pool": None},
        }


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_idle_runner_asks_nothing_more_for_it(database: running.Database, held: Held, monkeypatch: Any) -> None:
    asked = 0
    settings = inspection.queue_settings

    def counted(connection: Any) -> Any:
        nonlocal asked
        asked += 1
        return settings(connection)

    monkeypatch.setattr(inspection, "queue_settings", counted)
    with held.serve() as handle:
        rounds_of_care(handle, count=3)
    assert asked == 1  # when it was started


def test_change_is_notified_once_and_what_is_none_not_at_all(database: running.Database) -> None:
    ear = psycopg2.connect(database.url)
    ear.autocommit = True
    with ear.cursor() as cursor:
        cursor.execute(f"LISTEN {storage.CHANNEL}")
        queues.pause("a", "b", force=True)
        queues.pause("a", "b")
        cursor.execute(f"NOTIFY {storage.CHANNEL}, 'end'")
    heard: list[str] = []
    while "end" not in heard:
        ear.poll()
        heard += [notify.payload for notify in ear.notifies]
        ear.notifies.clear()
    ear.close()
    assert heard == ["queues", "end"]


def test_size_is_bounded_in_the_table(database: running.Database) -> None:
    with pytest.raises(psycopg2.errors.CheckViolation):
        storage.resize_queues(database.connection, ["emails"], pool=0)


def test_configured_pool_is_still_checked(database: running.Database, held: Held) -> None:
    with pytest.raises(ConfigError, match="pool is 0"):
        held.runner(pool=0)
