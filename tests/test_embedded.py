"""The embedded server, with real processes: who shares it, when it ends, and what it makes of trouble.

Run by root, the tests that have an account run twice: as root, whose server runs as another account, and as `nobody`,
who is a normal user, if there is an interpreter that `nobody` can execute. Run by a normal user, they run as that user.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import gevent
import psycopg2
import pytest
from databases import administration, with_database
from waiting import eventually

from greenjobs import embedded
from greenjobs.embedded_guard import open_lock, try_lock
from greenjobs.errors import EmbeddedServerError

IS_ROOT = os.geteuid() == 0
SOURCES = Path(__file__).resolve().parent.parent
WHEEL = Path(embedded._find_package())

# Longer than any start, and shorter than the limit of a test.
PATIENCE_SECONDS = 60

PRELUDE = """
import json, logging, os, signal, sys
from pathlib import Path
from greenjobs import embedded
from greenjobs.errors import EmbeddedServerError

url, project = sys.argv[1], Path(sys.argv[2])

def say(**facts):
    print(json.dumps(facts), flush=True)

def wait():
    sys.stdin.readline()

def start():
    try:
        say(dsn=embedded.start(url, project_folder=project))
    except EmbeddedServerError as error:
        say(error=str(error))
"""

USE_UNTIL_TOLD = "start(); wait()"

# Its log comes between the facts that it says.
LOG = """
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='{"log": "%(message)s"}')
"""


class User:
    """A process that uses the server: runs a script, and says facts line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def hear(self) -> dict[str, str]:
        """The next line that it says."""
        assert self._process.stdout
        with gevent.Timeout(PATIENCE_SECONDS):
            line = self._process.stdout.readline()
        assert line, "the process ended and said nothing"
        facts: dict[str, str] = json.loads(line)
        return facts

    def dsn(self) -> str:
        facts = self.hear()
        assert "dsn" in facts, facts
        return facts["dsn"]

    def error(self) -> str:
        facts = self.hear()
        assert "error" in facts, facts
        return facts["error"]

    def go_on(self) -> None:
        """Let it return from `wait()`."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self, how: int | None = None) -> int:
        """End it by a signal, or let its script come to its end, and what it forked as well; return its exit status."""
        assert self._process.stdin and self._process.stdout
        if how is not None:
            self._process.send_signal(how)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with gevent.Timeout(PATIENCE_SECONDS):
            status: int = self._process.wait()
        self._process.stdout.close()
        return status


class Project:
    """A project's folder, and processes of one account that use its server."""

    def __init__(self, account: str | None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gj-project-")).resolve()
        self.folder.chmod(0o755)
        self.pg = self.folder / ".greenjobs" / "pg"
        self._account = account
        self._users: list[User] = []
        if account:
            shutil.chown(self.folder, account)

    def user(
        self,
        script: str = USE_UNTIL_TOLD,
        *,
        url: str = "embedded:",
        python: str = "",
        env: dict[str, str] | None = None,
    ) -> User:
        process = subprocess.Popen(
            [python or python_of(self._account), "-c", PRELUDE + script, url, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**environment(self.folder), **(env or {})},
            **run_as(self._account),
        )
        self._users.append(User(process))
        return self._users[-1]

    def guard_pid(self) -> int:
        return int((self.pg / "guard.lock").read_text())

    def server_pid(self) -> int:
        return int((self.pg / "data" / "postmaster.pid").read_text().split()[0])

    def wait_until_stopped(self) -> None:
        for lock in (self.pg / "server.lock", self.pg / "guard.lock"):
            free = functools.partial(can_be_locked, lock, fcntl.LOCK_EX)
            eventually(free, f"{lock} is still held", seconds=PATIENCE_SECONDS)

    def end_users(self) -> None:
        """End every process that a test started and left; no server may survive it."""
        while self._users:
            self._users.pop().end(signal.SIGKILL)
        self.wait_until_stopped()

    def close(self) -> None:
        self.end_users()
        shutil.rmtree(self.folder)


def can_be_locked(lock: Path, kind: int) -> bool:
    """Whether no living process holds the lock in a way that excludes this kind; true of a lock that was never made."""
    if not lock.exists():
        return True
    fd = open_lock(lock)
    try:
        return try_lock(fd, kind)
    finally:
        os.close(fd)


def is_held(lock: Path) -> bool:
    return not can_be_locked(lock, fcntl.LOCK_EX)


def run_as(account: str | None) -> dict[str, object]:
    return {"user": account, "group": pwd.getpwnam(account).pw_gid, "extra_groups": []} if account else {}


def environment(home: Path) -> dict[str, str]:
    return {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{SOURCES}{os.pathsep}{WHEEL.parent}",
        "PYTHONWARNINGS": "error",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@functools.cache
def python_of(account: str | None) -> str:
    """An interpreter that the account can execute and that finds greenjobs and the wheel; empty if there is none."""
    if account is None:
        return sys.executable
    check = "import sys; assert sys.version_info >= (3, 10); from greenjobs import embedded; embedded._find_package()"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with contextlib.suppress(OSError):
            options = {"env": environment(Path("/")), "cwd": "/", "stderr": subprocess.DEVNULL, **run_as(account)}
            if subprocess.run([python, "-c", check], **options).returncode == 0:
                return python
    return ""


ACCOUNTS = [None, "nobody"] if IS_ROOT and python_of("nobody") else [None]


@pytest.fixture(params=ACCOUNTS, ids=lambda account: account or "self")
def account(request: pytest.FixtureRequest) -> str | None:
    return request.param


@pytest.fixture
def new_project(account: str | None) -> Iterator[Project]:
    """A project that has no data yet, and processes of either account."""
    project = Project(account)
    yield project
    project.close()


@pytest.fixture
def own_new_project() -> Iterator[Project]:
    """A project that has no data yet, and processes of the account that runs the tests."""
    project = Project(None)
    yield project
    project.close()


@pytest.fixture(scope="module")
def used_projects() -> Iterator[dict[str | None, Project]]:
    """By account, a project with data, for all tests that leave it as it was: initdb takes longer than they do."""
    projects = {account: Project(account) for account in ACCOUNTS}
    for project in projects.values():
        project.user().dsn()
        project.end_users()
    yield projects
    for project in projects.values():
        project.close()


@pytest.fixture
def project(account: str | None, used_projects: dict[str | None, Project]) -> Iterator[Project]:
    """A project whose server was used before, and processes of either account."""
    yield used_projects[account]
    used_projects[account].end_users()


@pytest.fixture
def own_project(used_projects: dict[str | None, Project]) -> Iterator[Project]:
    """A project whose server was used before, and processes of the account that runs the tests, this one included."""
    yield used_projects[None]
    embedded.release()
    used_projects[None].end_users()


@pytest.fixture
def spare_project(used_projects: dict[str | None, Project]) -> Iterator[Project]:
    """A project like `own_project`, to be spoiled."""
    project = Project(None)
    subprocess.run(["cp", "-a", used_projects[None].folder / ".greenjobs", project.folder], check=True)
    yield project
    project.close()


def ask(dsn: str, statement: str) -> str:
    """The one value that a statement returns, as text."""
    with administration(dsn) as cursor:
        cursor.execute(statement)
        (value,) = cursor.fetchone() or (None,)
    return str(value)


def run(dsn: str, statement: str) -> None:
    with administration(dsn) as cursor:
        cursor.execute(statement)


def sockets_of(dsn: str) -> Path:
    return Path(parse_qs(urlsplit(dsn).query)["host"][0])


# --- URLs


@pytest.mark.parametrize(
    "url", ["embedded:", "embedded:///some/folder", "embedded:relative/folder", "embedded:/folder"]
)
def test_url_with_the_scheme_is_an_embedded_one(url: str) -> None:
    assert embedded.is_embedded_url(url)


@pytest.mark.parametrize("url", ["", "embedded", "postgresql://localhost/embedded:", "host=embedded", "embeddedx:"])
def test_other_url_is_no_embedded_one(url: str) -> None:
    assert not embedded.is_embedded_url(url)


@pytest.mark.parametrize("url", ["embedded://some/folder", "embedded://localhost/folder"])
def test_url_with_a_host_is_refused_with_the_forms_that_work(url: str, tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="embedded:///some/folder"):
        embedded.start(url, project_folder=tmp_path)


def test_url_with_a_nul_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="NUL"):
        embedded.start("embedded:a%00b", project_folder=tmp_path)


def test_other_platform_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(EmbeddedServerError, match="GREENJOBS_DATABASE_URL"):
        embedded.start("embedded:", project_folder=tmp_path)


def test_module_loads_neither_gevent_nor_psycopg2() -> None:
    check = "import sys, greenjobs.embedded; sys.exit(bool({'gevent', 'psycopg2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], env=environment(Path("/")), cwd="/").returncode == 0


# --- The server


def test_new_folder_gets_a_database_named_greenjobs(new_project: Project) -> None:
    assert ask(new_project.user().dsn(), "SELECT current_database()") == "greenjobs"


def test_default_folder_is_kept_out_of_version_control(own_new_project: Project) -> None:
    own_new_project.user().dsn()
    assert (own_new_project.folder / ".greenjobs" / ".gitignore").read_text() == "*\n"


def test_server_is_durable(own_project: Project) -> None:
    dsn = own_project.user().dsn()
    settings = ("fsync", "synchronous_commit", "full_page_writes", "data_checksums")
    assert [ask(dsn, f"SHOW {setting}") for setting in settings] == ["on"] * 4


def test_server_has_no_tcp_port(own_project: Project) -> None:
    assert ask(own_project.user().dsn(), "SHOW listen_addresses") == ""


def test_socket_lies_in_a_folder_that_nobody_else_may_enter(project: Project) -> None:
    assert stat.S_IMODE(sockets_of(project.user().dsn()).stat().st_mode) == 0o700


def test_data_survives_the_end_of_the_server(project: Project) -> None:
    user = project.user()
    run(user.dsn(), "CREATE TABLE kept AS SELECT 42 AS answer")
    user.end()
    project.wait_until_stopped()
    assert ask(project.user().dsn(), "SELECT answer FROM kept") == "42"


def test_dropped_database_is_made_again_at_the_next_start(spare_project: Project) -> None:
    user = spare_project.user()
    run(with_database(user.dsn(), "postgres"), "DROP DATABASE greenjobs")
    user.end()
    spare_project.wait_until_stopped()
    assert ask(spare_project.user().dsn(), "SELECT current_database()") == "greenjobs"


def test_environment_of_the_starter_does_not_change_the_server(own_project: Project) -> None:
    user = own_project.user(env={"PGPORT": "6543", "PGDATABASE": "nowhere", "PGUSER": "noone", "LC_ALL": "xx_XX"})
    assert ask(user.dsn(), "SELECT current_user") == "postgres"


def test_relative_folder_is_one_of_the_project(own_new_project: Project) -> None:
    own_new_project.pg = own_new_project.folder / "db" / "dev"
    user = own_new_project.user(url="embedded:db/dev")
    assert ask(user.dsn(), "SHOW data_directory") == str(own_new_project.pg / "data")


def test_absolute_folder_is_taken_as_it_is(own_project: Project) -> None:
    user = own_project.user(url=f"embedded://{own_project.pg}")
    assert ask(user.dsn(), "SHOW data_directory") == str(own_project.pg / "data")


# --- Sharing


def test_processes_that_name_the_same_folder_share_a_server(project: Project) -> None:
    one, other = project.user(), project.user()
    question = "SELECT pg_postmaster_start_time()"
    assert ask(one.dsn(), question) == ask(other.dsn(), question)


def test_two_names_of_one_folder_lead_to_the_same_server(spare_project: Project) -> None:
    (spare_project.folder / "link").symlink_to(spare_project.pg)
    assert spare_project.user().dsn() == spare_project.user(url="embedded:link").dsn()


def test_many_processes_that_start_at_the_same_instant_all_get_the_one_server(new_project: Project) -> None:
    users = [new_project.user("wait(); start(); wait()") for _ in range(5)]
    for user in users:
        user.go_on()
    assert len({ask(user.dsn(), "SELECT pg_postmaster_start_time()") for user in users}) == 1


@pytest.mark.parametrize("how", [None, signal.SIGTERM, signal.SIGKILL])
def test_server_stops_when_its_last_user_is_gone(project: Project, how: int | None) -> None:
    user = project.user()
    user.dsn()
    user.end(how)
    project.wait_until_stopped()


def test_server_stops_when_all_users_are_killed_at_once(own_project: Project) -> None:
    users = [own_project.user() for _ in range(3)]
    for user in users:
        user.dsn()
    for user in users:
        os.kill(user.pid, signal.SIGKILL)
    own_project.wait_until_stopped()


def test_server_stays_while_a_user_is_left(own_project: Project) -> None:
    starter, other = own_project.user(), own_project.user()
    starter.dsn()
    dsn = other.dsn()
    starter.end(signal.SIGKILL)
    # The guard would have taken the lock that the killed process held, if no other process held it.
    assert is_held(own_project.pg / "users.lock")
    assert ask(dsn, "SELECT 1") == "1"


def test_process_that_starts_while_the_server_stops_gets_a_new_one(project: Project) -> None:
    former = project.user()
    former.dsn()
    stopped = project.server_pid()
    os.kill(stopped, signal.SIGSTOP)  # its end now takes as long as this test wants
    former.end()
    lock = project.pg / "users.lock"
    eventually(lambda: not can_be_locked(lock, fcntl.LOCK_SH), "the guard did not notice that its last user is gone")
    user = project.user()
    os.kill(stopped, signal.SIGCONT)
    assert ask(user.dsn(), "SELECT 1") == "1"
    assert project.server_pid() != stopped


def test_released_server_stops_while_its_user_lives_on(own_project: Project) -> None:
    user = own_project.user("start(); wait(); embedded.release(); say(released=''); wait(); start(); wait()")
    user.dsn()
    user.go_on()
    user.hear()
    own_project.wait_until_stopped()
    user.go_on()
    assert ask(user.dsn(), "SELECT 1") == "1"


def test_second_start_in_a_process_returns_the_same_address(own_project: Project) -> None:
    user = own_project.user("start(); start(); wait()")
    assert user.dsn() == user.dsn()


def test_start_says_once_that_it_is_for_development_and_where_the_data_lies(own_project: Project) -> None:
    user = own_project.user(LOG + "start(); start(); say(end=''); wait()")
    lines = [user.hear() for _ in range(4)]
    assert [list(line) for line in lines] == [["log"], ["dsn"], ["dsn"], ["end"]]
    assert "not for production" in lines[0]["log"] and str(own_project.pg) in lines[0]["log"]


def test_joining_a_server_is_not_logged(own_project: Project) -> None:
    own_project.user().dsn()
    joined = own_project.user(LOG + USE_UNTIL_TOLD)
    assert list(joined.hear()) == ["dsn"]


def test_threads_that_start_at_once_share_one_lock_that_release_lets_go(own_project: Project) -> None:
    user = own_project.user(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    found = set(pool.map(lambda _: embedded.start(url, project_folder=project), range(8)))\n"
        "say(servers=len(found)); embedded.release(); say(released=''); wait()"
    )
    assert user.hear() == {"servers": 1}
    user.hear()
    own_project.wait_until_stopped()


# --- Forks and programs


def test_forked_child_keeps_the_server_after_the_kill_of_its_parent(project: Project) -> None:
    user = project.user("start()\nif os.fork():\n    wait()\nelse:\n    start(); wait()")
    dsn = user.dsn()
    assert user.dsn() == dsn
    os.kill(user.pid, signal.SIGKILL)
    assert is_held(project.pg / "users.lock")
    assert ask(dsn, "SELECT 1") == "1"


def test_end_of_a_forked_child_does_not_take_the_server_from_its_parent(own_project: Project) -> None:
    user = own_project.user(
        "start()\nchild = os.fork()\n"
        "if not child:\n    embedded.release(); sys.exit()\n"
        "os.waitpid(child, 0); start(); wait()"
    )
    dsn = user.dsn()
    assert user.dsn() == dsn
    assert is_held(own_project.pg / "users.lock")
    assert ask(dsn, "SELECT 1") == "1"


def test_program_started_by_a_user_does_not_keep_the_server(own_project: Project) -> None:
    user = own_project.user(
        "import subprocess\nstart()\n"
        "nothing = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.DEVNULL}\n"
        "program = subprocess.Popen(['sleep', '100'], close_fds=False, **nothing)\n"
        "say(pid=program.pid); wait()"
    )
    user.dsn()
    program = int(user.hear()["pid"])
    user.end(signal.SIGKILL)
    own_project.wait_until_stopped()
    os.kill(program, signal.SIGKILL)  # it was still there


def test_guard_holds_no_descriptor_of_its_starter(own_project: Project) -> None:
    """Such as the listening socket of a web server, whose port would stay in use."""
    user = own_project.user(
        "reading, writing = os.pipe(); os.set_inheritable(writing, True); start()\n"
        "os.close(writing); say(end=os.read(reading, 1).decode()); wait()"
    )
    user.dsn()
    assert user.hear() == {"end": ""}


# --- In a process that gevent has patched, as this one is


def test_start_does_not_hold_the_event_loop(own_project: Project) -> None:
    turns = 0

    def count() -> None:
        nonlocal turns
        while True:
            gevent.sleep(0)
            turns += 1

    counter = gevent.spawn(count)
    embedded.start("embedded:", project_folder=own_project.folder)
    counter.kill()
    assert turns > 10


def test_greenlets_that_start_at_once_share_one_server(own_project: Project) -> None:
    starts = [gevent.spawn(embedded.start, "embedded:", project_folder=own_project.folder) for _ in range(5)]
    assert len({start.get(timeout=PATIENCE_SECONDS) for start in starts}) == 1


def test_native_thread_of_a_patched_process_can_start_a_server(own_project: Project) -> None:
    start = functools.partial(embedded.start, "embedded:", project_folder=own_project.folder)
    assert ask(gevent.get_hub().threadpool.apply(start), "SELECT 1") == "1"


def test_child_forked_by_a_patched_process_keeps_the_server(own_project: Project) -> None:
    script = (
        "from gevent import monkey; monkey.patch_all()\nstart()\nif os.fork():\n    wait()\nelse:\n    start(); wait()"
    )
    user = own_project.user(script)
    dsn = user.dsn()
    assert user.dsn() == dsn
    os.kill(user.pid, signal.SIGKILL)
    assert is_held(own_project.pg / "users.lock")
    assert ask(dsn, "SELECT 1") == "1"


# --- Trouble


def kill_guard(project: Project) -> None:
    """Kill it and wait for the kernel to take its locks away, which comes before its death signal to the server."""
    os.kill(project.guard_pid(), signal.SIGKILL)
    eventually(lambda: not is_held(project.pg / "ready.lock"), "the killed guard is still there")


def test_server_of_a_killed_guard_stops_and_the_next_start_works(project: Project) -> None:
    user = project.user()
    user.dsn()
    kill_guard(project)
    assert ask(project.user().dsn(), "SELECT 1") == "1"


if sys.platform == "linux":

    def test_kernel_stops_the_server_of_a_killed_guard(project: Project) -> None:
        project.user().dsn()
        kill_guard(project)
        project.wait_until_stopped()


def test_user_gets_the_server_back_after_the_kill_of_its_guard(project: Project) -> None:
    user = project.user("start(); wait(); start(); wait()")
    dsn = user.dsn()
    kill_guard(project)
    user.go_on()
    assert user.dsn() == dsn
    assert ask(dsn, "SELECT 1") == "1"


def test_crash_of_guard_and_server_loses_nothing_committed(project: Project) -> None:
    user = project.user()
    run(user.dsn(), "CREATE TABLE committed AS SELECT 42 AS answer")
    guard, server = project.guard_pid(), project.server_pid()
    os.kill(guard, signal.SIGSTOP)  # so that it does not notice the end of the server
    os.kill(server, signal.SIGKILL)
    os.kill(guard, signal.SIGKILL)
    user.end(signal.SIGKILL)
    assert (project.pg / "data" / "postmaster.pid").exists()
    assert ask(project.user().dsn(), "SELECT answer FROM committed") == "42"


def test_recorded_process_number_that_another_process_has_now_does_not_hinder(project: Project) -> None:
    """As after a reboot, or in a container that was restarted."""
    other = project.user("say(ready=''); wait()")
    other.hear()
    stale = f"{other.pid}\n{project.pg / 'data'}\n1700000000\n5432\n\n\n  1234567         1\nready\n"
    (project.pg / "data" / "postmaster.pid").write_text(stale)
    (project.pg / "s" / ".s.PGSQL.5432.lock").write_text(stale)
    assert ask(project.user().dsn(), "SELECT 1") == "1"


def test_deleted_folder_stops_its_server(spare_project: Project) -> None:
    spare_project.user().dsn()
    server = open_lock(spare_project.pg / "server.lock")
    shutil.rmtree(spare_project.folder / ".greenjobs")
    eventually(lambda: try_lock(server, fcntl.LOCK_EX), "the server outlives its data", seconds=PATIENCE_SECONDS)
    os.close(server)


def test_user_of_a_deleted_folder_gets_a_new_server(spare_project: Project) -> None:
    user = spare_project.user("start(); wait(); start(); wait()")
    dsn = user.dsn()
    server = spare_project.server_pid()
    shutil.rmtree(spare_project.folder / ".greenjobs")
    user.go_on()
    assert user.dsn() == dsn
    assert spare_project.server_pid() != server


def test_terminated_guard_shuts_the_server_down_in_order(own_project: Project) -> None:
    own_project.user().dsn()
    os.kill(own_project.guard_pid(), signal.SIGTERM)
    own_project.wait_until_stopped()
    assert (own_project.pg / "postgres.log").read_text().endswith("database system is shut down\n")


def test_killed_starter_leaves_usable_data_behind(own_new_project: Project) -> None:
    starter = own_new_project.user()
    wait_for_initdb(own_new_project)
    os.kill(starter.pid, signal.SIGKILL)
    assert ask(own_new_project.user().dsn(), "SELECT 1") == "1"


def test_killed_initdb_leaves_nothing_behind(new_project: Project) -> None:
    starter = new_project.user()
    wait_for_initdb(new_project)
    os.kill(new_project.guard_pid(), signal.SIGKILL)
    assert "guard" in starter.error()
    assert not (new_project.pg / "data").exists()
    assert ask(new_project.user().dsn(), "SELECT 1") == "1"
    assert not list(new_project.pg.glob("data.new-*"))


def wait_for_initdb(project: Project) -> None:
    eventually(lambda: list(project.pg.glob("data.new-*/base/1")), "initdb did not begin", seconds=PATIENCE_SECONDS)


def test_failed_initdb_is_told_with_what_it_said_and_does_not_hinder_the_next_start(own_new_project: Project) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); start()"
    message = own_new_project.user(limit).error()
    assert f"initdb failed in {own_new_project.pg}" in message and "data.new-" in message
    assert ask(own_new_project.user().dsn(), "SELECT 1") == "1"


