"""Queues of one runner that share its slots: what runs while jobs are held, which is a fact and no matter of time."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import databases
import gevent
import processes
import pytest
import running
from click.testing import CliRunner
from gevent.event import Event
from waiting import eventually

import greenjobs
from greenjobs import job, queues, storage
from greenjobs.cli import main
from greenjobs.errors import ConfigError
from greenjobs.job import Job
from greenjobs.runner import Runner, RunnerHandle
from greenjobs.share import Share, Stake

PATIENCE_SECONDS = running.PATIENCE_SECONDS


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing but rows behind."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    with running.application(shared_url) as database:
        yield database
        database.rows("TRUNCATE background_jobs, background_runners, background_waiting, background_queues")


class House:
    """Jobs of several queues that run until they are let go; what started, in order, and what runs now."""

    def __init__(self, *names: str) -> None:
        self.running: Counter[str] = Counter()
        self.started: list[str] = []
        self.most = 0
        self.ended = 0
        self._doors: dict[str, list[Event]] = {name: [] for name in names}
        self._is_closed = False
        self.jobs: dict[str, Job[Any, Any]] = {name: self._declare(name) for name in names}

    def _declare(self, name: str) -> Job[Any, Any]:
        @job(queue=name, name=name)
        def stay() -> None:
            door = Event()
            self._doors[name].append(door)
            self.started.append(name)
            self.running[name] += 1
            self.most = max(self.most, self.total)
            try:
                assert self._is_closed or door.wait(PATIENCE_SECONDS), "nobody let the job go"
            finally:
                self.running[name] -= 1
                self.ended += 1

        return stay

    @property
    def total(self) -> int:
        return sum(self.running.values())

    def enqueue(self, **counts: int) -> None:
        for name, count in counts.items():
            self.jobs[name].delay_many([()] * count)

    def let_go(self, name: str, count: int = 1) -> None:
        """Let the jobs of this queue end that have run longest, and wait until they have."""
        ended = self.ended + count
        for _ in range(count):
            self._doors[name].pop(0).set()
        eventually(lambda: self.ended >= ended, f"jobs of {name} do not end", seconds=PATIENCE_SECONDS)

    def close(self) -> None:
        """Let all end, and those that start from now on, too."""
        self._is_closed = True
        for doors in self._doors.values():
            while doors:
                doors.pop().set()

    def wait(self, **counts: int) -> None:
        """Wait until exactly so many jobs of each queue run."""
        expected = {name: counts.get(name, 0) for name in self.jobs}
        eventually(
            lambda: all(self.running[name] == count for name, count in expected.items()),
            f"{expected} do not run: {self.running}",
            seconds=PATIENCE_SECONDS,
        )

    def runner(self, slots: int, /, pools: dict[str, int] | None = None, **weights: float) -> Runner:
        runner = Runner().register(*self.jobs.values()).share(slots)
        for name in self.jobs:
            # So long an interval that no poll tells anybody to look.
            pool = (pools or {}).get(name)
            runner.configure_queue(name, pool=pool, weight=weights.get(name), poll_interval=3600)
        return runner

    @contextlib.contextmanager
    def serve(self, slots: int, /, pools: dict[str, int] | None = None, **weights: float) -> Iterator[RunnerHandle]:
        with running.started(self.runner(slots, pools, **weights)) as handle:
            try:
                yield handle
            finally:
                self.close()


def notice(handle: RunnerHandle, *names: str) -> None:
    """Wait until it is known in the runner that there are jobs in these queues: who gets the next slot depends on it."""

    def is_known(name: str) -> bool:
        stake = handle.workers[name]._stake
        return stake is not None and stake.is_hungry

    eventually(lambda: all(map(is_known, names)), f"nobody looks into {names}", seconds=PATIENCE_SECONDS)


def settle(handle: RunnerHandle) -> None:
    """Wait until nobody is claiming, and nobody's second look is due, so that what runs now is what goes on running."""

    def is_at_rest() -> bool:
        return not any(worker._claims_under_way for worker in handle.workers.values())

    for _ in range(10):
        eventually(is_at_rest, "a claim goes on for ever", seconds=PATIENCE_SECONDS)
        gevent.sleep(0.01)


# --- strict order -----------------------------------------------------------------------------------------------------


