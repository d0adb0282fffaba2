"""One measurement: starts the measured programs, lets them go together, and checks that they did what they report."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.backlog import QUEUE
from benchmarks.case import BenchmarkFailed
from benchmarks.programs import protocol
from benchmarks.programs.tally import COUNT_BYTES
from benchmarks.server import Database

ROOT = Path(__file__).parent.parent

# How often the harness looks at the counts of the measured processes, which costs it some microseconds.
_LOOK_SECONDS = 0.002
_CONNECTIONS_LOOK_SECONDS = 0.1

# A measured process that has not ended after this long never will.
_PATIENCE_SECONDS = 900.0

_STDERR_SHOWN = 2000


@dataclass(frozen=True, slots=True)
class Report:
    """What programs measured together: `seconds` from the first job's start to the last acknowledgement."""

    jobs: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    grown_bytes: int
    connections: int
    marks: Sequence[float]
    first_at: float
    latencies_ms: Sequence[float]

    @property
    def rate(self) -> float:
        """Jobs per second."""
        return self.jobs / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU, user and system, that the measured processes took for a job."""
        return self.cpu_seconds / self.jobs * 1e6


class Program:
    """A measured program in a process of its own; see programs/protocol.py."""

    def __init__(self, module: str, order: Mapping[str, Any], *, python: str = sys.executable) -> None:
        self._module = module
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._patience = threading.Timer(_PATIENCE_SECONDS, self._process.kill)
        self._patience.daemon = True
        self._patience.start()
        self._say(json.dumps(order))

    def wait_until_ready(self) -> None:
        """Block until it could begin at once."""
        if self._next_line() != protocol.READY:
            raise self.failure("did not get ready")

    def go(self) -> None:
        """Let it begin."""
        self._say(protocol.GO)

    def mark(self) -> None:
        """Have it measure from now on."""
        self._say(protocol.MARK)

    def stop(self) -> None:
        """Ask it to end."""
        self._say(protocol.STOP)

    def report(self) -> dict[str, Any]:
        """Block until it has ended; what it reports."""
        line = self._next_line()
        if self._process.wait() != 0 or not line:
            raise self.failure("ended without a report")
        report: dict[str, Any] = json.loads(line)
        return report

    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    def failure(self, what: str) -> BenchmarkFailed:
        """The error to raise, with the last that the program wrote."""
        self._errors.seek(0)
        written = self._errors.read().decode(errors="replace").strip()
        return BenchmarkFailed(f"{self._module} {what}:\n{written[-_STDERR_SHOWN:]}")

    def close(self) -> None:
        """End it, if it has not ended."""
        self._patience.cancel()
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self.failure("ended early") from None

    def _next_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextlib.contextmanager
def started(module: str, *orders: Mapping[str, Any], python: str = sys.executable) -> Iterator[list[Program]]:
    """Programs, one for each order, all of them ready."""
    with contextlib.ExitStack() as stack:
        programs = []
        for order in orders:
            programs.append(Program(module, order, python=python))
            stack.callback(programs[-1].close)
        for program in programs:
            program.wait_until_ready()
        yield programs


@dataclass(frozen=True, slots=True)
class Runners:
    """Programs that run jobs, and how: `processes` of them, each with these settings."""

    module: str
    pool: int = 50
    processes: int = 1
    queues: Sequence[str] = (QUEUE,)
    poll_interval: float = 1.0
    read_ahead: int = 0
    job_connections: int = 0
    more: Mapping[str, Any] | None = None
    python: str = sys.executable

    def order(self, database: Database, shown_in: str, mark_every: int) -> dict[str, Any]:
        """As the program reads it."""
        return {
            "database_url": database.url,
            "tally": shown_in,
            "mark_every": mark_every,
            "pool": self.pool,
            "queues": list(self.queues),
            "poll_interval": self.poll_interval,
            "read_ahead": self.read_ahead,
            "job_connections": self.job_connections,
            **(self.more or {}),
        }

    @contextlib.contextmanager
    def started(self, database: Database, *, mark_every: int = 1_000_000) -> Iterator[Running]:
        """The programs, ready to go."""
        with tempfile.TemporaryDirectory(prefix="greenjobs-bench-") as folder:
            files = [Path(folder, str(number)) for number in range(self.processes)]
            for file in files:
                file.write_bytes(bytes(COUNT_BYTES))
            orders = [self.order(database, str(file), mark_every) for file in files]
            with started(self.module, *orders, python=self.python) as programs:
                yield Running(database, programs, files)


class Running:
    """Programs that run jobs, seen from outside."""

    def __init__(self, database: Database, programs: Sequence[Program], files: Sequence[Path]) -> None:
        self.programs = programs
        self.connections = 0
        self._database = database
        self._files = files

    def go(self) -> None:
        """Let all begin."""
        for program in self.programs:
            program.go()

    def done(self) -> int:
        """How many jobs they have run so far."""
        return sum(int.from_bytes(file.read_bytes(), sys.byteorder) for file in self._files)

    def wait_until_done(self, jobs: int, *, watch_connections: bool = False) -> None:
        """Block until that many jobs have run."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        look_at = 0.0
        while True:
            done = self.done()
            # Also at the end, when all of them are open, however soon that comes.
            if watch_connections and (done >= jobs or time.monotonic() >= look_at):
                self.connections = max(self.connections, self._database.server.connections_to(self._database.name))
                look_at = time.monotonic() + _CONNECTIONS_LOOK_SECONDS
            if done >= jobs:
                return
            for program in self.programs:
                if program.has_ended():
                    raise program.failure(f"ended after {done} of {jobs} jobs")
            if time.monotonic() > deadline:
                raise BenchmarkFailed(f"only {done} of {jobs} jobs were run in {_PATIENCE_SECONDS:.0f} s")
            time.sleep(_LOOK_SECONDS)

    def stop(self) -> Report:
        """Ask all to end, wait for them, and put their reports together."""
        for program in self.programs:
            program.stop()
        reports = [program.report() for program in self.programs]
        working = [report for report in reports if report["done"]] or reports
        first_at = min(report["first_at"] for report in working)
        return Report(
            jobs=sum(report["done"] for report in reports),
            seconds=max(report["ended_at"] for report in working) - first_at,
            cpu_seconds=sum(report["cpu_seconds"] for report in working),
            peak_bytes=max(report["peak_bytes"] for report in reports),
            grown_bytes=max(report["grown_bytes"] for report in reports),
            connections=self.connections,
            marks=reports[0]["marks"],
            first_at=first_at,
            latencies_ms=[ns / 1e6 for report in reports for ns in report["latencies_ns"]],
        )