def test_server_that_does_not_start_is_told_with_the_end_of_its_log(spare_project: Project) -> None:
    with (spare_project.pg / "data" / "postgresql.conf").open("a") as settings:
        settings.write("no_such_setting = 1\n")
    message = spare_project.user().error()
    assert "did not start" in message and "no_such_setting" in message


def test_data_of_another_major_version_is_refused_by_folder_and_version(spare_project: Project) -> None:
    (spare_project.pg / "data" / "PG_VERSION").write_text("15\n")
    message = spare_project.user().error()
    assert f"{spare_project.pg / 'data'} was made by PostgreSQL 15" in message and "pg_dump" in message


def test_folder_with_other_data_is_refused(own_new_project: Project) -> None:
    user = own_new_project.user("(project / 'mine' / 'data').mkdir(parents=True); start()", url="embedded:mine")
    assert "is not the data of a PostgreSQL server" in user.error()


def test_file_in_place_of_the_folder_is_refused(own_new_project: Project) -> None:
    user = own_new_project.user("(project / 'file').touch(); start()", url="embedded:file")
    assert "is not a folder" in user.error()


def test_missing_binaries_are_told_with_the_command_that_installs_them(own_new_project: Project) -> None:
    user = own_new_project.user(f"sys.path[:] = [path for path in sys.path if path != {str(WHEEL.parent)!r}]; start()")
    assert 'pip install "greenjobs[embedded]"' in user.error()