def test_first_queue_gets_all_slots_and_the_others_what_it_leaves(database: running.Database) -> None:
    house = House("critical", "default", "bulk")
    house.enqueue(critical=3, default=3, bulk=10)
    with house.serve(5) as handle:
        house.wait(critical=3, default=2)
        settle(handle)
        house.wait(critical=3, default=2)
        house.let_go("critical", 2)
        house.wait(critical=1, default=3, bulk=1)
        house.let_go("critical")
        house.wait(default=3, bulk=2)
        assert house.most == 5


def test_saturated_queue_starves_those_behind_it(database: running.Database) -> None:
    """That is what strict order means."""
    house = House("critical", "bulk")
    house.enqueue(critical=30, bulk=5)
    with house.serve(3) as handle:
        for _ in range(9):
            house.wait(critical=3)
            settle(handle)
            house.let_go("critical", 3)
        house.wait(critical=3)
        assert "bulk" not in house.started
        house.let_go("critical", 3)
        house.wait(bulk=3)
        assert house.started[:30] == ["critical"] * 30


def test_freed_slot_is_for_a_job_that_came_later_in_a_queue_before(database: running.Database) -> None:
    house = House("critical", "default", "bulk")
    house.enqueue(bulk=20)
    with house.serve(4) as handle:
        house.wait(bulk=4)
        settle(handle)
        house.enqueue(critical=2, default=1)
        notice(handle, "critical", "default")
        house.let_go("bulk")
        house.wait(critical=1, bulk=3)
        house.let_go("bulk")
        house.wait(critical=2, bulk=2)
        house.let_go("bulk")
        house.wait(critical=2, default=1, bulk=1)
        house.let_go("bulk")
        house.wait(critical=2, default=1, bulk=1)
        assert house.started == [*["bulk"] * 4, "critical", "critical", "default", "bulk"]
        assert house.most == 4


def test_job_that_nobody_was_woken_for_comes_first_once_a_poll_has_found_it(database: running.Database) -> None:
    """While others have all slots, too: there may never be a free one at the moment of a poll."""
    house = House("critical", "bulk")
    house.enqueue(bulk=20)
    with house.serve(2) as handle:
        house.wait(bulk=2)
        settle(handle)
        database.rows("DELETE FROM background_waiting")
        house.enqueue(critical=1)
        assert handle.workers["critical"].has_room  # so that the poll looks there
        handle._maintenance.look(["critical"])
        notice(handle, "critical")
        house.let_go("bulk")
        house.wait(critical=1, bulk=1)


def test_read_ahead_of_a_queue_does_not_hold_up_one_before_it(database: running.Database) -> None:
    """Hundreds of quick jobs are claimed ahead when the critical one arrives; few of them may start before it."""
    order: list[str] = []
    arrived = Event()

    @job(queue="critical")
    def critical() -> None:
        order.append("critical")

    @job(queue="bulk")
    def bulk() -> None:
        gevent.sleep(0.001)
        order.append("bulk")
        worker = handle.workers["bulk"]
        if worker.held_rows()[len(worker.running) :] and len(order) > 2000 and not arrived.is_set():
            arrived.set()

    bulk.delay_many([()] * 20_000)
    runner = Runner().register(critical, bulk).share(10)
    for name in ("critical", "bulk"):
        runner.configure_queue(name, poll_interval=3600)
    with running.started(runner) as handle:
        worker = handle.workers["bulk"]
        assert arrived.wait(PATIENCE_SECONDS)
        # In place of a notification: no switch to another greenlet between the look at the order and the wake-up.
        critical.delay()
        ready = worker._executor.ready
        before = len(order)
        handle.workers["critical"].wake()
        eventually(lambda: "critical" in order, "the critical job does not run", seconds=PATIENCE_SECONDS)
        position = order.index("critical")
        assert position - before <= max(ready, 10)
    assert database.count("state <> 'available'") == 0


def test_read_ahead_waits_while_a_queue_before_has_jobs_ready(database: running.Database) -> None:
    """The share itself, with executors whose numbers are given: what is ready there does not take the slot."""
    share = Share(2, by_weight=False)
    first, second = FakeExecutor(), FakeExecutor(ready=100)
    stakes = join(share, first, second)
    stakes[0].is_hungry = stakes[1].is_hungry = False
    share.distribute()
    assert (first.pool, second.pool) == (0, 2)
    second.start(2)
    share.distribute()
    stakes[0].set_hungry(True)
    assert (first.pool, second.pool) == (0, 2)
    second.end(1)
    share.distribute()
    assert (first.pool, second.pool) == (1, 1)
    assert not stakes[1].may_read_ahead
    stakes[0].set_hungry(False)
    assert (first.pool, second.pool) == (0, 2)
    assert stakes[1].may_read_ahead


