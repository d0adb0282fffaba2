"""Faults of the server: restarts, crashes, ended sessions, a primary that is replaced, a disk that is full."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import eventually

from greenjobs.migrate import migrate

from . import arena as arenas
from .arena import Arena
from .conftest import MakeServer
from .server import WAYS, Server, give_to_account, workshop

POOL = 10
LOAD = ("--threads", "8", "--pause", "0.02")


@pytest.mark.parametrize("how", WAYS)
def test_restart_of_the_server_costs_no_job(server: Server, served: Arena, how: str) -> None:
    """The jobs of a runner that lives, and comes back, are not run again either."""
    ledger = served.ledger
    runner = served.runner("--pool", "50")
    served.enqueue("hold", POOL, gate="gate")
    load = served.load(*LOAD)
    ledger.wait_for_runs(POOL + 50)
    server.restart(WAYS[how])
    served.open_gate("gate")
    ledger.wait_for_runs(ledger.run_count() + 50)
    load.stop()
    ledger.settle()
    assert runner.process.is_running


def test_jobs_of_a_runner_that_died_while_the_server_was_down_run_again(server: Server, served: Arena) -> None:
    doomed = served.runner("--pool", str(POOL))
    jobs = set(served.enqueue("hold", POOL, gate="gate"))
    served.ledger.wait_for_runs(POOL)
    server.stop()
    doomed.kill()
    server.start()
    served.open_gate("gate")
    served.runner("--pool", str(POOL))
    balance = served.ledger.settle(may_run_twice=jobs)
    assert balance.twice.keys() == jobs


def test_finished_job_is_acknowledged_when_the_server_is_back_and_not_run_again(server: Server, served: Arena) -> None:
    runner = served.runner("--pool", str(POOL))
    served.enqueue("hold", POOL, gate="gate")
    served.ledger.wait_for_runs(POOL)
    server.stop()
    served.open_gate("gate")
    ended = "SELECT id FROM faults_runs WHERE ended_at IS NOT NULL"
    eventually(lambda: len(served.ledger.rows(ended)) == POOL, "the jobs do not end", seconds=30)
    server.start()
    served.ledger.settle()
    assert len(runner.process.output.split("cannot acknowledge")) <= 2, "logged once, not per job"


@pytest.mark.parametrize("seconds", [3.0, pytest.param(30.0, marks=[pytest.mark.long, pytest.mark.timeout(180)])])
def test_sessions_that_end_at_random_cost_no_job(arena: Arena, seconds: float) -> None:
    """What runs twice ran in a runner that had just lost the session by which it was known to live."""
    ledger = arena.ledger
    runners = {runner.name: runner for runner in arena.runners(2, "--pool", "20")}
    load = arena.load(*LOAD)
    ledger.wait_for_runs(20)
    lost: dict[int, list[float]] = {runner.pid: [] for runner in runners.values()}
    ends_at = ledger.clock() + seconds
    # Which sessions end is decided by the dice, and how soon by the machine.
    while ledger.clock() < ends_at or not (all(lost.values()) and ledger.run_count() > 100):
        for name, pid, is_session in ledger.jobs(_SESSIONS, list(runners)):
            if random.random() < 0.1:
                if is_session:
                    lost[runners[name].pid].append(ledger.clock())
                ledger.jobs("SELECT pg_terminate_backend(%s)", pid)
    load.stop()
    balance = ledger.settle(may_run_often=True)
    for run in (run for runs in balance.twice.values() for run in runs[:-1]):
        assert any(run.overlaps(at, at) for at in lost[run.runner]), f"{run} ran again, and its runner lived"


_SESSIONS = """
SELECT application_name, pid, EXISTS (SELECT FROM pg_locks WHERE pg_locks.pid = activity.pid AND locktype = 'advisory')
FROM pg_stat_activity AS activity
WHERE datname = current_database()
    AND application_name = ANY(%s)
"""


# --- a standby takes over ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A primary, the standby that is to take its place, and an arena that knows the way to both."""

    primary: Server
    standby: Server
    arena: Arena

    def fail_over(self) -> tuple[float, float]:
        """Kill the primary and promote the standby; returns when that began and when it was over."""
        began_at = self.arena.ledger.clock()
        self.primary.kill()
        self.standby.promote()
        return began_at, self.arena.ledger.clock()


@pytest.fixture
def pair(make_server: MakeServer, tmp_path: Path, empty_database_url: str) -> Iterator[Pair]:
    """Synchronous replication: the standby has whatever was confirmed."""
    primary = make_server(listen_addresses="127.0.0.1")
    standby = primary.standby("deputy")
    hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
    url = f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"
    try:
        standby.start()
        primary.set("synchronous_standby_names", "deputy")
        migrate(url)
        with arenas.opened(tmp_path, url, empty_database_url) as arena:
            yield Pair(primary, standby, arena)
    finally:
        standby.end()


def test_everything_goes_on_with_the_standby_that_was_promoted(pair: Pair) -> None:
    arena = pair.arena
    runners = arena.runners(2, "--pool", "20")
    arena.enqueue("hold", POOL, gate="gate")
    load = arena.load(*LOAD)
    arena.ledger.wait_for_runs(POOL + 50)
    outage = pair.fail_over()
    arena.open_gate("gate")
    arena.ledger.wait_for_runs(arena.ledger.run_count() + 50)
    counted = load.stop()
    balance = arena.ledger.settle(may_run_often=True)
    assert len(balance.returned) == counted["returned"]
    assert all(run.overlaps(*outage) for runs in balance.twice.values() for run in runs[:-1])
    assert all(runner.process.is_running for runner in runners)


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 8 MB that the servers' account may write to."""
    if os.geteuid() != 0:
        pytest.skip("a small file system can be mounted by root only")
    with workshop() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
        try:
            give_to_account(folder)
            yield folder
        finally:
            # Lazily: the server, which ends after this, may still have files open.
            subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk_costs_no_job(
    make_server: MakeServer, tmp_path: Path, empty_database_url: str, small_disk: Path
) -> None:
    server = make_server()
    migrate(server.url)
    with arenas.opened(tmp_path, server.url, empty_database_url) as arena:
        fill_the_disk_and_make_room_again(arena, server, small_disk)


def fill_the_disk_and_make_room_again(arena: Arena, server: Server, small_disk: Path) -> None:
    ledger = arena.ledger
    ledger.jobs(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
    ledger.jobs("ALTER TABLE background_jobs SET TABLESPACE small")
    waiting = arena.enqueue("tick", 500)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        _fill(filler.fileno())
    load = arena.load(*LOAD)
    eventually(lambda: "No space left on device" in server.log, "the disk is not full", seconds=30)
    runner = arena.runner("--pool", "50")
    runner.process.wait_for_line("WARNING .*cannot claim: .*No space left on device")
    (small_disk / "filler").unlink()
    ledger.wait_for_runs(len(waiting) + 100)
    counted = load.stop()
    ledger.settle()
    assert counted["errors"].keys() == {"DatabaseUnavailable"}


def _fill(fd: int) -> None:
    """Write until nothing more can be."""
    for size in (1 << 20, 1 << 12):
        try:
            while True:
                os.write(fd, b"\0" * size)
        except OSError:
            continue
