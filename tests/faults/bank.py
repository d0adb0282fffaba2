"""Transfers between accounts under faults, and whether each was made exactly once: see faults.accounts."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from processes import PATIENCE_SECONDS
from psycopg2 import extras
from waiting import eventually

from .arena import Arena, RunnerProcess

# The last --app counts; and nobody is given up here, however many runners died.
OPTIONS = ("--app", "faults.accounts", "--pool", "20", "--max-crashes", "1000", "--poll-interval", "0.2")

_COULD_NOT_START = 2  # greenjobs.cli

_ACCOUNTS = 100
_BALANCE = 1_000

# Neither table has a key, so that nothing but the jobs themselves keeps a transfer from being made twice.
_TABLES = """
CREATE TABLE faults_accounts (id INT PRIMARY KEY, balance BIGINT NOT NULL);
CREATE TABLE faults_transfers (number INT NOT NULL);
CREATE TABLE faults_receipts (number INT NOT NULL);
"""

_OPEN_ACCOUNTS = """
INSERT INTO faults_accounts (id, balance)
SELECT number, %(balance)s
FROM generate_series(1, %(accounts)s) AS number
"""

_ENQUEUE = """
INSERT INTO background_jobs (job_type, data, queue)
SELECT
    'transfer',
    planned || jsonb_build_object('token', 'transfer-' || (planned->>'number')),
    'default'
FROM jsonb_array_elements(%(planned)s) AS planned
"""

# Of those in the middle of something: a job, a claim, an acknowledge.
_TERMINATE_SOME = """
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE datname = current_database()
    AND application_name LIKE 'faults-%%'
    AND (state <> 'idle' OR query = 'COMMIT')
ORDER BY random()
LIMIT %(count)s
"""


_FAULTS = ("killed", "cut off", "sessions ended", "sessions ended", "sessions ended")


@dataclass
class Bank:
    """`order` transfers, or `trouble` those who make them until all are done; then `check` what became of the money."""

    arena: Arena
    seed: int
    faults: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        print(f"the seed of this bank is {self.seed}")
        self._random = random.Random(self.seed)
        self._transfers = 0
        self._balances = dict.fromkeys(range(1, _ACCOUNTS + 1), _BALANCE)
        self.arena.ledger.jobs(_TABLES)
        self.arena.ledger.jobs(_OPEN_ACCOUNTS, {"accounts": _ACCOUNTS, "balance": _BALANCE})

    def order(self, count: int) -> None:
        """Commit so many transfers at random, as jobs."""
        planned = []
        for _ in range(count):
            self._transfers += 1
            source, target = self._random.sample(list(self._balances), 2)
            amount = self._random.randint(1, 100)
            self._balances[source] -= amount
            self._balances[target] += amount
            planned.append({"number": self._transfers, "source": source, "target": target, "amount": amount})
        for start in range(0, count, 1000):
            self.arena.ledger.jobs(_ENQUEUE, {"planned": extras.Json(planned[start : start + 1000])})

    def trouble(self, transfers: int, *, at_once: int, runners: int, pause: float, seconds: float) -> None:
        """Order so many, `at_once` at a time, and kill runners and end sessions all the while, until all is done."""
        clock = self.arena.ledger.clock
        at_work = self.arena.runners(runners, *OPTIONS)
        deadline = clock() + seconds
        while transfers or self._left() or not self._has_run_twice():
            if not (transfers or self._left()):
                transfers = at_once  # nothing is proven yet: whatever happened has hit no job
            assert clock() < deadline, f"not done after {seconds:g} s: {self.arena.ledger.unfinished()}"
            self.order(min(at_once, transfers))
            transfers -= min(at_once, transfers)
            next_at = clock() + self._random.uniform(0, 2 * pause)
            eventually(lambda: clock() >= next_at, "time stands still", seconds=PATIENCE_SECONDS)  # noqa: B023
            self._strike(self._random.choice(_FAULTS), at_work, self._random.randrange(runners))

    def _left(self) -> bool:
        return bool(self.arena.ledger.jobs("SELECT id FROM background_jobs LIMIT 1"))

    def _has_run_twice(self) -> bool:
        again = "SELECT job_id FROM faults_runs GROUP BY job_id HAVING count(*) > 1 LIMIT 1"
        return bool(self.arena.ledger.rows(again))

    def _strike(self, fault: str, at_work: list[RunnerProcess], victim: int) -> None:
        if fault == "killed":
            at_work[victim].kill()
            at_work[victim] = self.arena.start_runner(*OPTIONS)
            self.faults[fault] += 1
        elif fault == "cut off":
            self.faults[fault] += bool(at_work[victim].cut_connections())
        else:
            self.faults[fault] += len(self.arena.ledger.jobs(_TERMINATE_SOME, {"count": 3}))
        for place, runner in enumerate(at_work):
            if not runner.process.is_running:  # it met a fault while it started, said so, and is started again
                assert runner.process.wait() == _COULD_NOT_START, runner.process.output
                at_work[place] = self.arena.start_runner(*OPTIONS)

    def check(self) -> int:
        """Every transfer was made once, and has one receipt; returns how many jobs ran more than once until then."""
        balance = self.arena.ledger.settle(may_run_often=True)
        jobs = self.arena.ledger.jobs
        numbers = list(range(1, self._transfers + 1))
        for table in ("faults_transfers", "faults_receipts"):
            made = [number for (number,) in jobs(f"SELECT number FROM {table} ORDER BY number")]
            again = [number for number, count in Counter(made).items() if count > 1]
            assert made == numbers, f"{table}: missing {sorted(set(numbers) - set(made))}, more than once {again}"
        assert dict(jobs("SELECT id, balance FROM faults_accounts")) == self._balances
        assert sum(self._balances.values()) == _ACCOUNTS * _BALANCE
        return len(balance.twice)