# --- A socket's path that would be too long


@pytest.fixture
def long_name(spare_project: Project) -> str:
    name = "a-folder-with-a-long-name" * 4
    (spare_project.folder / ".greenjobs" / "pg").rename(spare_project.folder / name)
    spare_project.pg = spare_project.folder / name
    return name


def test_long_path_gets_a_short_private_folder_for_the_socket(spare_project: Project, long_name: str) -> None:
    dsn = spare_project.user(url=f"embedded:{long_name}").dsn()
    sockets = sockets_of(dsn)
    assert sockets.parent == Path("/tmp") and stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert ask(dsn, "SELECT 1") == "1"


def test_short_folder_of_the_socket_goes_with_the_server(spare_project: Project, long_name: str) -> None:
    user = spare_project.user(url=f"embedded:{long_name}")
    sockets = sockets_of(user.dsn())
    user.end()
    spare_project.wait_until_stopped()
    assert not sockets.exists()


@pytest.mark.parametrize("trap", ["open folder", "link"])
def test_short_folder_that_others_could_enter_is_refused(spare_project: Project, long_name: str, trap: str) -> None:
    sockets = embedded._Place(spare_project.pg, None).sockets
    if trap == "link":
        sockets.symlink_to(spare_project.folder)
    else:
        sockets.mkdir()
        sockets.chmod(0o777)
    try:
        assert f"{sockets} must be a folder" in spare_project.user(url=f"embedded:{long_name}").error()
    finally:
        sockets.unlink() if trap == "link" else sockets.rmdir()


