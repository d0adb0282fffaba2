"""Real processes for tests: started as a user starts them, waited for by what they print or do, and always ended.

    with processes.runner(tmp_path, database_url) as runner:
        runner.wait_for_line("job .* done")
        runner.terminate()
        assert runner.wait() == 0

A process writes to a file, not to a pipe: nothing blocks when nobody reads, and what it said is there after kill -9.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from waiting import eventually

ROOT = Path(__file__).parent.parent

# Deadlines only bound a failing test: two cores may be busy with other tests.
PATIENCE_SECONDS = 60.0

# Where the commands of this environment are, such as greenjobs and flask.
BIN = Path(sys.executable).parent

# Below those that Linux and macOS choose themselves, for who asks for any port and for who connects somewhere.
_PORTS = range(20_000, 32_000)

# What the person who runs the tests may have set, and the process under test must not see.
_SETTINGS = re.compile(r"GREENJOBS_.*|DATABASE_URL|FLASK_.*|PG[A-Z]+|PYTEST_.*|PYTHONPATH")

# The last line of the banner of `greenjobs run`: it has registered, and claims.
_IS_UP = r"^.* greenjobs\.cli: jobs: .*$"


class Process:
    """A process that was started in a session of its own. Made by `start` and `runner`."""

    def __init__(self, popen: subprocess.Popen[bytes], command: Sequence[str], log: IO[bytes]) -> None:
        self._popen = popen
        self._log = log
        self.command = " ".join(command)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def output(self) -> str:
        """All that it printed so far, on both streams."""
        size = os.fstat(self._log.fileno()).st_size
        # By position: the process writes at its own, which the descriptors share.
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def wait_for_line(self, pattern: str, *, seconds: float = PATIENCE_SECONDS) -> re.Match[str]:
        """Block until the output, from its beginning, has a line that the pattern is found in; returns the match.

        Fails when the process ends without printing it.
        """
        expression = re.compile(pattern, re.MULTILINE)

        def found_or_ended() -> tuple[re.Match[str] | None, int | None] | None:
            status = self._popen.poll()  # before the look at the output, which is complete once it has ended
            match = expression.search(self.output)
            return (match, status) if match or status is not None else None

        match, status = eventually(found_or_ended, f"no line like {pattern!r} from {self}", seconds=seconds)
        assert match, f"{self} ended with status {status} and no line like {pattern!r}:\n{self.output}"
        return match

    def send(self, number: int) -> None:
        """Send it a signal."""
        self._popen.send_signal(number)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.send(signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL, and wait until it is gone."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, *, seconds: float = PATIENCE_SECONDS) -> int:
        """Block until it has ended; returns its exit status, negative for the signal that ended it."""
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} did not end within {seconds:g} s:\n{self.output}") from None

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def __repr__(self) -> str:
        return f"<process {self.pid}: {self.command}>"


@contextlib.contextmanager
def start(
    *command: str | Path, folder: Path, database_url: str | None = None, environment: dict[str, str] | None = None
) -> Iterator[Process]:
    """A command in this folder, as typed there; killed at the end, with all that it started in its session.

    `greenjobs`, `flask` and `python` are those of this environment. Without a database URL it has to find one itself.
    What it printed is in the report of a failed test.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as log:
        popen = subprocess.Popen(
            words,
            cwd=folder,
            env=make_environment(database_url, environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        process = Process(popen, words, log)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
            print(f"--- {process}, status {popen.returncode}\n{process.output}---")


@contextlib.contextmanager
def runner(
    folder: Path, database_url: str | None = None, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[Process]:
    """`greenjobs run` in this folder, which claims jobs by now; the application there is app.py, or named by --app."""
    command = ("greenjobs", "run", *arguments)
    with start(*command, folder=folder, database_url=database_url, environment=environment) as process:
        process.wait_for_line(_IS_UP)
        yield process


def run(
    *command: str | Path,
    folder: Path,
    database_url: str | None = None,
    environment: dict[str, str] | None = None,
    status: int = 0,
    seconds: float = PATIENCE_SECONDS,
) -> str:
    """Run a command to its end; returns what it printed, and fails when its exit status is another."""
    with start(*command, folder=folder, database_url=database_url, environment=environment) as process:
        ended_with = process.wait(seconds=seconds)
        assert ended_with == status, f"{process} ended with status {ended_with}, not {status}:\n{process.output}"
        return process.output


def make_environment(database_url: str | None = None, more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of this process, without settings of ours or of others, and with the commands beside Python."""
    environment = {name: value for name, value in os.environ.items() if not _SETTINGS.fullmatch(name)}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment["PYTHONUNBUFFERED"] = "1"
    if database_url is not None:
        environment["GREENJOBS_DATABASE_URL"] = database_url
    return environment | (more or {})


def write_application(folder: Path, code: str, *, name: str = "app.py") -> Path:
    """Write the code, which may be indented, to a file that `greenjobs run` finds in the folder.

    It is there all at once: a process that loads it meanwhile sees what was there before, and who watches the folder
    sees one change.
    """
    file = folder / name
    beside = folder.parent / f".{uuid.uuid4().hex}"
    beside.write_text(textwrap.dedent(code), encoding="utf-8")
    return beside.replace(file)


def free_port() -> int:
    """A TCP port of this machine on which nobody listens, and which no other run of tests gets while this one lives.

    The system gives it to nobody either, as it might one of its own choice before somebody listens there.
    """
    while True:
        port = random.choice(_PORTS)
        # By the port of UDP with this number the runs of tests on this machine tell each other that it is taken.
        reservation = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with contextlib.suppress(OSError), socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            candidate.bind(("127.0.0.1", port))
            reservation.bind(("127.0.0.1", port))
            reservation.detach()  # it stays until this process ends
            return port
        reservation.close()
