"""Faults of runners: killed, stopped, frozen, blocked, their clocks wrong, and ended between any two statements."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest
from waiting import eventually

from .arena import Arena, RunnerProcess

POOL = 10

# Longer than every interval of a runner but the audit's, and longer than all of them.
BRIEFLY = 2.5
LONGER_THAN_ANY_INTERVAL = 45.0

INTERRUPTED = 3  # greenjobs.cli.EXIT_INTERRUPTED

# The functions that a runner changes rows with; forget_runners and note_memory have nothing to do with jobs.
STATEMENTS = (
    "register_runner",
    "say_waiting",
    "route",
    "promote",
    "wake",
    "claim",
    "acknowledge",
    "fail",
    "give_back",
    "rescue",
    "end_runners",
)
PLACES = ("before", "after")

SHIFTED_CLOCK = Path(__file__).parent / "shifted_clock"


def start_holding(arena: Arena, *arguments: str, url: str | None = None) -> RunnerProcess:
    """A runner whose pool is full of jobs that wait at the gate named `gate`."""
    runner = arena.runner("--pool", str(POOL), *arguments, url=url)
    jobs = set(arena.enqueue("hold", POOL, gate="gate"))
    eventually(lambda: jobs <= runner.held(), "the runner does not hold the jobs", seconds=30)
    arena.ledger.wait_for_runs(POOL)
    return runner


def test_jobs_of_a_killed_runner_run_again_and_no_others(arena: Arena) -> None:
    doomed = start_holding(arena)
    survivor = arena.runner("--pool", str(POOL))
    load = arena.load("--threads", "4", "--pause", "0.01")
    arena.ledger.wait_for_runs(POOL + 50)
    # Frozen first, so that the database says what exactly was under way when it died.
    held = doomed.freeze()
    doomed.kill()
    arena.open_gate("gate")
    load.stop()
    balance = arena.ledger.settle(may_run_twice=held)
    assert len(balance.twice) >= POOL
    assert {runs[-1].runner for runs in balance.twice.values()} == {survivor.pid}


def test_runner_that_is_told_to_stop_finishes_its_jobs_and_no_job_runs_twice(arena: Arena) -> None:
    leaving, staying = arena.runners(2, "--pool", str(POOL))
    load = arena.load("--threads", "4", "--pause", "0.005")
    arena.ledger.wait_for_runs(100)
    both = {leaving.pid, staying.pid}
    eventually(lambda: {run.runner for run in arena.ledger.runs()} == both, "one of them runs nothing")
    leaving.terminate()
    assert leaving.process.wait() == 0
    assert staying.process.is_running
    load.stop()
    balance = arena.ledger.settle()
    assert {run.runner for runs in balance.runs.values() for run in runs} == both


def test_runner_that_is_told_twice_gives_its_jobs_back_and_no_attempt_is_counted(arena: Arena) -> None:
    leaving = start_holding(arena)
    load = arena.load("--threads", "4", "--pause", "0.01")
    leaving.terminate()
    leaving.process.wait_for_line("claims no more")
    arena.runner("--pool", str(POOL))
    leaving.terminate()
    assert leaving.process.wait() == INTERRUPTED
    arena.open_gate("gate")
    load.stop()
    interrupted = {run.job_id for run in arena.ledger.runs() if run.runner == leaving.pid and run.ended_at is None}
    balance = arena.ledger.settle(may_run_twice=interrupted)
    assert len(balance.twice) == POOL
    assert {run.attempt for runs in balance.twice.values() for run in runs} == {1}


@pytest.mark.parametrize(
    "seconds",
    [BRIEFLY, pytest.param(LONGER_THAN_ANY_INTERVAL, marks=[pytest.mark.long, pytest.mark.timeout(300)])],
)
def test_frozen_runner_keeps_its_jobs_while_its_session_lives(arena: Arena, seconds: float) -> None:
    frozen = start_holding(arena)
    other = arena.runner("--pool", str(POOL))
    held = frozen.freeze()
    freeze_ends_at = arena.ledger.clock() + seconds
    arena.open_gate("gate")
    load = arena.load("--threads", "2", "--pause", "0.01")
    eventually(lambda: arena.ledger.clock() > freeze_ends_at, "time stands still", seconds=seconds + 30)
    assert frozen.held() == held
    frozen.thaw()
    load.stop()
    balance = arena.ledger.settle()
    assert other.pid in {run.runner for runs in balance.runs.values() for run in runs}


def test_runner_that_was_cut_off_while_frozen_changes_nothing_afterwards(arena: Arena) -> None:
    frozen = start_holding(arena)
    jobs = frozen.freeze()
    assert frozen.cut_connections()
    rescuer = arena.runner("--pool", str(POOL))
    # One at a time, as each of them might be the one that its runner died of; the others wait.
    rescuer.wait_until_it_holds(1)
    held = rescuer.held()
    # The former owner finishes first, and says so to the database, where none of the jobs is its own any more.
    arena.open_gate("gate", only=frozen)
    frozen.thaw()
    for job in jobs:
        frozen.process.wait_for_line(rf"WARNING .* job {job} is no longer held here")
    assert arena.ledger.states().keys() == jobs
    assert held <= rescuer.held()
    arena.open_gate("gate")
    balance = arena.ledger.settle(may_run_twice=jobs)
    assert balance.twice.keys() == jobs


@pytest.mark.parametrize("seconds", [10.0, pytest.param(60.0, marks=[pytest.mark.long, pytest.mark.timeout(300)])])
def test_job_that_blocks_the_event_loop_is_not_taken_from_its_runner(arena: Arena, seconds: float) -> None:
    """Nor are those that wait beside it, and everything else goes on in another runner."""
    blocked = arena.runner("--pool", str(POOL))
    arena.enqueue("hold", POOL - 1, gate="gate")
    arena.enqueue("spin", seconds=seconds)
    blocked.wait_until_it_holds(POOL)
    arena.open_gate("gate")
    arena.runner("--pool", str(POOL))
    load = arena.load("--threads", "2", "--pause", "0.02")
    arena.ledger.wait_for_runs(POOL + 50)
    load.stop()
    arena.ledger.settle(seconds=seconds + 60)


def test_only_the_job_that_kills_its_runners_is_given_up(arena: Arena) -> None:
    arena.enqueue("linger", 250, seconds=0.02)
    (poison,) = arena.enqueue("poison")
    arena.enqueue("linger", 250, seconds=0.02)
    deaths = 0
    while True:
        # Nothing is claimed ahead, as those would have to clear themselves as well, one after the other.
        runner = arena.start_runner("--pool", "50", "--read-ahead", "0", "--until-empty")
        if (status := runner.process.wait()) == 0:
            break
        assert status == -signal.SIGKILL, runner.process.output
        deaths += 1
    assert deaths == 3
    balance = arena.ledger.balance()
    assert balance.left == {poison: "failed"}
    assert len(balance.runs) == 501
    errors = "SELECT errors->-1->>'message', retries, crashes FROM background_jobs"
    assert arena.ledger.jobs(errors) == [("its runner died 3 times", 0, 3)]


class Boundaries:
    """Lets one runner after the other die between two statements, and knows which jobs may have run how often."""

    # Nobody is to be given up here, however many runners died.
    OPTIONS = ("--pool", str(POOL), "--poll-interval", "0.1", "--max-crashes", "1000")

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.most_runs: Counter[int] = Counter()

    def die_at(self, statement: str, place: str) -> None:
        """Start a runner that dies there, with jobs of every kind to do; nobody else is there."""
        arena = self.arena
        for job_type, arguments in (("tick", {}), ("linger", {"seconds": 0.01}), ("stumble", {})):
            for job in arena.enqueue(job_type, 2, **arguments):
                self.most_runs[job] += 2 if job_type == "stumble" else 1
        arena.ledger.retry_now()
        # Jobs that were inserted without a queue, as the crate does, are there to be routed.
        arena.ledger.jobs("UPDATE background_jobs SET queue = NULL WHERE state = 'available' AND id % 3 = 0")
        runner = arena.start_runner(*self.OPTIONS, environment={"FAULTS_DIE_AT": f"{statement}:{place}:1"})
        is_asked = statement in ("give_back", "end_runners")
        if is_asked:
            self._ask_to_stop(runner)
        assert runner.process.wait() == -signal.SIGKILL, runner.process.output
        may_run_again = runner.held()
        if is_asked:
            # Whatever was under way was interrupted, and given back.
            ran_here = {run.job_id for run in arena.ledger.runs() if run.runner == runner.pid}
            may_run_again |= ran_here & arena.ledger.states().keys()
        for job in may_run_again:
            self.most_runs[job] += 1

    def _ask_to_stop(self, runner: RunnerProcess) -> None:
        """Twice, so that what runs is interrupted."""
        runner.wait_until_up()
        (job,) = self.arena.enqueue("hold", gate="gate")
        self.most_runs[job] += 1
        eventually(lambda: job in runner.held(), "the job is not claimed", seconds=30)
        runner.terminate()
        runner.process.wait_for_line("claims no more")
        runner.terminate()

    def check(self) -> None:
        """Let a healthy runner do the rest, and look at the ledger."""
        arena = self.arena
        arena.open_gate("gate")
        arena.runner(*self.OPTIONS)

        def nothing_is_left() -> bool:
            arena.ledger.retry_now()
            return not arena.ledger.states()

        eventually(nothing_is_left, "jobs are stuck", seconds=60)
        balance = arena.ledger.balance()
        assert not balance.lost
        too_often = {job: runs for job, runs in balance.runs.items() if len(runs) > self.most_runs[job]}
        assert not too_often, f"{too_often}, expected at most {self.most_runs}"


@pytest.mark.parametrize(
    "statements",
    [
        pytest.param(("claim", "acknowledge", "fail"), id="claim, acknowledge, fail"),
        pytest.param(STATEMENTS, id="all", marks=[pytest.mark.long, pytest.mark.timeout(600)]),
    ],
)
def test_runner_may_die_at_every_boundary_between_two_statements(arena: Arena, statements: tuple[str, ...]) -> None:
    boundaries = Boundaries(arena)
    for statement in statements:
        for place in PLACES:
            boundaries.die_at(statement, place)
    boundaries.check()


def start_with_wrong_clock(arena: Arena, hours: int) -> RunnerProcess:
    """A runner whose Python believes that it is so many hours later."""
    folders = (SHIFTED_CLOCK, SHIFTED_CLOCK.parent.parent)
    environment = {"PYTHONPATH": ":".join(map(str, folders)), "FAULTS_CLOCK_HOURS": str(hours)}
    return arena.runner("--pool", str(POOL), environment=environment)


def test_job_is_due_by_the_clock_of_the_database_whatever_the_runners_believe(arena: Arena) -> None:
    for hours in (1, -1):
        start_with_wrong_clock(arena, hours)
    due = arena.enqueue("tick", 20, delay=1.5)
    due_at = dict(arena.ledger.jobs("SELECT id, extract(epoch FROM run_at)::float8 FROM background_jobs"))
    balance = arena.ledger.settle()
    assert all(balance.runs[job][0].started_at >= due_at[job] for job in due)


def test_failed_job_is_tried_again_after_its_backoff_whatever_the_runner_believes(arena: Arena) -> None:
    start_with_wrong_clock(arena, 1)
    arena.enqueue("stumble")
    in_time = "run_at BETWEEN now() + interval '30 seconds' AND now() + interval '5 minutes'"
    failed = "SELECT state FROM background_jobs WHERE retries = 1"
    eventually(lambda: arena.ledger.jobs(failed), "the job does not fail", seconds=30)
    assert arena.ledger.jobs(f"{failed} AND {in_time}") == [("scheduled",)]


def test_runners_with_different_clocks_do_not_take_each_other_for_dead(arena: Arena) -> None:
    fast = start_with_wrong_clock(arena, 1)
    arena.enqueue("hold", POOL, gate="gate")
    fast.wait_until_it_holds(POOL)
    slow = start_with_wrong_clock(arena, -1)
    load = arena.load("--threads", "2", "--pause", "0.01")
    arena.ledger.wait_for_runs(POOL + 100)
    load.stop()
    arena.open_gate("gate")
    balance = arena.ledger.settle()
    assert {run.runner for runs in balance.runs.values() for run in runs} == {fast.pid, slow.pid}
