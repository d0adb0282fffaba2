"""What a runner, and a supervisor, say over HTTP: real servers, asked as probes and people ask them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import sys
import tempfile
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests
from processes import free_port, run, start, write_application
from running import Database, application, started
from test_supervisor import APPLICATION as FLEET
from test_supervisor import Fleet, fleet
from waiting import eventually

import greenjobs
from greenjobs import health, http_server, migrate, supervisor_http
from greenjobs.address import Address
from greenjobs.errors import ConfigError
from greenjobs.http_client import fetch
from greenjobs.http_server import Answer, Request, Server
from greenjobs.runner import Runner, RunnerHandle

PATIENCE_SECONDS = 30.0


def ask(address: Address | str, path: str, *, timeout: float = PATIENCE_SECONDS) -> tuple[int, Any]:
    """Status and document of an answer."""
    place = Address.parse(address) if isinstance(address, str) else address
    status, _, body = fetch(place, path, timeout=timeout)
    return status, json.loads(body)


def wait_for_status(address: Address | str, path: str, wanted: int) -> Any:
    """Ask until the answer has this status; returns its document."""
    seen: list[Any] = []

    def is_so() -> bool:
        with contextlib.suppress(OSError):
            status, document = ask(address, path)
            seen[:] = [status, document]
            return status == wanted
        return False

    eventually(is_so, f"{path} answers {wanted}; it said {seen}", seconds=60)
    return seen[1]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that merely takes its time, as on a busy machine, is no reason for anything to be not ready."""
    monkeypatch.setattr(health, "DATABASE_SECONDS", PATIENCE_SECONDS)


# Addresses


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("127.0.0.1:9600", "127.0.0.1:9600"),
        ("9600", "127.0.0.1:9600"),
        (":9600", "127.0.0.1:9600"),
        ("0.0.0.0:9600", "0.0.0.0:9600"),
        ("[::1]:9600", "[::1]:9600"),
        ("[::]:0", "[::]:0"),
        ("localhost:0", "localhost:0"),
        ("jobs.example.org:65535", "jobs.example.org:65535"),
        ("unix:/run/greenjobs.sock", "unix:/run/greenjobs.sock"),
    ],
)
def test_address_is_read(text: str, meant: str) -> None:
    assert str(Address.parse(text)) == meant


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", "host:", "host:port", "1:2:3", "::1:9600", "[::1]", "[x]:1", "127.0.0.1:65536", "9600x", "-1"),
        *("http://127.0.0.1:9600", "127.0.0.1:9600/", "a b:1", "unix:", "unix:relative", "unix:/folder/"),
        "unix:/" + "x" * 104,
    ],
)
def test_text_that_names_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Address.parse(text)


def test_wrong_address_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"http is '1\.2\.3\.4' \(an argument\); the value must be \"HOST:PORT\""):
        greenjobs.config.load(http="1.2.3.4")