def test_queue_in_a_share_with_a_pool_has_no_more_slots_than_that(database: running.Database) -> None:
    house = House("critical", "bulk")
    house.enqueue(critical=10, bulk=10)
    with house.serve(5, {"critical": 2}) as handle:
        house.wait(critical=2, bulk=3)
        settle(handle)
        house.let_go("bulk")
        house.wait(critical=2, bulk=3)
        house.let_go("critical")
        house.wait(critical=2, bulk=3)
        assert house.most == 5


# --- by weight --------------------------------------------------------------------------------------------------------


def test_saturated_queues_have_slots_by_their_weights(database: running.Database) -> None:
    house = House("critical", "bulk")
    house.enqueue(critical=60, bulk=60)
    with house.serve(8, critical=3, bulk=1) as handle:
        house.wait(critical=6, bulk=2)
        settle(handle)
        for _ in range(5):
            house.let_go("critical")
            house.wait(critical=6, bulk=2)
            house.let_go("bulk")
            house.wait(critical=6, bulk=2)
        house.let_go("critical", 6)
        house.wait(critical=6, bulk=2)
        house.let_go("bulk", 2)
        house.wait(critical=6, bulk=2)
        assert house.most == 8


def test_slots_that_do_not_divide_are_shared_as_well_as_they_can(database: running.Database) -> None:
    house = House("a", "b", "c")
    house.enqueue(a=60, b=60, c=60)
    with house.serve(10, a=5, b=2, c=1):
        eventually(lambda: house.total == 10, "not all slots are used", seconds=PATIENCE_SECONDS)
        assert 6 <= house.running["a"] <= 7
        assert 2 <= house.running["b"] <= 3
        assert 1 <= house.running["c"] <= 2


def test_part_of_an_idle_queue_is_for_the_others_until_it_wants_it(database: running.Database) -> None:
    house = House("critical", "bulk")
    house.enqueue(bulk=30)
    with house.serve(4, critical=3, bulk=1) as handle:
        house.wait(bulk=4)
        settle(handle)
        house.enqueue(critical=30)
        notice(handle, "critical")
        for count in (1, 2, 3):  # as bulk jobs end, until it has the part that it is worth
            house.let_go("bulk")
            house.wait(critical=count, bulk=4 - count)
        house.let_go("bulk")
        house.wait(critical=3, bulk=1)


def test_no_slot_stays_empty_while_anything_waits(database: running.Database) -> None:
    house = House("a", "b", "c")
    house.enqueue(a=1, b=2, c=30)
    with house.serve(10, a=100, b=100, c=1):
        house.wait(a=1, b=2, c=7)


def test_lightest_queue_gets_the_only_slot_now_and_then(database: running.Database) -> None:
    """No queue starves: what it did not have is remembered."""
    started: list[str] = []

    def declare(name: str) -> Job[Any, Any]:
        @job(queue=name, name=name)
        def work() -> None:
            started.append(name)
            gevent.sleep(0.002)

        return work

    jobs = {name: declare(name) for name in ("heavy", "light")}
    for each in jobs.values():
        each.delay_many([()] * 3000)
    runner = Runner().register(*jobs.values()).share(1)
    runner.configure_queue("heavy", weight=4).configure_queue("light", weight=1)
    with running.started(runner):
        eventually(lambda: started.count("light") >= 20, f"light starves: {Counter(started)}", seconds=PATIENCE_SECONDS)
        heavy = started.count("heavy")
    assert heavy > started.count("light")


def test_time_in_one_slot_is_by_weight() -> None:
    """The share itself, on a clock of the test's own: 3 to 1 over the time that jobs of any length take."""
    share = Share(1, by_weight=True)
    heavy, light = FakeExecutor(ready=1), FakeExecutor(ready=1)
    stakes = join(share, heavy, light, weights=(3.0, 1.0))
    seconds = {heavy: 0.0, light: 0.0}
    lengths = {heavy: 0.5, light: 2.0}
    clock = share._counted_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: clock)
        for _ in range(2000):
            share.distribute()
            assert heavy.pool + light.pool == 1
            chosen = heavy if heavy.pool else light
            chosen.start(1)
            clock += lengths[chosen]
            seconds[chosen] += lengths[chosen]
            chosen.end(1)
            chosen.ready = 1
    assert 2.9 < seconds[heavy] / seconds[light] < 3.1
    assert all(stake.is_hungry for stake in stakes)


