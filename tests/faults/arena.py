"""One database of jobs, its ledger, and the processes that enqueue there and run: where every fault happens.

with opened(folder, jobs_url, ledger_url) as arena:
    runner = arena.runner("--pool", "10")
    arena.enqueue("hold", 10, gate="gate")
    runner.wait_until_it_holds(10)
    runner.kill()
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import processes
from processes import Process
from psycopg2 import extras
from waiting import eventually

from . import ledger as ledgers
from .ledger import Ledger

_TESTS = Path(__file__).parent.parent
_APPLICATION = "faults.application"

# The last line of the banner of `greenjobs run`: it has registered, and claims.
_IS_UP = r"^.* greenjobs\.cli: jobs: .*$"

# As `.delay` would insert them, but a thousand at a time, with tokens that tell what they are.
_ENQUEUE = """
WITH announced AS (
    SELECT pg_notify('greenjobs', '*:default')
)
INSERT INTO background_jobs (job_type, data, queue, state, run_at)
SELECT
    %(job_type)s,
    %(arguments)s::jsonb || jsonb_build_object('token', %(prefix)s || number),
    'default',
    CASE WHEN %(delay)s > 0 THEN 'scheduled' ELSE 'available' END,
    now() + make_interval(secs => %(delay)s)
FROM announced, generate_series(1, %(count)s) AS number
RETURNING id
"""


class Arena:
    """Made by `opened`. Its processes are killed at its end, and their output is in the report of a failed test."""

    def __init__(self, folder: Path, ledger: Ledger, processes: contextlib.ExitStack) -> None:
        self.folder = folder
        self.ledger = ledger
        self._processes = processes
        self._numbers = itertools.count(1)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def enqueue(self, job_type: str, count: int = 1, *, delay: float = 0.0, **arguments: Any) -> list[int]:
        """Commit so many jobs of the application, in plain SQL; returns their ids. `delay` is in seconds."""
        parameters = {
            "job_type": job_type,
            "arguments": extras.Json(arguments),
            "prefix": f"{job_type}-{next(self._numbers)}-",
            "delay": delay,
            "count": count,
        }
        return [id for (id,) in self.ledger.jobs(_ENQUEUE, parameters)]

    def open_gate(self, name: str, *, only: RunnerProcess | None = None) -> None:
        """Let the jobs that hold at this gate go on; or only those in one runner."""
        (self.folder / (name if only is None else f"{name}-{only.pid}")).touch()

    # --- processes ----------------------------------------------------------------------------------------------------

    def start_runner(
        self,
        *arguments: str,
        url: str | None = None,
        environment: dict[str, str] | None = None,
        inside: Sequence[str] = (),
    ) -> RunnerProcess:
        """`greenjobs run` on the jobs; returns at once. `inside`: the words of a command that runs the command."""
        name = f"faults-{next(self._numbers)}"
        url = url or self.ledger.jobs_url
        named = f"{url}{'&' if '?' in url else '?'}application_name={name}"
        command = (*inside, "greenjobs", "run", "--app", _APPLICATION, *arguments)
        return RunnerProcess(self._start(*command, url=named, environment=environment or {}), name, self.ledger)

    def runner(self, *arguments: str, **options: Any) -> RunnerProcess:
        """As `start_runner`; returns when it claims jobs."""
        return self.start_runner(*arguments, **options).wait_until_up()

    def runners(self, count: int, *arguments: str, url: str | None = None) -> list[RunnerProcess]:
        """So many of them, started at the same time."""
        started = [self.start_runner(*arguments, url=url) for _ in range(count)]
        return [runner.wait_until_up() for runner in started]

    def load(self, *arguments: str, url: str | None = None) -> Load:
        """Enqueuers, see faults.load; returns when they began."""
        command = ("python", "-m", "faults.load", *arguments)
        process = self._start(*command, url=url or self.ledger.jobs_url, environment={})
        process.wait_for_line("^enqueuing$")
        return Load(process)

    def _start(self, *command: str, url: str, environment: dict[str, str]) -> Process:
        more = {"PYTHONPATH": str(_TESTS), "FAULTS_LEDGER_URL": self.ledger.url, **environment}
        started = processes.start(*command, folder=self.folder, database_url=url, environment=more)
        return self._processes.enter_context(started)


class RunnerProcess:
    """`greenjobs run`. All its connections to the jobs bear its name."""

    def __init__(self, process: Process, name: str, ledger: Ledger) -> None:
        self.process = process
        self.name = name
        self._ledger = ledger

    def wait_until_up(self) -> RunnerProcess:
        """Block until it claims jobs."""
        self.process.wait_for_line(_IS_UP)
        return self

    @property
    def is_up(self) -> bool:
        """Whether it has begun to claim jobs, and has not ended."""
        return self.process.is_running and re.search(_IS_UP, self.process.output, re.MULTILINE) is not None

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def held(self) -> set[int]:
        """The jobs that it holds, by the database."""
        return self._ledger.held_by(self.pid)

    def wait_until_it_holds(self, count: int) -> None:
        """Block until it has claimed so many jobs, at least."""
        eventually(lambda: len(self.held()) >= count, f"{self.process} holds fewer", seconds=processes.PATIENCE_SECONDS)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def terminate(self) -> None:
        """SIGTERM: finish what runs."""
        self.process.terminate()

    def freeze(self) -> set[int]:
        """SIGSTOP; returns the jobs that it holds, when all that it sent has been done."""
        self.process.send(signal.SIGSTOP)
        busy = (
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = %s AND state = 'active'"
        )
        eventually(lambda: not self._ledger.jobs(busy, self.name), "its statements do not end")
        return self.held()

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send(signal.SIGCONT)

    def cut_connections(self) -> int:
        """End its connections from the server's side; returns how many they were."""
        mine = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = %s"
        )
        return len(self._ledger.jobs(mine, self.name))


class Load:
    """The enqueuers of one process."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def stop(self) -> dict[str, Any]:
        """Let them end, and return what they counted."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> dict[str, Any]:
        """Wait for their end, and return what they counted: handles returned, errors by name."""
        assert self.process.wait() == 0, self.process.output
        return dict(json.loads(self.process.wait_for_line(r"^\{.*\}$")[0]))


@contextlib.contextmanager
def opened(folder: Path, jobs_url: str, ledger_url: str) -> Iterator[Arena]:
    """An arena on a migrated database of jobs, with a new ledger."""
    with ledgers.opened(jobs_url, ledger_url) as ledger, contextlib.ExitStack() as started:
        yield Arena(folder, ledger, started)