def drain(
    database: Database,
    runners: Runners,
    *,
    table: str,
    jobs: int,
    marks: int = 1,
    watch_connections: bool = False,
    is_whole: bool = True,
) -> Report:
    """Have the programs run `jobs` of those that wait in the table; with `is_whole`, no more than these may run.

    Raises BenchmarkFailed unless exactly the jobs that were run are gone from the table.
    """
    before = database.count(table)
    with runners.started(database, mark_every=max(jobs // marks, 1)) as running:
        running.go()
        running.wait_until_done(jobs, watch_connections=watch_connections)
        report = running.stop()
    gone = before - database.count(table)
    if gone != report.jobs or (is_whole and report.jobs != jobs):
        raise BenchmarkFailed(f"{runners.module}: {jobs} jobs were to be run, {report.jobs} were, {gone} rows are gone")
    return report


def enqueue(
    database: Database, order: Mapping[str, Any], *, module: str, table: str, python: str = sys.executable
) -> float:
    """Have a program enqueue `order["jobs"]` jobs; jobs per second.

    Raises BenchmarkFailed unless the table has the rows that the program says it has enqueued.
    """
    before = database.count(table)
    report = run_program(module, {**order, "database_url": database.url}, python=python)
    come = database.count(table) - before
    if come != report["enqueued"] or come < order["jobs"]:
        raise BenchmarkFailed(f"{module}: {order['jobs']} jobs were to be enqueued, {come} rows have come")
    return float(order["jobs"] / report["seconds"])


def run_program(module: str, order: Mapping[str, Any], *, python: str = sys.executable) -> dict[str, Any]:
    """Have a program do what it does; its report."""
    with started(module, order, python=python) as (program,):
        program.go()
        return program.report()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