def test_queue_that_was_idle_has_saved_nothing_up() -> None:
    share = Share(2, by_weight=True)
    busy, idle = FakeExecutor(ready=2), FakeExecutor()
    stakes = join(share, busy, idle, weights=(1.0, 1.0))
    stakes[0].is_hungry = True
    stakes[1].is_hungry = False
    clock = share._counted_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: clock)
        share.distribute()
        busy.start(2)
        clock += 3600
        share.distribute()
        stakes[1].set_hungry(True)
        idle.ready = 2
        busy.ready = 2
        busy.end(2)
        share.distribute()
    assert (busy.pool, idle.pool) == (1, 1)


class FakeExecutor:
    """The numbers that a share goes by, for a test to set."""

    def __init__(self, ready: int = 0) -> None:
        self.pool = 0
        self.running: dict[int, None] = {}
        self.ready = ready
        self._number = 0

    @property
    def held(self) -> int:
        return len(self.running) + self.ready

    def resize(self, pool: int) -> None:
        self.pool = pool

    def start(self, count: int) -> None:
        for _ in range(count):
            self._number += 1
            self.running[self._number] = None
        self.ready -= count
        assert len(self.running) <= self.pool

    def end(self, count: int) -> None:
        for _ in range(count):
            self.running.popitem()


def join(share: Share, *executors: FakeExecutor, weights: tuple[float, ...] = ()) -> list[Stake]:
    return [
        share.join(
            executor,  # type: ignore[arg-type]
            limit=100,
            weight=weights[number] if weights else None,
            on_room=lambda: None,
        )
        for number, executor in enumerate(executors)
    ]


# --- both -------------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("weights", [{}, {"critical": 3, "bulk": 1}], ids=["in-order", "by-weight"])


@BOTH
def test_no_more_jobs_run_than_there_are_slots_while_everything_changes(
    database: running.Database, weights: dict[str, float]
) -> None:
    """Quick jobs and slow ones, read-ahead on, pools that change: every start is counted."""
    now = most = 0
    ran: Counter[str] = Counter()

    def declare(name: str, seconds: float) -> Job[Any, Any]:
        @job(queue=name, name=f"{name}-{seconds}")
        def work() -> None:
            nonlocal now, most
            now += 1
            most = max(most, now)
            if seconds >= 0:
                gevent.sleep(seconds)
            ran[name] += 1
            now -= 1

        return work

    jobs = [declare(name, seconds) for name in ("critical", "bulk") for seconds in (-1, 0, 0.001, 0.02)]
    for _ in range(10):
        for each in jobs:
            each.delay_many([()] * 60)
    runner = Runner().register(*jobs).share(7).shutdown_when_queue_empty()
    for name in ("critical", "bulk"):
        runner.configure_queue(name, weight=weights.get(name))
    handle = runner.start()
    for pool in (1, 5, 2, 7, None):
        queues.resize("critical", pool)
        queues.resize("bulk", pool and 8 - pool)
        seen = sum(ran.values())
        eventually(lambda seen=seen: sum(ran.values()) > seen + 200 or handle.wait_for_shutdown(0), "nothing runs")
    assert handle.wait_for_shutdown(PATIENCE_SECONDS)
    assert ran == {"critical": 2400, "bulk": 2400}
    assert most == 7
    assert database.count() == 0


@BOTH
def test_paused_queue_leaves_its_slots_to_the_others(database: running.Database, weights: dict[str, float]) -> None:
    house = House("critical", "bulk")
    house.enqueue(critical=20, bulk=20)
    with house.serve(4, **weights) as handle:
        eventually(lambda: house.total == 4, "not all slots are used", seconds=PATIENCE_SECONDS)
        queues.pause("critical")
        eventually(lambda: handle.workers["critical"].is_paused, "it is not paused", seconds=PATIENCE_SECONDS)
        house.let_go("critical", house.running["critical"])
        house.wait(bulk=4)
        settle(handle)
        queues.resume("critical")
        eventually(lambda: not handle.workers["critical"].is_paused, "it is paused", seconds=PATIENCE_SECONDS)
        house.let_go("bulk")
        house.wait(critical=1, bulk=3)