# --- Accounts

if IS_ROOT:

    def test_server_of_root_runs_as_another_account(own_project: Project) -> None:
        own_project.user().dsn()
        assert Path(f"/proc/{own_project.server_pid()}").stat().st_uid != 0

    def test_server_of_root_runs_as_the_owner_of_the_project() -> None:
        project = Project(None)
        shutil.chown(project.folder, "nobody")
        try:
            project.user().dsn()
            assert (project.pg / "data").owner() == "nobody" and (project.pg / "users.lock").owner() == "nobody"
        finally:
            project.close()

    def test_other_account_cannot_connect(own_project: Project) -> None:
        dsn = own_project.user().dsn()
        assert (own_project.pg / "data").owner() != "nobody"
        command = [WHEEL / "pginstall" / "bin" / "psql", "-c", "SELECT 1", dsn]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", **run_as("nobody"))
        assert "Permission denied" in done.stderr

    def test_project_out_of_reach_of_the_account_has_its_data_elsewhere() -> None:
        project = Project(None)
        project.folder.chmod(0o700)
        try:
            user = project.user(LOG + USE_UNTIL_TOLD)
            log, dsn = user.hear()["log"], user.dsn()
            data = Path(ask(dsn, "SHOW data_directory"))
            assert data.is_relative_to("/var/lib/greenjobs") and str(data.parent) in log and str(project.folder) in log
            project.pg = data.parent
        finally:
            project.close()
            shutil.rmtree(project.pg)

    def test_binaries_out_of_reach_of_the_account_are_copied(own_project: Project) -> None:
        hidden = own_project.folder / "hidden"
        hidden.mkdir(mode=0o700)
        for part in (WHEEL, WHEEL.with_name(WHEEL.name + ".libs")):
            shutil.copytree(part, hidden / part.name)
        user = own_project.user(f"sys.path.insert(0, {str(hidden)!r}); start(); wait()")
        assert ask(user.dsn(), "SELECT 1") == "1"
        assert str(own_project.pg) in Path(f"/proc/{own_project.server_pid()}/cmdline").read_text()


