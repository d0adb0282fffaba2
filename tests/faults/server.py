"""A PostgreSQL server of the tests' own, which they may stop, kill, copy and promote.

Its binaries are those of the embedded server. As root it runs as an unprivileged account. What it was told is durable
against every death of its processes; nothing is synced to disk, which only a death of the machine would tell.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
from processes import PATIENCE_SECONDS, free_port
from waiting import eventually

from greenjobs import embedded
from greenjobs.embedded_guard import is_within_reach

# Commits reach the kernel before they are confirmed, and stay there whatever happens to the processes.
_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "on",
    "max_connections": "300",
    "max_wal_size": "256MB",
    "logging_collector": "off",
    "log_line_prefix": "%m [%p] %a ",
    # A standby that has lost its primary asks again so often.
    "wal_retrieve_retry_interval": "100ms",
}

# How to stop it: with a checkpoint; at once, as in a crash; and without the postmaster noticing.
WAYS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "kill -9": signal.SIGKILL}

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# What the server says while the last processes of one that was killed are still there.
_STILL_IN_USE = "pre-existing shared memory block"


@contextlib.contextmanager
def workshop() -> Iterator[Path]:
    """A folder in which servers may live, as its path is short and their account can reach it; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="gjf-", dir="/tmp"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Server:
    """One server in a folder of the workshop; made by `new_server` or `standby`, ended by `end`."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.port = free_port()
        self._settings = {**_SETTINGS, **settings}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """By its socket."""
        return f"postgresql://postgres@/postgres?host={quote(str(self.folder / 's'))}&port={self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    # --- life and death -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # The other processes of a server that was killed notice it, and go, in their own time.
        eventually(self._launch, f"the server in {self.folder} does not start", seconds=PATIENCE_SECONDS)

    def stop(self, how: int = signal.SIGINT) -> None:
        """Stop it in one of the WAYS."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        """End the postmaster with SIGKILL; the other processes go when they notice."""
        self.stop(signal.SIGKILL)

    def restart(self, how: int = signal.SIGINT) -> None:
        """Stop it in this way, and start it again."""
        self.stop(how)
        self.start()

    def end(self) -> None:
        """Make sure that it does not run."""
        if self._process is not None and self._process.poll() is None:
            self.stop(signal.SIGQUIT)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def answers(self) -> bool:
        """Whether it takes a connection at this moment."""
        try:
            psycopg2.connect(self.url, connect_timeout=5).close()
        except psycopg2.OperationalError:
            return False
        return True

    def _launch(self) -> bool:
        seen = len(self.log)
        options = {"unix_socket_directories": str(self.folder / "s"), "port": str(self.port), "listen_addresses": ""}
        command = [str(_binaries() / "postgres"), "-D", str(self.folder / "data")]
        for name, value in {**options, **self._settings}.items():
            command += ["-c", f"{name}={value}"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(),
                # An interrupt at the terminal is for the tests, which then stop the server.
                start_new_session=True,
                preexec_fn=_ending_with_this_process(),  # noqa: PLW1509  # one call, no lock
                **_as_account(),
            )
        eventually(lambda: self.answers() or not self.is_running, "no answer", seconds=PATIENCE_SECONDS)
        assert self.is_running or _STILL_IN_USE in self.log[seen:], self.log[seen:]
        return self.is_running

    # --- a standby ----------------------------------------------------------------------------------------------------

    def standby(self, name: str) -> Server:
        """A copy of this running server, which follows it under this name; not started yet."""
        copy = Server(_make_folder(self.folder.parent / name), self._settings)
        source = f"{self.url}&application_name={name}"
        _run("pg_basebackup", "-D", str(copy.folder / "data"), "-R", "-X", "stream", "-c", "fast", "-N", "-d", source)
        return copy

    def set(self, name: str, value: str) -> None:
        """Change a setting of the running server, and of no copy that was made before."""
        with contextlib.closing(psycopg2.connect(self.url)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(f"ALTER SYSTEM SET {name} = %s", (value,))
            cursor.execute("SELECT pg_reload_conf()")

    def trust(self, network: str) -> None:
        """Let everybody in who comes from there; only from this machine otherwise."""
        with (self.folder / "data" / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {network} trust\n")
        self.set("log_connections", "on")  # which reads the rules again, too

    def promote(self) -> None:
        """Make a standby a primary, and wait until it is one."""
        with contextlib.closing(psycopg2.connect(self.url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_promote(true, %s)", (int(PATIENCE_SECONDS),))
            assert cursor.fetchone() == (True,), self.log


def new_server(folder: Path, **settings: str) -> Server:
    """A server with new data and these settings, in a folder of the workshop; not started yet."""
    options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
    server = Server(_make_folder(folder), settings)
    _run("initdb", "--pgdata", str(folder / "data"), *options)
    return server


def _make_folder(folder: Path) -> Path:
    # Nobody else may enter the sockets' folder; that is all the server asks of who connects.
    for path, mode in ((folder, 0o711), (folder / "s", 0o700)):
        path.mkdir(mode=mode)
        path.chmod(mode)
        give_to_account(path)
    (folder / "log").touch()
    return folder


# --- binaries and account ---------------------------------------------------------------------------------------------


@functools.cache
def _account() -> pwd.struct_passwd | None:
    """Whom the servers run as, when that is somebody else: PostgreSQL refuses to be root."""
    return embedded._account_for(Path("/tmp")) if os.geteuid() == 0 else None


@functools.cache
def _binaries() -> Path:
    """The folder of the binaries; a copy for this run, where the account cannot reach them."""
    package = embedded._find_package()
    binaries, account = package / "pginstall" / "bin", _account()
    if account is None or is_within_reach(binaries / "postgres", account.pw_uid, account.pw_gid):
        return binaries
    copy = Path(tempfile.mkdtemp(prefix="gjf-binaries-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    copy.chmod(0o755)
    for part in (package, package.with_name(package.name + ".libs")):
        if part.is_dir():
            shutil.copytree(part, copy / part.name)
    return copy / package.name / "pginstall" / "bin"


def give_to_account(path: Path) -> None:
    """Make it the property of the account that servers run as."""
    account = _account()
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid)


def _as_account() -> dict[str, Any]:
    account = _account()
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def run_as_account(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start another program as the servers' account; it ends with this process."""
    return subprocess.Popen(
        command,
        cwd="/",
        env=_environment(),
        preexec_fn=_ending_with_this_process(),  # noqa: PLW1509  # one call, no lock
        **_as_account(),
        **options,
    )


def _run(program: str, *arguments: str) -> None:
    done = subprocess.run(
        [str(_binaries() / program), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        env=_environment(),
        text=True,
        **_as_account(),
    )
    assert done.returncode == 0, done.stdout


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _ending_with_this_process() -> Callable[[], None] | None:
    """For the child: end when the tests are killed. Elsewhere than on Linux it then stays."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT) and None