@BOTH
def test_resized_queue_of_a_share_has_no_more_slots_than_that(
    database: running.Database, weights: dict[str, float]
) -> None:
    house = House("critical", "bulk")
    house.enqueue(critical=20, bulk=20)
    with house.serve(4, **weights) as handle:
        eventually(lambda: house.total == 4, "not all slots are used", seconds=PATIENCE_SECONDS)
        queues.resize("critical", 1)
        eventually(lambda: handle.workers["critical"].pool == 1, "it is not resized", seconds=PATIENCE_SECONDS)
        house.let_go("critical", house.running["critical"] - 1)
        house.wait(critical=1, bulk=3)
        queues.resize("critical", 100)  # more than there are to share
        eventually(lambda: handle.workers["critical"].pool == 100, "it is not resized", seconds=PATIENCE_SECONDS)
        house.let_go("bulk", 2)
        house.wait(critical=3, bulk=1)
        assert house.most == 4


@BOTH
def test_runner_that_stops_gives_back_what_has_not_started(
    database: running.Database, weights: dict[str, float]
) -> None:
    begun = Event()
    ran: Counter[str] = Counter()

    def declare(name: str) -> Job[Any, Any]:
        @job(queue=name, name=name)
        def work() -> None:
            ran[name] += 1
            if sum(ran.values()) > 1000:
                begun.set()

        return work

    jobs = [declare(name) for name in ("critical", "bulk")]
    for each in jobs:
        each.delay_many([()] * 10_000)
    runner = Runner().register(*jobs).share(3)
    for name in ("critical", "bulk"):
        runner.configure_queue(name, weight=weights.get(name))
    with running.started(runner):
        assert begun.wait(PATIENCE_SECONDS)
    assert database.count("state <> 'available'") == 0
    assert database.count() == 20_000 - sum(ran.values())
    assert database.count("retries > 0 OR crashes > 0") == 0


@BOTH
def test_what_was_claimed_ahead_is_given_back_while_others_have_all_slots(
    database: running.Database, weights: dict[str, float]
) -> None:
    """For another runner, that may have room."""
    house = House("critical", "bulk")
    house.enqueue(critical=30)
    with house.serve(3, **weights) as handle:
        house.wait(critical=3)
        settle(handle)
        bulk = handle.workers["bulk"]
        house.enqueue(bulk=5)
        runner = handle.runner_id
        assert runner is not None
        bulk._claim(runner, 5)
        assert bulk._executor.ready == 5 and house.running["bulk"] == 0
        eventually(lambda: not bulk._executor.ready, "it is not given back", seconds=PATIENCE_SECONDS)
        database.wait_for("queue = 'bulk' AND state = 'available'", count=5)


@BOTH
def test_suspect_waits_for_a_slot_as_others_do(database: running.Database, weights: dict[str, float]) -> None:
    house = House("critical", "bulk")
    house.enqueue(bulk=6)
    with house.serve(2, **weights) as handle:
        house.wait(bulk=2)
        settle(handle)
        database.rows(
            "INSERT INTO background_jobs (job_type, data, queue, crashes) VALUES ('critical', '{}', 'critical', 1)"
        )
        handle.claim_suspect("critical")
        assert handle.workers["critical"]._executor.ready == 1  # the next slot is its own
        assert house.most == 2 and house.running["critical"] == 0
        house.let_go("bulk")
        house.wait(critical=1, bulk=1)
        assert house.most == 2


def test_suspect_of_a_queue_that_is_not_next_is_not_claimed(database: running.Database) -> None:
    house = House("critical", "bulk")
    house.enqueue(critical=6)
    with house.serve(2) as handle:
        house.wait(critical=2)
        settle(handle)
        database.rows("INSERT INTO background_jobs (job_type, data, queue, crashes) VALUES ('bulk', '{}', 'bulk', 1)")
        handle.claim_suspect("bulk")
        assert database.count("crashes = 1 AND state = 'available'") == 1
        house.close()
        database.wait_for("queue = 'critical'", count=0)
        eventually(lambda: handle.claim_suspect("bulk") or "bulk" in house.started, "the suspect does not run")