def test_folder_of_somebody_else_is_refused(own_project: Project) -> None:
    """In /tmp, anybody could have made it, and could read what is put into the database."""
    stranger = "nobody" if IS_ROOT else "root"
    folder = Path(tempfile.mkdtemp(dir="/tmp")) if IS_ROOT else Path("/var")
    try:
        if IS_ROOT:
            shutil.chown(folder, stranger)
        assert f"belongs to the account {stranger}" in own_project.user(url=f"embedded://{folder}").error()
    finally:
        if IS_ROOT:
            folder.rmdir()


# --- Throw-away servers


@pytest.fixture(scope="module")
def temporary_dsn() -> Iterator[str]:
    with embedded.temporary({"work_mem": "7MB", "synchronous_commit": "on"}) as dsn:
        yield dsn


def test_temporary_server_is_fast_and_not_durable(temporary_dsn: str) -> None:
    assert ask(temporary_dsn, "SHOW fsync") == "off"


def test_temporary_server_takes_settings_over_its_own(temporary_dsn: str) -> None:
    assert ask(temporary_dsn, "SHOW work_mem") == "7MB" and ask(temporary_dsn, "SHOW synchronous_commit") == "on"


def test_temporary_server_outlives_a_release_of_the_others(temporary_dsn: str) -> None:
    embedded.release()
    assert ask(temporary_dsn, "SELECT 1") == "1"


