"""Jobs in threads and processes, while their runners and processes are killed: none is lost, and what they write in
their completing transaction is there once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from waiting import eventually

from .arena import Arena

T = TypeVar("T")

# The last --app counts; and nobody is given up here, however many runners died.
OPTIONS = (
    *("--app", "faults.elsewhere", "--pool", "10", "--threads", "3", "--job-processes", "2"),
    *("--max-crashes", "1000", "--poll-interval", "0.2"),
)

_JOBS = 150


class Elsewhere:
    """Two runners at work on jobs of both kinds, of which there are always some."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.jobs: list[int] = []
        self.enqueue(_JOBS)
        self.runners = arena.runners(2, *OPTIONS)

    def enqueue(self, count: int) -> None:
        for job_type in ("in_thread", "in_process"):
            self.jobs += self.arena.enqueue(job_type, count)

    def wait_for(self, look: Callable[[], list[T]], message: str) -> list[T]:
        """Block until there are some; faults may take longer than all that there is to do."""

        def found() -> list[T]:
            if not self.arena.ledger.states():
                self.enqueue(10)
            return look()

        return eventually(found, message)

    def processes_at_work(self) -> list[int]:
        """The processes in which jobs are under way, without those of the runners."""
        under_way = "SELECT DISTINCT runner FROM faults_runs WHERE ended_at IS NULL"
        own = {runner.pid for runner in self.runners}
        return [pid for (pid,) in self.arena.ledger.rows(under_way) if pid not in own and is_alive(pid)]

    def kill_runner(self) -> None:
        victim = random.choice(self.wait_for(lambda: [each for each in self.runners if each.held()], "no job is held"))
        victim.kill()
        self.runners.remove(victim)
        self.runners.append(self.arena.start_runner(*OPTIONS))

    def kill_process(self) -> None:
        pid = random.choice(self.wait_for(self.processes_at_work, "no job runs in a process"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def end_sessions(self) -> None:
        random.choice(self.runners).cut_connections()

    def has_run_twice(self) -> bool:
        return bool(self.arena.ledger.rows("SELECT job_id FROM faults_runs GROUP BY job_id HAVING count(*) > 1"))


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_jobs_in_threads_and_processes_leave_one_mark_each_though_everything_dies(arena: Arena) -> None:
    arena.ledger.jobs("CREATE TABLE faults_marks (job_id BIGINT NOT NULL)")
    at_work = Elsewhere(arena)
    for fault in (at_work.kill_process, at_work.kill_runner, at_work.kill_process, at_work.end_sessions) * 2:
        fault()
    while not at_work.has_run_twice():  # each of these may have come when the job had just ended
        at_work.kill_process()
    balance = arena.ledger.settle(may_run_often=True)
    marks = Counter(job for (job,) in arena.ledger.jobs("SELECT job_id FROM faults_marks"))
    print(f"{len(at_work.jobs)} jobs; {len(balance.twice)} ran again")
    assert marks == Counter(at_work.jobs)
    assert balance.twice, "no job ran twice: nothing is proven"