def test_wake_up_that_finds_no_slot_is_passed_on_to_another_runner(database: running.Database) -> None:
    """Only one of those that wait is woken for one job, and it may be the one that has no slot for it."""
    house = House("critical", "bulk")
    house.enqueue(bulk=2)
    with house.serve(2) as full:
        house.wait(bulk=2)
        settle(full)
        ran = Event()
        with house.serve(2) as free:

            def both_wait() -> bool:
                waiting = database.column("SELECT runner FROM background_waiting WHERE queue = 'critical'")
                return {full.runner_id, free.runner_id} <= set(waiting)

            eventually(both_wait, "not both wait", seconds=PATIENCE_SECONDS)
            settle(free)
            # As if the one without room had been chosen.
            database.rows("INSERT INTO background_jobs (job_type, data, queue) VALUES ('critical', '{}', 'critical')")
            database.rows("DELETE FROM background_waiting WHERE queue = 'critical' AND runner = %s", full.runner_id)
            storage_notify(database, f"{full.runner_id}:critical")
            house.wait(critical=1, bulk=2)
            assert len(free.workers["critical"].running) == 1
            ran.set()


def storage_notify(database: running.Database, payload: str) -> None:
    database.rows("SELECT pg_notify(%s, %s)", storage.CHANNEL, payload)


def test_runner_until_empty_works_a_share_off(database: running.Database) -> None:
    house = House("critical", "bulk")
    house.enqueue(critical=30, bulk=30)
    house.close()
    assert house.runner(3).shutdown_when_queue_empty().start().wait_for_shutdown(PATIENCE_SECONDS)
    assert Counter(house.started) == {"critical": 30, "bulk": 30}
    assert house.most <= 3


def test_share_of_one_queue_is_a_pool(database: running.Database) -> None:
    house = House("only")
    house.enqueue(only=10)
    with house.serve(3):
        house.wait(only=3)
        house.let_go("only")
        house.wait(only=3)


def test_session_that_is_lost_and_found_again_goes_on_in_order(database: running.Database) -> None:
    house = House("critical", "bulk")
    house.enqueue(bulk=10)
    with house.serve(2) as handle:
        house.wait(bulk=2)
        before = handle.runner_id
        assert database.terminate_sessions("greenjobs session") == 1
        eventually(lambda: handle.runner_id not in (None, before), "no new session", seconds=PATIENCE_SECONDS)
        house.enqueue(critical=1)
        handle.workers["critical"].wake()
        notice(handle, "critical")
        house.let_go("bulk")
        house.wait(critical=1, bulk=1)


# --- configuring ------------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(database: running.Database) -> Runner:
    @job(queue="a")
    def work() -> None: ...

    return Runner().register(work)


def test_share_without_queues_says_how_to_list_them(runner: Runner) -> None:
    with pytest.raises(ConfigError, match=r"share is 5, but the queues that share are not listed; .*--queue critical"):
        runner.share(5).prepare()


def test_weight_without_a_share_is_refused(runner: Runner) -> None:
    with pytest.raises(ConfigError, match="'a' has a weight, .* and there is no share; .*--share 50"):
        runner.configure_queue("a", weight=2).prepare()


def test_weights_for_some_queues_only_are_refused(runner: Runner) -> None:
    with pytest.raises(ConfigError, match="'a' has a weight, and 'b' has none"):
        runner.configure_queue("a", weight=2).configure_queue("b").share(5).prepare()


def test_pool_that_is_larger_than_the_share_is_refused(runner: Runner) -> None:
    with pytest.raises(ConfigError, match="'a': pool is 6, but the queues share only 5"):
        runner.configure_queue("a", pool=6).share(5).prepare()


@pytest.mark.parametrize("weight", [0, -1, 0.001, 1001, "many", True, float("nan"), float("inf")], ids=repr)
def test_wrong_weight_is_refused(runner: Runner, weight: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"'a': weight is {weight!r}; the value must be a number")):
        runner.configure_queue("a", weight=weight)


@pytest.mark.parametrize("slots", [0, -1, 1.5, "many", True], ids=repr)
def test_wrong_share_is_refused(runner: Runner, slots: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"share is {slots!r}")):
        runner.share(slots)