@pytest.mark.parametrize(
    ("text", "is_local"),
    [
        ("9600", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("localhost:1", True),
        ("unix:/x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_address_knows_whether_others_reach_it(text: str, is_local: bool) -> None:
    assert Address.parse(text).is_local is is_local


def test_port_in_use_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = Address("127.0.0.1", other.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"http is {address}: .*[Aa]ddress already in use; another process does"):
            address.listen()


def test_host_that_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match="http is nowhere.invalid:1: cannot listen there: "):
        Address("nowhere.invalid", 1).listen()


def test_socket_that_nobody_listens_on_any_more_is_replaced(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "http.sock"))
    address.listen().close()
    assert os.path.exists(str(address.path))
    with address.listen():
        address.connect(5).close()


def test_socket_that_somebody_listens_on_is_left_to_them(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "http.sock"))
    with address.listen():
        with pytest.raises(ConfigError, match="in use"):
            address.listen()
        address.connect(5).close()


def test_file_in_the_place_of_a_socket_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "http.sock"
    file.write_text("precious")
    with pytest.raises(ConfigError, match="something else than a socket"):
        Address(path=str(file)).listen()
    assert file.read_text() == "precious"


def test_socket_is_for_its_owner_and_group(tmp_path: Path) -> None:
    with Address(path=str(tmp_path / "http.sock")).listen():
        assert stat.S_IMODE(os.stat(tmp_path / "http.sock").st_mode) == 0o660


# The server


def say_hello(request: Request) -> Answer:
    return Answer.of({"from_here": request.is_from_here})


def go_wrong(request: Request) -> Answer:
    raise LookupError("secret")


@contextlib.contextmanager
def served(address: str = "127.0.0.1:0") -> Iterator[Server]:
    server = Server(Address.parse(address), {"/hello": say_hello, "/wrong": go_wrong})
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served() as server:
        yield server


def url(server: Server, path: str) -> str:
    return f"http://{server.address}{path}"


def test_get_has_a_body_and_is_not_to_be_kept(server: Server) -> None:
    answer = requests.get(url(server, "/hello"), timeout=PATIENCE_SECONDS)
    assert (answer.status_code, answer.json()) == (200, {"from_here": True})
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Server"] == "greenjobs"


def test_head_has_the_same_headers_and_no_body(server: Server) -> None:
    got, head = requests.get(url(server, "/hello"), timeout=30), requests.head(url(server, "/hello"), timeout=30)
    assert head.status_code == 200 and head.content == b""
    assert head.headers["Content-Length"] == got.headers["Content-Length"] == str(len(got.content))


@pytest.mark.parametrize("path", ["/hello/", "/hello?full=1"])
def test_slash_at_the_end_and_query_are_nothing(server: Server, path: str) -> None:
    assert requests.get(url(server, path), timeout=PATIENCE_SECONDS).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
def test_other_methods_are_refused(server: Server, method: str) -> None:
    answer = requests.request(method, url(server, "/hello"), data="x" * 5000, timeout=PATIENCE_SECONDS)
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "GET, HEAD"


def test_unknown_path_is_answered_with_those_that_there_are(server: Server) -> None:
    answer = requests.get(url(server, "/helo"), timeout=PATIENCE_SECONDS)
    assert answer.status_code == 404
    assert answer.json() == {"error": "there is no /helo", "paths": ["/hello", "/wrong"]}


def test_mistake_of_ours_is_logged_and_not_shown(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    answer = requests.get(url(server, "/wrong"), timeout=PATIENCE_SECONDS)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert "cannot answer /wrong" in caplog.text and "secret" in caplog.text


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"nonsense\r\n\r\n", b"Bad request"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.0\r\n\r\n", b" 414 "),
        (b"GET http://[ HTTP/1.0\r\n\r\n", b" 400 "),
        (b"POST /hello HTTP/1.0\r\nContent-Length: \xb2\r\n\r\n", b" 405 "),
    ],
)
def test_what_is_no_request_is_refused(server: Server, sent: bytes, said: bytes) -> None:
    with server.address.connect(PATIENCE_SECONDS) as connection:
        connection.sendall(sent)
        assert said in connection.recv(4096)


def test_clients_that_say_nothing_keep_nobody_out(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(server.address.connect(PATIENCE_SECONDS))
            for _ in range(http_server.MOST_CONNECTIONS + 10)
        ]
        assert ask(server.address, "/hello")[0] == 200
        assert silent[0].recv(1) == b""  # the first has made room


@pytest.mark.parametrize("host", ["evil.example.org", "evil.example.org:9600", "10.1.2.3", "[::1"])
def test_browser_that_was_led_here_is_not_from_here(server: Server, host: str) -> None:
    answer = requests.get(url(server, "/hello"), headers={"Host": host}, timeout=PATIENCE_SECONDS)
    assert answer.json() == {"from_here": False}


