"""Enqueuing from real servers, with the command lines of docs/servers.md, and that page itself.

A trigger notes which session of the database wrote each job, and every token has the process that enqueued it. So a
connection that two processes share is seen, whichever of them opened it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import databases
import gevent.pool
import pages
import processes
import psycopg2
import pytest
import requests
from waiting import eventually

PAGE = "servers.md"
REQUESTS = 120
AT_A_TIME = 16
CONNECTIONS = 3
TASKS = 30

# Enqueues at import: in the master, where the application is loaded before the fork.
APPLICATION = """
import os
from greenjobs import job

@job
def note(token):
    pass

def enqueue(text):
    token = f"{os.getpid()}:{text}"
    note.delay(token)
    return token

enqueue("at import")

def application(environ, start_response):
    answer = str(os.getpid())
    if environ["PATH_INFO"] == "/note":
        answer = enqueue(environ["QUERY_STRING"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [answer.encode()]
"""

NOTED = """
CREATE TABLE noted (token TEXT NOT NULL, session INTEGER NOT NULL);
CREATE FUNCTION note_session() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO noted SELECT data->>'token', pg_backend_pid() FROM added;
    RETURN NULL;
END
$$;
CREATE TRIGGER noted
    AFTER INSERT ON background_jobs
    REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION note_session();
"""


def commands(program: str) -> list[str]:
    """The lines of the page that start this program."""
    lines = [line for block in pages.blocks(PAGE) if block.language == "text" for line in block.text.splitlines()]
    return [line for line in lines if line.split()[0] == program]


SERVERS = [*commands("gunicorn"), *commands("waitress-serve")]
if importlib.util.find_spec("pyuwsgi"):  # setup.cfg has it where it need not be compiled
    SERVERS += commands("uwsgi")


class Server:
    """A server that enqueues, in a folder and with a database of its own."""

    def __init__(self, command: str, database_url: str, address: str = "") -> None:
        self.database_url = database_url
        self.address = address
        # Whether its application is loaded before it forks, and whether somebody replaces a worker that dies.
        self.is_loaded_first = "--preload" in command or command.startswith("uwsgi")
        self.has_master = not command.startswith("waitress")

    def enqueue(self, text: str) -> str:
        """Ask it for a job; returns its token, which begins with the number of the process that enqueued it."""
        answer = requests.get(f"{self.address}/note?{text}", timeout=60)
        answer.raise_for_status()
        return answer.text

    def rows(self, sql: str) -> list[tuple[object, ...]]:
        with databases.administration(self.database_url) as cursor:
            cursor.execute(sql)
            return cursor.fetchall()

    def tokens(self) -> Counter[str]:
        """How often each token is in the table of jobs."""
        return Counter(str(token) for (token,) in self.rows("SELECT data->>'token' FROM background_jobs"))

    def sessions(self) -> dict[object, set[int]]:
        """Which processes have enqueued on each session of the database."""
        owners: dict[object, set[int]] = {}
        for token, session in self.rows("SELECT token, session FROM noted"):
            owners.setdefault(session, set()).add(process_of(str(token)))
        return owners

    def shared_sessions(self) -> list[set[int]]:
        return [owners for owners in self.sessions().values() if len(owners) > 1]


def process_of(token: str) -> int:
    return int(token.partition(":")[0])


def text_of(token: str) -> str:
    return token.partition(":")[2]


def bound(command: str, port: int) -> list[str]:
    program, *words = shlex.split(command)
    option = {"gunicorn": "--bind", "waitress-serve": "--listen", "uwsgi": "--http-socket"}[program]
    return [program, option, f"127.0.0.1:{port}", *words]


def named(command: str) -> str:
    words = command.split()
    return " ".join([words[0], *(word for word in ("gthread", "gevent", "--preload") if word in words)])


@contextlib.contextmanager
def prepared(folder: Path, server_url: str, template: str) -> Iterator[str]:
    """The application and the other files of the page in this folder, and a database that notes sessions."""
    for block in pages.blocks(PAGE):
        if block.name:
            (folder / block.name).write_text(block.text, encoding="utf-8")
    processes.write_application(folder, APPLICATION)
    with databases.fresh(server_url, template=template) as url:
        with databases.administration(url) as cursor:
            cursor.execute(NOTED)
        yield url


@contextlib.contextmanager
def serving(command: str, folder: Path, server_url: str, template: str) -> Iterator[Server]:
    port = processes.free_port()
    # Nobody is refused merely because the machine is busy.
    bounds = {"GREENJOBS_ENQUEUE_CONNECTIONS": str(CONNECTIONS), "GREENJOBS_ENQUEUE_TIMEOUT": "60"}
    with (
        prepared(folder, server_url, template) as url,
        processes.start(*bound(command, port), folder=folder, database_url=url, environment=bounds) as process,
    ):
        server = Server(command, url, f"http://127.0.0.1:{port}")

        def is_up() -> bool:
            assert process.is_running, process.output
            with contextlib.suppress(requests.RequestException):
                return requests.get(server.address, timeout=5).ok
            return False

        eventually(is_up, f"no answer from {process}", seconds=processes.PATIENCE_SECONDS)
        yield server


@pytest.fixture(scope="module", params=SERVERS, ids=named)
def server(
    request: pytest.FixtureRequest, server_url: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One of the servers, which the facts about it share."""
    with serving(request.param, tmp_path_factory.mktemp("server"), server_url, migrated_template) as server:
        yield server


def test_page_has_all_kinds_of_servers() -> None:
    gunicorn = {f"gunicorn{kind}{when}" for kind in ("", " gthread", " gevent") for when in ("", " --preload")}
    assert {named(command) for command in commands("gunicorn")} == gunicorn
    assert len(commands("waitress-serve")) == len(commands("uwsgi")) == 1


def test_job_of_every_request_is_there_once_and_no_connection_is_shared(server: Server) -> None:
    pool = gevent.pool.Pool(AT_A_TIME)
    answers = list(pool.imap_unordered(server.enqueue, [f"request-{number}" for number in range(REQUESTS)]))
    stored = server.tokens()
    assert sorted(token for token in stored.elements() if ":request-" in token) == sorted(answers)
    assert server.shared_sessions() == []
    of_each_process = Counter(owner for owners in server.sessions().values() for owner in owners)
    assert max(of_each_process.values()) <= CONNECTIONS
    imported = [process_of(token) for token in stored.elements() if text_of(token) == "at import"]
    workers = {process_of(token) for token in answers}
    if server.is_loaded_first:
        assert len(imported) == 1 and imported[0] not in workers
    else:
        assert workers <= set(imported)


def test_killed_workers_lose_no_job_that_was_answered_for(server: Server) -> None:
    if not server.has_master:
        return  # it is one process, and nobody replaces it
    answered: list[str] = []
    sent = [f"while-killing-{number}" for number in range(REQUESTS)]

    def enqueue(text: str) -> str | None:
        with contextlib.suppress(requests.RequestException):
            answered.append(server.enqueue(text))
            return answered[-1]
        return None

    pool = gevent.pool.Pool(AT_A_TIME)
    for number, text in enumerate(sent):
        pool.spawn(enqueue, text)
        if number in (REQUESTS // 3, 2 * REQUESTS // 3):
            # One that may be gone already is as good.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_of(answered[-1]), signal.SIGKILL)
    pool.join()
    eventually(lambda: enqueue("afterwards"), "no answer any more", seconds=processes.PATIENCE_SECONDS)
    stored = server.tokens()
    assert {token: stored[token] for token in answered} == dict.fromkeys(answered, 1)
    texts = Counter(text_of(token) for token in stored.elements() if ":while-killing-" in token)
    assert set(texts) <= set(sent) and set(texts.values()) == {1}
    assert server.shared_sessions() == []


def test_requests_of_a_green_worker_go_on_while_others_wait_for_the_database(
    server_url: str, migrated_template: str, tmp_path: Path
) -> None:
    """Requests wait for a lock in both workers, and it is held until others have been answered."""
    (command,) = [line for line in SERVERS if "gevent_workers.py" in line]
    with serving(command, tmp_path, server_url, migrated_template) as server:
        blocker = psycopg2.connect(server.database_url)
        blocker.cursor().execute("LOCK TABLE background_jobs IN ACCESS EXCLUSIVE MODE")
        waiting = [gevent.spawn(server.enqueue, f"waiting-{number}") for number in range(8)]
        held = "SELECT 1 FROM pg_locks WHERE relation = 'background_jobs'::regclass AND NOT granted"
        eventually(lambda: len(server.rows(held)) >= 2, "nobody waits for the lock", seconds=30)
        answered_by = {int(requests.get(server.address, timeout=60).text) for _ in range(20)}
        assert not any(request.ready() for request in waiting)
        blocker.rollback()
        blocker.close()
        tokens = [request.get(timeout=60) for request in waiting]
        assert {process_of(token) for token in tokens} & answered_by
        assert all(server.tokens()[token] == 1 for token in tokens)


# --- forks, and Celery ------------------------------------------------------------------------------------------------


def test_threads_that_meet_in_a_forked_process_share_its_connections(database_url: str, tmp_path: Path) -> None:
    """They all find the connections of the parent at the same time, of which none must be used, and its bookkeeping."""
    code = """
    import os, sys, threading
    from app import note
    from greenjobs import config, pool

    sys.setswitchinterval(1e-6)
    note.delay("parent")
    shared = pool.shared_pool(config.current())
    for _ in range(40):
        child = os.fork()
        if not child:
            barrier = threading.Barrier(8)
            enqueued = []

            def enqueue():
                barrier.wait()
                enqueued.append(note.delay("child").id)

            threads = [threading.Thread(target=enqueue) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os._exit(not (len(enqueued) == 8 and shared._open == len(shared._idle) <= shared.size))
        assert os.waitpid(child, 0)[1] == 0
    """
    processes.write_application(tmp_path, "from greenjobs import job\n\n@job\ndef note(token): ...\n")
    processes.write_application(tmp_path, code, name="forks.py")
    two = {"GREENJOBS_ENQUEUE_CONNECTIONS": "2"}
    processes.run("python", "forks.py", folder=tmp_path, database_url=database_url, environment=two)
    with databases.administration(database_url) as cursor:
        cursor.execute("SELECT count(*) FROM background_jobs")
        assert cursor.fetchone() == (1 + 40 * 8,)


@pytest.mark.parametrize("command", commands("celery"), ids=lambda command: command.split()[5])
def test_tasks_of_celery_enqueue_once_each(
    command: str, server_url: str, migrated_template: str, tmp_path: Path
) -> None:
    with prepared(tmp_path, server_url, migrated_template) as url:
        tasks = (tmp_path / "tasks.py").read_text(encoding="utf-8")
        assert "import note" in tasks and "note.delay(text)" in tasks
        # With the process in the token.
        tasks = tasks.replace("import note", "import enqueue").replace("note.delay(text)", "enqueue(text)")
        (tmp_path / "tasks.py").write_text(tasks, encoding="utf-8")
        send = f"from tasks import forward; [forward.delay(f'task-{{n}}') for n in range({TASKS})]"
        processes.run("python", "-c", send, folder=tmp_path, database_url=url)
        server = Server(command, url)

        def of_tasks() -> list[str]:
            return [token for token in server.tokens().elements() if ":task-" in token]

        with processes.start(*shlex.split(command), folder=tmp_path, database_url=url) as worker:
            eventually(lambda: len(of_tasks()) >= TASKS, "not all tasks ran", seconds=processes.PATIENCE_SECONDS)
            worker.terminate()
            worker.wait()
        assert sorted(map(text_of, of_tasks())) == sorted(f"task-{number}" for number in range(TASKS))
        assert server.shared_sessions() == []
        assert ("prefork" in command) == (worker.pid not in set(map(process_of, of_tasks())))


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page, and leaves out the servers."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def test_jobs_of_shells_run(printed: dict[str, str]) -> None:
    output = printed["flask shell, and other shells"]
    assert "True" in output
    assert {"Hello, Ann", "Hello, Bob"} <= set(output.splitlines())


@pytest.mark.parametrize("kind", ["thread", "greenlet"])
def test_jobs_of_threads_and_greenlets_run_once_each(printed: dict[str, str], kind: str) -> None:
    lines = printed["Threads, greenlets, coroutines"].splitlines()
    found = sorted(line for line in lines if line.startswith(f"{kind} "))
    assert found == sorted(f"{kind} {number}" for number in range(20))