def test_share_of_the_settings_counts_for_runners(database: running.Database) -> None:
    @job(queue="a")
    def work() -> None: ...

    greenjobs.configure(database_url=database.url, share=7)
    handle = Runner().register(work).configure_queue("a").configure_queue("b", pool=2).prepare()
    assert handle.share is not None and handle.share.slots == 7
    assert [worker.pool for worker in handle.workers.values()] == [7, 2]


# --- on the command line ----------------------------------------------------------------------------------------------

APPLICATION = """
    from greenjobs import job


    @job(queue="critical")
    def critical(number):
        print(f"critical {number}", flush=True)


    @job(queue="bulk")
    def bulk(number):
        print(f"bulk {number}", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    processes.write_application(tmp_path, APPLICATION)
    return tmp_path


def enqueue(database: running.Database) -> None:
    for name in ("bulk", "critical"):
        database.rows(
            "INSERT INTO background_jobs (job_type, data, queue)"
            " SELECT %s, jsonb_build_object('number', n), %s FROM generate_series(1, 20) AS n",
            *(name, name),
        )


def test_command_runs_the_queues_in_their_order(folder: Path, database: running.Database) -> None:
    enqueue(database)
    output = processes.run(
        *("greenjobs", "run", "--until-empty", "--share", "2", "--queue", "critical", "--queue", "bulk:1"),
        folder=folder,
        database_url=database.url,
    )
    assert "queues: critical (2 at a time), bulk (1 at a time); together 2 at a time, in order" in output
    lines = re.findall(r"^(critical|bulk) \d+$", output, re.MULTILINE)
    assert Counter(lines) == {"critical": 20, "bulk": 20}
    # One slot is all that they do not have to wait for: the first claims of both queues come at the same time.
    assert lines[:20] == ["critical"] * 20


def test_command_takes_weights_and_the_share_from_the_environment(folder: Path, database: running.Database) -> None:
    enqueue(database)
    output = processes.run(
        *("greenjobs", "run", "--until-empty", "--queue", "critical:weight=3", "--queue", "bulk:weight=0.5:poll=2"),
        folder=folder,
        database_url=database.url,
        environment={"GREENJOBS_SHARE": "4"},
    )
    assert "critical (4 at a time, weight 3), bulk (4 at a time, weight 0.5); together 4 at a time, by weight" in output
    assert len(re.findall(r"^(critical|bulk) \d+$", output, re.MULTILINE)) == 40
    ((registered,),) = database.rows("SELECT queues FROM background_runners")
    assert registered["bulk"] == {"pool": 4, "poll_interval": 2.0, "share": 4, "weight": 0.5}


def test_list_and_status_say_that_queues_share(folder: Path, database: running.Database) -> None:
    with processes.runner(folder, database.url, "--share", "4", "--queue", "critical", "--queue", "bulk:2"):
        table = processes.run("greenjobs", "queues", folder=folder, database_url=database.url)
        assert re.search(r"^critical .* 4 of 4 ", table, re.MULTILINE)
        assert re.search(r"^bulk .* 2 of 4 ", table, re.MULTILINE)
        status = processes.run("greenjobs", "status", folder=folder, database_url=database.url)
        assert "serves bulk (2 of 4), critical (4 of 4)" in status
        document = processes.run("greenjobs", "queues", "--json", folder=folder, database_url=database.url)
        assert [queue["servers"][0]["share"] for queue in json.loads(document)] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--share 5", "the queues that share are not listed"),
        ("--share 0 --queue a", "share is '0'"),
        ("--queue a:weight=3", "there is no share"),
        ("--share 5 --queue a:weight=3 --queue b", "'b' has none"),
        ("--share 5 --queue a:weight=0", "weight is '0'"),
        ("--share 5 --queue a:weight=", "weight is ''"),
        ("--share 5 --queue a:weight=1:weight=2", "the form is NAME[:POOL][:poll=SECONDS][:weight=NUMBER]"),
        ("--share 5 --queue a:6", "share only 5"),
        ("--share 5 --pool 3 --queue a", "--pool is '3', but with a share (5)"),
    ],
)
def test_wrong_share_is_refused_in_one_line(
    folder: Path, database: running.Database, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("greenjobs.contrib.equipment.load_application", lambda name: declare_one())
    result = CliRunner().invoke(main, ["run", "--database-url", database.url, *arguments.split()])
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("greenjobs: ") and said in line


def declare_one() -> object:
    @job(queue="a")
    def work() -> None: ...

    return work