@pytest.mark.parametrize("host", ["localhost", "localhost:9600", "127.0.0.1", "[::1]:9600"])
def test_host_of_this_machine_is_from_here(server: Server, host: str) -> None:
    answer = requests.get(url(server, "/hello"), headers={"Host": host}, timeout=PATIENCE_SECONDS)
    assert answer.json() == {"from_here": True}


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Via"])
def test_proxy_is_not_from_here(server: Server, header: str) -> None:
    answer = requests.get(url(server, "/hello"), headers={header: "127.0.0.1"}, timeout=PATIENCE_SECONDS)
    assert answer.json() == {"from_here": False}


def own_address() -> str:
    """An address of this machine that others see."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


def test_who_comes_over_the_network_is_not_from_here() -> None:
    host = own_address()
    with served("0.0.0.0:0") as open_server:
        connection = HTTPConnection(host, open_server.address.port, timeout=PATIENCE_SECONDS)
        connection.request("GET", "/hello", headers={"Host": "localhost"})
        assert json.loads(connection.getresponse().read()) == {"from_here": False}
        connection.close()


def test_who_listens_everywhere_is_found_here() -> None:
    with served("0.0.0.0:0") as open_server:
        assert ask(open_server.address, "/hello") == (200, {"from_here": True})


def test_ipv6_is_served() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with served("[::1]:0") as server:
        assert ask(server.address, "/hello") == (200, {"from_here": True})


def test_unix_socket_is_served_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with served(f"unix:{path}") as server:
        assert ask(server.address, "/hello") == (200, {"from_here": True})
    assert not path.exists()


def test_closing_leaves_a_socket_that_another_has_put_there(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with served(f"unix:{path}"):
        path.unlink()
        with Address(path=str(path)).listen():
            pass
        successor = path.stat().st_ino
    assert path.stat().st_ino == successor


def test_closed_server_can_be_followed_at_once() -> None:
    with served(f"127.0.0.1:{free_port()}") as first:  # a port that nobody else gets in between
        assert ask(first.address, "/hello")[0] == 200
    with served(str(first.address)) as second:
        assert ask(second.address, "/hello")[0] == 200


# One runner


class Stage:
    """A runner with a job that waits at a gate, and its answers."""

    def __init__(self, database: Database, handle: RunnerHandle, address: Address, begin: Any) -> None:
        self.database = database
        self.handle = handle
        self.address = address
        self.begin = begin

    def ask(self, path: str) -> tuple[int, Any]:
        return ask(self.address, path)


@pytest.fixture
def stage(database_url: str) -> Iterator[Stage]:
    with application(database_url) as database:
        gate, began = threading.Event(), threading.Event()

        @greenjobs.job(queue="gates")
        def wait_at_gate(secret: str) -> None:
            began.set()
            gate.wait(PATIENCE_SECONDS)

        def begin() -> int:
            id = wait_at_gate.delay("hunter2").id
            assert began.wait(PATIENCE_SECONDS)
            return int(id)

        runner = Runner().register(wait_at_gate)
        with started(runner) as handle, health.serving(handle, "127.0.0.1:0") as server:
            assert server is not None
            try:
                yield Stage(database, handle, server.address, begin)
            finally:
                gate.set()


def test_runner_is_alive_and_ready(stage: Stage) -> None:
    status, document = stage.ask("/livez")
    assert status == 200 and document["alive"] is True and document["pid"] == os.getpid()
    assert 0 <= document["lag_seconds"] <= document["worst_lag_seconds"]
    assert (document["running_jobs"], document["finished_jobs"]) == (0, 0)
    status, document = stage.ask("/readyz")
    assert (status, document["ready"], document["reasons"]) == (200, True, [])


def test_lag_is_what_a_job_has_held_the_loop_for(stage: Stage) -> None:
    stage.ask("/livez")
    held_until = time.monotonic() + 1.5
    while time.monotonic() < held_until:
        pass

    def lag() -> bool:
        return bool(stage.ask("/livez")[1]["worst_lag_seconds"] > 0.8)

    eventually(lag, "a lag of about a second", seconds=PATIENCE_SECONDS)


def test_running_jobs_are_shown_with_their_stacks_and_without_their_arguments(stage: Stage) -> None:
    id = stage.begin()
    status, document = stage.ask("/jobs")
    assert status == 200
    [running] = document["jobs"]
    assert running["id"] == id
    assert (running["queue"], running["attempt"], running["executor"]) == ("gates", 1, "greenlet")
    assert running["job_type"].endswith("wait_at_gate")
    assert running["running_seconds"] >= 0
    assert any(f"{__file__}:" in frame and frame.endswith(" wait_at_gate") for frame in running["stack"])
    assert "hunter2" not in json.dumps(document)


def test_jobs_are_not_for_those_who_are_elsewhere(stage: Stage) -> None:
    answer = requests.get(f"http://{stage.address}/jobs", headers={"Host": "evil.example.org"}, timeout=30)
    assert answer.status_code == 403
    assert "kubectl port-forward" in answer.json()["error"]


def test_runner_without_a_session_is_not_ready(stage: Stage) -> None:
    id = stage.handle.runner_id
    stage.handle.session_ended()
    status, document = stage.ask("/readyz")
    assert (status, document["ready"]) == (503, False)
    assert document["reasons"] == ["it has no session with the database, so it claims nothing"]
    assert id is not None
    stage.handle.session_began(id)
    assert stage.ask("/readyz")[0] == 200


def test_runner_that_drains_is_alive_and_not_ready(stage: Stage) -> None:
    stage.begin()
    stage.handle.shutdown()
    assert stage.ask("/livez")[0] == 200
    status, document = stage.ask("/readyz")
    assert status == 503
    assert document["reasons"] == ["it is draining: it was told to stop, and claims no more"]


def test_database_that_lacks_a_migration_makes_it_not_ready(stage: Stage) -> None:
    last = migrate.load()[-1]
    stage.database.rows("DELETE FROM background_migrations WHERE version = %s", last.version)
    assert wait_for_status(stage.address, "/readyz", 503)["reasons"] == [
        f"the database lacks {last.label}; type `greenjobs migrate`"
    ]


def test_database_without_the_tables_makes_it_not_ready(stage: Stage) -> None:
    stage.database.rows("ALTER TABLE background_migrations RENAME TO moved")
    [reason] = wait_for_status(stage.address, "/readyz", 503)["reasons"]
    assert reason.startswith("the database lacks 0001_background_jobs, ")


def test_database_of_a_later_release_leaves_it_ready(stage: Stage) -> None:
    """While a release is rolled out, the former one runs on."""
    stage.database.rows("INSERT INTO background_migrations (version, name, checksum) VALUES (9999, 'later', '')")
    stage.database.rows("DELETE FROM background_migrations WHERE version = 1")
    wait_for_status(stage.address, "/readyz", 503)  # so it has looked since
    stage.database.rows("INSERT INTO background_migrations (version, name, checksum) VALUES (1, '', '')")
    wait_for_status(stage.address, "/readyz", 200)


def test_database_that_needs_a_later_release_makes_it_not_ready(stage: Stage) -> None:
    stage.database.rows("INSERT INTO background_migrations (version, name, checksum, needs) VALUES (9999, 'x', '', 99)")
    [reason] = wait_for_status(stage.address, "/readyz", 503)["reasons"]
    assert "works only with those that know migration 0099" in reason


def test_database_that_does_not_answer_is_asked_once_whoever_probes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "DATABASE_SECONDS", 1.0)
    other = psycopg2.connect(stage.database.url)
    with other.cursor() as cursor:
        cursor.execute("LOCK TABLE background_migrations IN ACCESS EXCLUSIVE MODE")
    answers: list[tuple[int, Any]] = []
    probes = [threading.Thread(target=lambda: answers.append(stage.ask("/readyz"))) for _ in range(10)]
    for probe in probes:
        probe.start()
    for probe in probes:
        probe.join()
    assert {status for status, _ in answers} == {503}
    [reason] = answers[0][1]["reasons"]
    assert reason.startswith("the database has not answered for ")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    assert stage.database.value(waiting) == 1
    other.rollback()
    other.close()
    wait_for_status(stage.address, "/readyz", 200)


def test_database_that_is_gone_is_named(stage: Stage) -> None:
    stage.handle._service.pool.database_url = "postgresql://nobody@127.0.0.1:1/nowhere"
    stage.handle._service.pool.close()
    [reason] = wait_for_status(stage.address, "/readyz", 503)["reasons"]
    assert reason.startswith("the database does not answer: cannot connect to ")
    stage.handle._service.pool.database_url = stage.database.url
    wait_for_status(stage.address, "/readyz", 200)


METRICS_MODULE = "greenjobs.contrib.prometheus"


def test_metrics_without_their_package_say_how_to_get_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, METRICS_MODULE, None)
    status, document = stage.ask("/metrics")
    assert (status, document) == (501, {"error": health.METRICS_HINT})


def test_metrics_are_passed_on_as_they_are(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(METRICS_MODULE)
    module.render = lambda: ("text/plain; version=1.0.0", b"jobs 3\n")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, METRICS_MODULE, module)
    assert fetch(stage.address, "/metrics", timeout=30) == (200, "text/plain; version=1.0.0", b"jobs 3\n")


def test_openness_is_warned_of(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with health.serving(stage.handle, "0.0.0.0:0") as server:
        assert server is not None and ask(server.address, "/readyz")[0] == 200
    assert f"http is {server.address}: whoever reaches that reads" in caplog.text


# `greenjobs run --http`

APPLICATION = f"""
    import os, time
    import gevent.monkey
    from greenjobs import health, job

    health.DATABASE_SECONDS = {PATIENCE_SECONDS}

    @job
    def wait_at_gate():
        while not os.path.exists("gate"):
            time.sleep(0.01)

    @job
    def hold_the_event_loop():
        while not os.path.exists("gate"):
            gevent.monkey.get_original("time", "sleep")(0.01)
