"""One fault after the other, at random, on runners and the server, while others enqueue and run."""

from __future__ import annotations

import enum
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from processes import PATIENCE_SECONDS
from waiting import eventually

from .arena import Arena, RunnerProcess
from .ledger import Balance, Run
from .server import WAYS, Server

# Jobs that are innocent may be held by three runners that die, in such weather.
_OPTIONS = ("--pool", "20", "--max-crashes", "1000")

_LONGEST_FREEZE_SECONDS = 2.0

# On a slow machine each takes its time.
_FEWEST_FAULTS = 3


class Cost(enum.Enum):
    """Who lost their session by a fault, and with it the right to what they ran."""

    NOBODY = enum.auto()
    ONE = enum.auto()
    ALL = enum.auto()


@dataclass(frozen=True, slots=True)
class Fault:
    """What happened to the runner of this process, or to all, and when, in seconds of the ledger's clock."""

    what: str
    runner: int
    cost: Cost
    began_at: float
    ended_at: float

    def excuses(self, run: Run) -> bool:
        """Whether the job of this run may run again because of it: the run was under way then."""
        is_hit = self.cost is Cost.ALL or (self.cost is Cost.ONE and self.runner == run.runner)
        return is_hit and run.overlaps(self.began_at, self.ended_at)


@dataclass
class Storm:
    """`blow` for some seconds, then `check`. What happens is decided by the seed; when, by the machine."""

    arena: Arena
    server: Server
    seed: int
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._runners: list[RunnerProcess] = []
        print(f"the seed of this storm is {self.seed}")

    def blow(self, *, seconds: float, runners: int, mean_pause: float) -> None:
        """Keep so many runners at work, and let a fault happen now and then."""
        clock = self.arena.ledger.clock
        self._runners = self.arena.runners(runners, *_OPTIONS)
        ends_at = clock() + seconds
        while clock() < ends_at or len(self.faults) < _FEWEST_FAULTS:
            next_at = clock() + self._random.uniform(0, 2 * mean_pause)
            eventually(lambda: clock() >= next_at, "time stands still", seconds=PATIENCE_SECONDS)  # noqa: B023
            self._replace_those_that_found_no_server()
            self._let_happen(self._random.choice(_FAULTS))
        eventually(self._are_all_up, "not all runners come up again", seconds=PATIENCE_SECONDS)

    def check(self, *, seconds: float) -> Balance:
        """Wait until all is done; nothing may be lost, and what ran twice must have an excuse."""
        ledger = self.arena.ledger
        balance = ledger.settle(may_run_often=True, seconds=seconds)
        for runs in balance.twice.values():
            for run in runs[:-1]:
                assert any(fault.excuses(run) for fault in self.faults), f"{run} ran again for no reason: {runs}"
        return balance

    def _let_happen(self, fault: Callable[[Storm, RunnerProcess], Cost]) -> None:
        runner = self._random.choice(self._runners)
        began_at = self.arena.ledger.clock()
        cost = fault(self, runner)
        self.faults.append(Fault(fault.__name__, runner.pid, cost, began_at, self.arena.ledger.clock()))

    def _are_all_up(self) -> bool:
        self._replace_those_that_found_no_server()
        return all(runner.is_up for runner in self._runners)

    def _replace_those_that_found_no_server(self) -> None:
        """A runner that is started while the server is down says so and ends; whoever started it tries again."""
        for runner in list(self._runners):
            if not runner.process.is_running:
                assert "cannot connect to" in runner.process.output, runner.process.output
                self._replace(runner)

    def _replace(self, runner: RunnerProcess) -> None:
        self._runners[self._runners.index(runner)] = self.arena.start_runner(*_OPTIONS)


def _kill(storm: Storm, runner: RunnerProcess) -> Cost:
    runner.kill()
    storm._replace(runner)
    return Cost.ONE


def _stop(storm: Storm, runner: RunnerProcess) -> Cost:
    # Before it is up, nothing but the signal's default would answer.
    if runner.is_up:
        runner.terminate()
        storm._replace(runner)
    return Cost.NOBODY


def _freeze(storm: Storm, runner: RunnerProcess) -> Cost:
    clock = storm.arena.ledger.clock
    runner.process.send(signal.SIGSTOP)
    thaws_at = clock() + storm._random.uniform(0.1, _LONGEST_FREEZE_SECONDS)
    eventually(lambda: clock() >= thaws_at, "time stands still", seconds=PATIENCE_SECONDS)
    runner.thaw()
    return Cost.NOBODY


def _cut_connections(storm: Storm, runner: RunnerProcess) -> Cost:
    runner.cut_connections()
    return Cost.ONE


def _restart_server(storm: Storm, runner: RunnerProcess) -> Cost:
    storm.server.restart(storm._random.choice(list(WAYS.values())))
    return Cost.ALL


_FAULTS = (_kill, _stop, _freeze, _cut_connections, _restart_server)