def test_temporary_server_is_one_of_its_own_and_gone_at_the_end_with_its_folder(temporary_dsn: str) -> None:
    with embedded.temporary() as dsn:
        assert dsn != temporary_dsn and sockets_of(dsn).parent.exists()
    assert not sockets_of(dsn).parent.exists()
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(dsn)


def test_temporary_server_is_gone_when_the_block_raises() -> None:
    with pytest.raises(ZeroDivisionError), embedded.temporary() as dsn:
        raise ZeroDivisionError
    assert not sockets_of(dsn).parent.exists()


def test_temporary_server_of_a_killed_process_is_removed(own_new_project: Project) -> None:
    user = own_new_project.user("with embedded.temporary() as dsn:\n    say(dsn=dsn); wait()")
    folder = sockets_of(user.dsn()).parent
    user.end(signal.SIGKILL)
    eventually(lambda: not folder.exists(), "the folder of a killed process stays", seconds=PATIENCE_SECONDS)


def test_temporary_server_with_a_wrong_setting_is_refused_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(tempfile.mkdtemp(prefix="gj-", dir="/tmp"))
    place.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", None)  # what it remembers of the environment
    monkeypatch.setenv("TMPDIR", str(place))
    with pytest.raises(EmbeddedServerError, match="no_such_setting"), embedded.temporary({"no_such_setting": "1"}):
        raise AssertionError("it started")
    place.rmdir()