"""


def test_command_answers_from_start_to_end(tmp_path: Path, database_url: str) -> None:
    write_application(tmp_path, APPLICATION)
    with start("greenjobs", "run", "--http", "0", folder=tmp_path, database_url=database_url) as runner:
        address = runner.wait_for_line(r"greenjobs\.cli: http: (127\.0\.0\.1:\d+)$")[1]
        wait_for_status(address, "/readyz", 200)

        where = ("--http", address, "--timeout", "60")
        for question in ("livez", "readyz", "jobs"):
            assert run("greenjobs", "health", question, *where, folder=tmp_path).startswith("{")
        named = {"GREENJOBS_HTTP": address}
        assert json.loads(run("greenjobs", "health", *where[2:], folder=tmp_path, environment=named))["alive"]

        with (
            contextlib.closing(psycopg2.connect(database_url)) as connection,
            connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("INSERT INTO background_jobs (job_type, data) VALUES ('wait_at_gate', '{}')")
        eventually(lambda: ask(address, "/jobs")[1]["jobs"], "the job runs", seconds=PATIENCE_SECONDS)
        runner.terminate()
        wait_for_status(address, "/readyz", 503)
        assert "draining" in run("greenjobs", "health", "readyz", *where, folder=tmp_path, status=1)
        assert ask(address, "/livez")[0] == 200
        (tmp_path / "gate").touch()
        assert runner.wait() == 0
    assert "nobody answers at" in run("greenjobs", "health", *where, folder=tmp_path, status=1)


@pytest.mark.parametrize("more", [(), ("--processes", "2")], ids=["a runner", "a supervisor"])
def test_command_ends_at_once_where_the_port_is_in_use(tmp_path: Path, database_url: str, more: Any) -> None:
    write_application(tmp_path, APPLICATION)
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = ("greenjobs", "run", "--http", str(other.getsockname()[1]), *more)
        output = run(*words, folder=tmp_path, database_url=database_url, status=2)
    assert output.splitlines()[-1].startswith("greenjobs: http is 127.0.0.1:")
    assert "is starting" not in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("livez",), "it is not known where the runner answers"),
        (("--http", "0"), "name the port that the runner got"),
        (("--http", "x"), "http is 'x'"),
        (("weather", "--http", "1"), "'weather' is not one of"),
    ],
)
def test_command_that_cannot_ask_says_why(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in run("greenjobs", "health", *arguments, folder=tmp_path, status=2)


def test_server_that_speaks_no_http_is_nobody(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            connection.sendall(b"220 mail.example.org\r\n")
            connection.close()

        threading.Thread(target=answer).start()
        words = ("greenjobs", "health", "--http", str(other.getsockname()[1]))
        assert "nobody answers" in run(*words, folder=tmp_path, status=1)


# A supervisor


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, of a short name, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def answering_fleet(
    folder: Path, database_url: str, temporary: Path, *arguments: str, **more: Any
) -> Iterator[tuple[Fleet, str]]:
    """A fleet, all of which is up, and its address."""
    address = f"127.0.0.1:{free_port()}"
    environment = {"TMPDIR": str(temporary)}
    with fleet(folder, database_url, "--http", address, *arguments, environment=environment, **more) as started:
        wait_for_status(address, "/readyz", 200)
        yield started, address


def pids(document: Any, **wanted: Any) -> set[int]:
    rows = document["processes"]
    return {row["pid"] for row in rows if all(row.get(key) == value for key, value in wanted.items())}


FLEET_APPLICATION = f"""
import sys, types
from greenjobs import health
health.DATABASE_SECONDS = {PATIENCE_SECONDS}
module = types.ModuleType("greenjobs.contrib.prometheus")
module.render = lambda: ("text/plain", str(os.getpid()).encode())
module.watch = lambda handle: types.SimpleNamespace(stop=lambda: None)
sys.modules["greenjobs.contrib.prometheus"] = module
"""


# What `greenjobs run` is, but for how long it waits for its processes.
PATIENT = f"""
from greenjobs import supervisor, supervisor_http
supervisor._ANSWER_SECONDS = supervisor_http.CHILD_SECONDS = {PATIENCE_SECONDS}
from greenjobs.__main__ import main
main()
"""


def write_fleet_application(folder: Path) -> None:
    write_application(folder, textwrap.dedent(FLEET) + FLEET_APPLICATION)


def test_fleet_answers_at_one_address_through_death_reload_and_drain(
    tmp_path: Path, database_url: str, temporary: Path
) -> None:
    """One story, for processes are dear: each step is a promise of docs/operations.md."""
    write_fleet_application(tmp_path)
    command = ("python", "-c", PATIENT)
    with answering_fleet(tmp_path, database_url, temporary, "--processes", "2", command=command) as (several, address):
        # Ready means: each of the two.
        status, document = ask(address, "/livez")
        assert status == 200 and pids(document, state="up", answers=True) == set(several.children)

        # Jobs of all, with their processes.
        several.enqueue("wait_at_gate", 2)
        several.wait_for_entries("old began", 2)
        jobs = ask(address, "/jobs")[1]["jobs"]
        assert {job["pid"] for job in jobs} == set(several.children)
        assert all(any(frame.endswith(" wait_at_gate") for frame in job["stack"]) for job in jobs)

        # Metrics are what one of them says.
        status, content_type, body = fetch(Address.parse(address), "/metrics", timeout=PATIENCE_SECONDS)
        assert (status, content_type) == (200, "text/plain") and int(body) in several.children

        # What they say among themselves is for nobody else.
        [folder] = temporary.glob("greenjobs-http-*")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

        # A death makes it not ready until there is another.
        victim = several.children[0]
        os.kill(victim, signal.SIGKILL)
        several.process.wait_for_line(f"process {victim} was ended by SIGKILL")
        document = wait_for_status(address, "/readyz", 200)
        assert victim not in pids(document) and len(pids(document, ready=True)) == 2

        # A reload leaves it ready, and those who leave are shown while they do.
        former = pids(document)
        several.process.send(signal.SIGHUP)
        seen: list[int] = []

        def is_renewed() -> bool:
            status, document = ask(address, "/readyz")
            seen.append(status)
            return len(pids(document, ready=True) - former) == 2

        eventually(is_renewed, "two processes of the new code are ready", seconds=60)
        assert set(seen) == {200}
        leaving = pids(ask(address, "/livez")[1], state="leaving")
        assert leaving and leaving <= former
        assert {job["pid"] for job in ask(address, "/jobs")[1]["jobs"]} & leaving

        # Draining is not ready, and lives.
        several.process.terminate()
        assert "it is draining: it was told to stop" in wait_for_status(address, "/readyz", 503)["reasons"]
        assert ask(address, "/livez")[0] == 200
        several.open_gate()
        assert several.process.wait() == 0
    assert list(temporary.iterdir()) == []


def test_fleet_lives_while_one_process_answers_and_not_when_none_does(
    tmp_path: Path, database_url: str, temporary: Path
) -> None:
    with answering_fleet(tmp_path, database_url, temporary, "--processes", "2") as (held, address):
        held.enqueue("hold_the_event_loop")
        [(_, _, stuck)] = held.wait_for_entries("began", 1)
        reason = f"process {stuck}: it has not answered within {supervisor_http.CHILD_SECONDS:g} s"

        def is_so(path: str, wanted: int, look: Callable[[Any], Any], expected: Any) -> None:
            # On a busy machine the other process may be late for once, too.
            eventually(
                lambda: look(wait_for_status(address, path, wanted)) == expected, f"{path} is not so", seconds=60
            )

        is_so("/livez", 200, lambda document: pids(document, answers=False), {stuck})
        is_so("/readyz", 503, lambda document: document["reasons"], [reason])
        is_so("/jobs", 200, lambda document: document["unanswered"], [stuck])
        assert fetch(Address.parse(address), "/metrics", timeout=PATIENCE_SECONDS)[0] in (200, 501)
        held.enqueue("hold_the_event_loop")
        held.wait_for_entries("began", 2)
        document = wait_for_status(address, "/livez", 503)
        assert document["reasons"] == ["no process answers: their event loops are held"]


def test_killed_supervisor_leaves_nothing_bound_and_its_folder_to_the_next(
    tmp_path: Path, database_url: str, temporary: Path
) -> None:
    with answering_fleet(tmp_path, database_url, temporary, "--max-jobs", "1000") as (orphaned, address):
        [folder] = temporary.glob("greenjobs-http-*")
        orphaned.process.kill()
        orphaned.wait_until_gone(orphaned.children)
        Address.parse(address).listen().close()
        assert folder.exists()
        front = make_front(temporary)
        assert not folder.exists()
        front.close()
        assert list(temporary.glob("greenjobs-http-*")) == []


def make_front(parent: Path) -> supervisor_http.Front:
    former, tempfile.tempdir = tempfile.tempdir, str(parent)
    try:
        return supervisor_http.Front(Address(), lambda: None)
    finally:
        tempfile.tempdir = former


def test_folder_of_a_supervisor_that_lives_is_left_alone(temporary: Path) -> None:
    first, second = make_front(temporary), make_front(temporary)
    assert len(list(temporary.glob("greenjobs-http-*"))) == 2
    first.close()
    second.close()


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/jobs", "/metrics"])
def test_supervisor_whose_loop_stands_still_is_unavailable(temporary: Path, path: str) -> None:
    front = make_front(temporary)
    try:
        assert ask(front.address, path)[0] == 503
    finally:
        front.close()
