"""The commands as they are typed: what they print, what they exit with, and what they say to bad input."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import databases
import gevent
import processes
import psycopg2
import pytest
import running
from click.testing import CliRunner
from waiting import eventually

import greenjobs
from greenjobs.cli import main

Invoke = Callable[..., tuple[int, str]]

APPLICATION = """
    import time
    from greenjobs import job

    @job
    def work(number=0):
        print(f"worked on {number}", flush=True)

    @job(queue="emails")
    def send(to):
        print(f"sent to {to}", flush=True)

    @job(queue="slow")
    def dawdle():
        print("began", flush=True)
        import os
        while not os.path.exists("gate"):
            time.sleep(0.01)
        print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing but rows behind."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    database = running.Database(shared_url)
    yield database
    database.rows("TRUNCATE background_jobs, background_runners, background_waiting, background_counts")
    database.connection.close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    processes.write_application(tmp_path, APPLICATION)
    return tmp_path


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, str]]]:
    """Type a command in the folder of the test, here in this process: a new one takes a second. Status and output.

    Not for a command that goes well and runs jobs, because it handles signals.
    """
    modules, path = set(sys.modules), list(sys.path)
    registry = running._job_module._registry  # type: ignore[attr-defined]
    declared = dict(registry)
    monkeypatch.chdir(tmp_path)
    for name in ("GREENJOBS_DATABASE_URL", "DATABASE_URL", "GREENJOBS_APP", "FLASK_APP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", path)
    # Which other tests have loaded, and a new process has not.
    monkeypatch.delitem(sys.modules, "greenjobs.contrib.flask", raising=False)

    def invoke(*arguments: str, database_url: str = "") -> tuple[int, str]:
        monkeypatch.setenv("GREENJOBS_DATABASE_URL", database_url)
        with running.application(database_url) if database_url else contextlib.nullcontext():
            result = CliRunner().invoke(main, arguments, prog_name="greenjobs", catch_exceptions=False)
        return result.exit_code, result.output

    yield invoke
    greenjobs.configure()
    registry.clear()
    registry.update(declared)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def _insert(database: running.Database, job_type: str, data: str = "{}", queue: str = "default") -> None:
    database.rows("INSERT INTO background_jobs (job_type, data, queue) VALUES (%s, %s, %s)", job_type, data, queue)


def _refused(result: tuple[int, str]) -> str:
    """The one line in which bad input is refused."""
    status, output = result
    assert status == 2
    assert "Traceback" not in output
    (line,) = output.splitlines()
    assert line.startswith("greenjobs: ")
    return line


# --- run --------------------------------------------------------------------------------------------------------------


def test_run_until_empty_runs_what_waits_and_ends(project: Path, database: running.Database) -> None:
    _insert(database, "work", '{"number": 5}')
    _insert(database, "send", '{"to": "ann"}', "emails")

    output = processes.run("greenjobs", "run", "--until-empty", folder=project, database_url=database.url)

    assert "worked on 5" in output and "sent to ann" in output
    assert database.count() == 0


def test_banner_says_database_queues_pools_jobs_and_version(project: Path, database: running.Database) -> None:
    url = _with_password(database.url)

    output = processes.run("greenjobs", "run", "--until-empty", "--pool", "7", folder=project, database_url=url)

    assert f"greenjobs {greenjobs.__version__}, Python 3." in output
    assert re.search(r"database: \S+", output)
    assert "queues: default (7 at a time), emails (7 at a time), slow (7 at a time)" in output
    assert "jobs: dawdle, send, work" in output
    assert "hunter2" not in output


def _with_password(url: str) -> str:
    from psycopg2 import extensions

    return str(extensions.make_dsn(url, password="hunter2"))


def test_queues_can_be_given_with_pools_and_intervals(project: Path, database: running.Database) -> None:
    output = processes.run(
        *("greenjobs", "run", "--until-empty", "--queue", "emails:20", "--queue", "slow:5:poll=30"),
        *("--queue", "other:poll=0.5", "--queue", "plain"),
        folder=project,
        database_url=database.url,
    )

    assert "queues: emails (20 at a time), slow (5 at a time), other (50 at a time), plain (50 at a time)" in output
    ((queues,),) = database.rows("SELECT queues FROM background_runners")
    assert (queues["slow"]["poll_interval"], queues["other"]["poll_interval"]) == (30, 0.5)


@pytest.mark.parametrize(
    "queue",
    [
        "",
        ":5",
        "emails:",
        "emails::",
        "emails:many",
        "emails:0",
        "emails:-1",
        "emails:1.5",
        "emails:5:6",
        "emails:99999",
        "emails:poll=",
        "emails:poll=soon",
        "emails:poll=0",
        "emails:poll=-1",
        "emails:poll=nan",
        "emails:5:poll=1:poll=2",
        "emails:5:wait=1",
        "two words:5",
    ],
)
def test_wrong_queue_is_refused(invoke: Invoke, project: Path, database: running.Database, queue: str) -> None:
    line = _refused(invoke("run", "--queue", queue, database_url=database.url))

    assert re.search("queue|pool|poll_interval", line)


def test_queue_given_twice_is_refused(invoke: Invoke, project: Path, database: running.Database) -> None:
    line = _refused(invoke("run", "--queue", "emails:5", "--queue", "emails:7", database_url=database.url))

    assert "'emails' is given twice" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--pool", "0"),
        ("--pool", "many"),
        ("--poll-interval", "0"),
        ("--max-retries", "-1"),
        ("--default-queue", "two words"),
        ("--log-level", "LOUD"),
        ("--database-url", "mysql://here/shop"),
    ],
)
def test_wrong_setting_is_refused_with_option_and_value(
    invoke: Invoke, project: Path, database: running.Database, option: str, value: str
) -> None:
    line = _refused(invoke("run", option, value, database_url=database.url))

    assert option.removeprefix("--").replace("-", "_") in line
    assert value in line


def test_wrong_pool_of_a_queue_names_the_queue(invoke: Invoke, project: Path, database: running.Database) -> None:
    line = _refused(invoke("run", "--queue", "emails:0", database_url=database.url))

    assert line.startswith("greenjobs: the queue 'emails': pool is '0'")


@pytest.mark.parametrize("options", [[], ["--processes", "1"]])
def test_runner_whose_standard_streams_are_closed_runs(
    project: Path, database: running.Database, options: list[str]
) -> None:
    """As some start daemons. What the job writes to where standard error was goes nowhere, and not to the database."""
    processes.write_application(
        project,
        """
        import os
        from greenjobs import job

        @job
        def work():
            print("said")
            for number in (1, 2):
                os.write(number, b"said" * 1000)
        """,
    )
    _insert(database, "work")

    command = " ".join(["exec greenjobs run --until-empty", *options, "<&- >&- 2>&-"])
    assert processes.run("sh", "-c", command, folder=project, database_url=database.url) == ""
    assert database.count() == 0


def test_run_without_a_database_says_the_three_ways_to_name_one(invoke: Invoke, project: Path) -> None:
    line = _refused(invoke("run"))

    assert all(way in line for way in ("--database-url", "GREENJOBS_DATABASE_URL", "setup.cfg", "embedded:"))


def test_run_without_its_server_says_so_without_the_password(invoke: Invoke, project: Path) -> None:
    url = f"postgresql://ann:hunter2@127.0.0.1:{processes.free_port()}/shop"

    line = _refused(invoke("run", "--database-url", url))

    assert "cannot connect to postgresql://ann:***@127.0.0.1" in line
    assert "; Is the server running" in line  # libpq says that in a line of its own
    assert "hunter2" not in line


def test_application_is_found_by_option(tmp_path: Path, database: running.Database) -> None:
    processes.write_application(tmp_path, APPLICATION, name="tasks.py")

    output = processes.run(
        "greenjobs", "run", "--until-empty", "--app", "tasks", folder=tmp_path, database_url=database.url
    )

    assert "jobs: dawdle, send, work" in output


@pytest.mark.parametrize("variable", ["GREENJOBS_APP", "FLASK_APP"])
def test_application_is_found_by_environment(tmp_path: Path, database: running.Database, variable: str) -> None:
    processes.write_application(tmp_path, APPLICATION, name="tasks.py")

    output = processes.run(
        *("greenjobs", "run", "--until-empty"),
        folder=tmp_path,
        database_url=database.url,
        environment={variable: "tasks.py"},
    )

    assert "jobs: dawdle, send, work" in output


def test_jobs_that_a_factory_declares_are_found_and_get_what_it_made(
    tmp_path: Path, database: running.Database
) -> None:
    processes.write_application(
        tmp_path,
        """
        def create_app(name):
            from greenjobs import current_job, job

            @job
            def work():
                print("context:", current_job.context, flush=True)

            return f"the application {name}"
        """,
        name="shop.py",
    )
    _insert(database, "work")

    output = processes.run(
        *("greenjobs", "run", "--until-empty", "--app", "shop:create_app('x')"),
        folder=tmp_path,
        database_url=database.url,
    )

    assert "context: the application x" in output


def test_missing_application_is_refused(invoke: Invoke, database: running.Database) -> None:
    assert "no wsgi.py or app.py" in _refused(invoke("run", database_url=database.url))


def test_missing_module_is_refused(invoke: Invoke, database: running.Database) -> None:
    line = _refused(invoke("run", "--app", "no_such_module", database_url=database.url))

    assert "no module 'no_such_module'" in line


def test_traceback_of_an_application_that_cannot_be_imported_is_shown(
    tmp_path: Path, database: running.Database
) -> None:
    processes.write_application(tmp_path, "import a_module_that_is_missing")

    output = processes.run("greenjobs", "run", folder=tmp_path, database_url=database.url, status=2)

    assert "Traceback" in output
    assert 'app.py", line 1' in output
    assert "No module named 'a_module_that_is_missing'" in output
    assert output.splitlines()[-1] == "greenjobs: app is 'app.py', and it cannot be loaded: see above"


def test_job_that_is_declared_wrongly_is_named(invoke: Invoke, tmp_path: Path, database: running.Database) -> None:
    processes.write_application(
        tmp_path,
        """
        from greenjobs import job

        @job(priority=99999)
        def send_email(): ...
        """,
    )

    assert "send_email: priority is 99999" in _refused(invoke("run", database_url=database.url))


def test_application_without_jobs_is_refused(invoke: Invoke, tmp_path: Path, database: running.Database) -> None:
    processes.write_application(tmp_path, "nothing = True")

    assert "declares no jobs" in _refused(invoke("run", database_url=database.url))


def test_modules_of_the_application_are_patched_before_they_are_imported(
    tmp_path: Path, database: running.Database
) -> None:
    processes.write_application(
        tmp_path,
        """
        from socket import socket
        from time import sleep
        from greenjobs import job
        import psycopg2.extensions

        print("patched:", "gevent" in socket.__module__, sleep.__module__, flush=True)
        print("psycopg2:", psycopg2.extensions.get_wait_callback() is not None, flush=True)

        @job
        def work(): ...
        """,
    )

    output = processes.run("greenjobs", "run", "--until-empty", folder=tmp_path, database_url=database.url)

    assert "patched: True gevent.hub" in output
    assert "psycopg2: True" in output


def test_module_can_be_run_in_place_of_the_command(project: Path, database: running.Database) -> None:
    _insert(database, "work", '{"number": 5}')

    output = processes.run(
        "python", "-m", "greenjobs", "run", "--until-empty", folder=project, database_url=database.url
    )

    assert "worked on 5" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_finish_what_runs_and_ends_well(
    project: Path, database: running.Database, number: signal.Signals
) -> None:
    _insert(database, "dawdle", queue="slow")
    with processes.runner(project, database.url) as runner:
        runner.wait_for_line("^began$")
        runner.send(number)
        runner.wait_for_line("claims no more; 1 jobs are still running")
        (project / "gate").touch()

        assert runner.wait() == 0
        assert "ended" in runner.output
        assert "Traceback" not in runner.output
    assert database.count() == 0


def test_signal_ends_an_idle_runner(project: Path, database: running.Database) -> None:
    with processes.runner(project, database.url) as runner:
        runner.send(signal.SIGINT)

        assert runner.wait() == 0
        assert "Traceback" not in runner.output


def test_killed_runners_job_is_run_by_another(project: Path, database: running.Database) -> None:
    _insert(database, "dawdle", queue="slow")
    with processes.runner(project, database.url) as victim:
        victim.wait_for_line("^began$")
        with processes.runner(project, database.url) as other:
            victim.kill()
            other.wait_for_line("^began$")
            (project / "gate").touch()
            other.wait_for_line("^ended$")
    assert database.count() == 0


# --- migrate ----------------------------------------------------------------------------------------------------------


def test_migrate_says_what_it_applied_and_then_that_there_is_nothing(invoke: Invoke, empty_database_url: str) -> None:
    status, output = invoke("migrate", database_url=empty_database_url)

    assert (status, output.splitlines()[0]) == (0, "applied 0001_background_jobs")
    assert invoke("migrate", database_url=empty_database_url) == (0, "up to date\n")


def test_check_exits_with_1_until_the_tables_are_there(invoke: Invoke, empty_database_url: str) -> None:
    status, output = invoke("migrate", "--check", database_url=empty_database_url)

    assert (status, output.splitlines()[0]) == (1, "missing: 0001_background_jobs")
    invoke("migrate", database_url=empty_database_url)
    assert invoke("migrate", "--check", database_url=empty_database_url) == (0, "up to date\n")


@pytest.fixture
def later_release(database: running.Database) -> Iterator[None]:
    """One has been here."""
    database.rows("INSERT INTO background_migrations (version, name, checksum) VALUES (9999, 'later', 'x')")
    yield
    database.rows("DELETE FROM background_migrations WHERE version = 9999")


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_migrate_has_nothing_to_do_where_a_later_release_has_been(
    invoke: Invoke, database: running.Database, later_release: None, options: list[str]
) -> None:
    said = "nothing to do: a later release has applied 9999_later, and this one works with that\n"
    assert invoke("migrate", *options, database_url=database.url) == (0, said)

    database.rows("UPDATE background_migrations SET needs = 9999 WHERE version = 9999")
    line = _refused(invoke("migrate", *options, database_url=database.url))
    assert re.search(r"know migration 9999, and .*; install that release, or a later one", line)


def test_check_and_sql_contradict_each_other(invoke: Invoke) -> None:
    assert "leave one out" in _refused(invoke("migrate", "--check", "--sql"))


def test_sql_is_printed_without_a_database(invoke: Invoke) -> None:
    status, output = invoke("migrate", "--sql")

    assert status == 0
    assert "CREATE TABLE IF NOT EXISTS background_jobs" in output


def test_run_on_an_unmigrated_database_says_what_to_type(
    invoke: Invoke, project: Path, empty_database_url: str
) -> None:
    line = _refused(invoke("run", database_url=empty_database_url))

    assert "`greenjobs migrate`" in line and "`greenjobs run --migrate`" in line


def test_run_migrate_brings_the_tables_and_runs(project: Path, empty_database_url: str) -> None:
    output = processes.run(
        "greenjobs", "run", "--migrate", "--until-empty", folder=project, database_url=empty_database_url
    )

    assert "applied 0001_background_jobs" in output
    assert "stopped" in output


# --- status -----------------------------------------------------------------------------------------------------------


def test_status_of_an_empty_database(invoke: Invoke, database: running.Database) -> None:
    status, output = invoke("status", database_url=database.url)

    assert status == 0
    assert output.splitlines()[0].split()[:5] == ["queue", "available", "running", "scheduled", "failed"]
    assert "no live runners" in output


def test_status_counts_by_queue_and_state(invoke: Invoke, database: running.Database) -> None:
    for _ in range(3):
        _insert(database, "work")
    _insert(database, "send", queue="emails")
    database.rows("UPDATE background_jobs SET run_at = now() - interval '90 seconds', created_at = '2020-01-01'")
    database.rows("UPDATE background_jobs SET state = 'failed' WHERE queue = 'emails'")
    database.rows("INSERT INTO background_jobs (job_type, data) VALUES ('homeless', '{}')")

    _, output = invoke("status", database_url=database.url)

    rows = {line.split("  ")[0]: line.split() for line in output.splitlines()[1:] if line}
    assert rows["default"][1:5] == ["3", "0", "0", "0"]
    assert re.fullmatch(r"9\d\.\d", rows["default"][5])
    assert rows["emails"][1:] == ["0", "0", "0", "1"]
    assert "(none yet)" in rows


def test_status_shows_live_runners(project: Path, database: running.Database) -> None:
    with processes.runner(project, database.url, "--queue", "emails:5") as runner:
        output = processes.run("greenjobs", "status", folder=project, database_url=database.url)

        assert re.search(rf"runner \d+: \S+:{runner.pid}, since .*, serves emails \(5\)", output)


def test_status_leaves_dead_runners_out(project: Path, database: running.Database) -> None:
    with processes.runner(project, database.url) as runner:
        runner.kill()
        eventually(lambda: "greenjobs session" not in database.sessions(), "its session did not end")

    assert "no live runners" in processes.run("greenjobs", "status", folder=project, database_url=database.url)


def test_status_says_that_a_later_release_has_been_here(
    invoke: Invoke, database: running.Database, later_release: None
) -> None:
    _, output = invoke("status", database_url=database.url)
    _, document = invoke("status", "--json", database_url=database.url)

    assert output.splitlines()[-1] == "a later release has applied 9999_later; this one works with that"
    assert json.loads(document)["later_migrations"] == ["9999_later"]


@pytest.mark.parametrize("command", ["status", "queues", "schedules", "counts"])
def test_names_of_others_do_not_steer_the_terminal(invoke: Invoke, database: running.Database, command: str) -> None:
    """Whoever may enqueue by SQL may write any."""
    evil = "red\x1b[31m\nqueue"
    rows = {
        "background_jobs (job_type, data, queue) VALUES (%s, '{}', %s)": (evil, evil),
        "background_queues (name, paused) VALUES (%s, true)": (evil,),
        "background_counts (minute, queue, job_type) VALUES (date_trunc('minute', now()), %s, %s)": (evil, evil),
        "background_schedules (name, job_type, cron, timezone, source, next_tick_at)"
        " VALUES (%s, %s, '* * * * *', 'UTC', 'api', now())": (evil, evil),
    }
    try:
        for into, values in rows.items():
            database.rows(f"INSERT INTO {into}", *values)
        status, output = invoke(command, database_url=database.url)
    finally:
        database.rows("TRUNCATE background_schedules, background_queues")

    assert status == 0
    assert "\x1b" not in output
    assert "red\\x1b[31m queue" in output


def test_name_that_the_terminal_cannot_print_is_shown_by_number(
    invoke: Invoke, database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _insert(database, "work", queue="snow\u2603")
    monkeypatch.setenv("GREENJOBS_DATABASE_URL", database.url)
    with running.application(database.url):
        result = CliRunner(charset="latin-1").invoke(main, ["status"], catch_exceptions=False)

    assert "snow\\u2603" in result.output


def test_look_at_many_rows_may_take_longer_than_an_enqueue(
    invoke: Invoke, database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody holds the table until the statement of an enqueue would long have been ended."""
    monkeypatch.setenv("GREENJOBS_ENQUEUE_TIMEOUT", "2")  # in which it has to connect as well
    looks = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'greenjobs'"
        " AND wait_event_type = 'Lock' AND query_start < clock_timestamp() - interval '2.2 s'"
    )
    with contextlib.closing(psycopg2.connect(database.url)) as holder:
        with holder.cursor() as cursor:
            cursor.execute("LOCK TABLE background_jobs")
        looking = gevent.spawn(invoke, "status", database_url=database.url)
        eventually(
            lambda: looking.ready() or database.rows(looks), "it does not look", seconds=running.PATIENCE_SECONDS
        )
    status, output = looking.get(timeout=running.PATIENCE_SECONDS)

    assert (status, output.split()[0]) == (0, "queue")


@pytest.mark.parametrize("group", ["queues", "schedules"])
def test_list_is_what_the_group_shows_by_itself(invoke: Invoke, database: running.Database, group: str) -> None:
    _insert(database, "work")
    shown, document = invoke(group, database_url=database.url), invoke(group, "--json", database_url=database.url)

    assert invoke(group, "list", database_url=database.url) == shown
    assert invoke(group, "list", "--json", database_url=database.url) == document
    assert invoke(group, "--json", "list", database_url=database.url) == document
    assert isinstance(json.loads(document[1]), list)


def test_status_as_json(project: Path, database: running.Database) -> None:
    _insert(database, "work", queue="elsewhere")
    with processes.runner(project, database.url, "--queue", "emails:5") as runner:
        output = processes.run("greenjobs", "status", "--json", folder=project, database_url=database.url)

        document = json.loads(output)
        ((queue,), (alive,)) = (document["queues"], document["runners"])
        assert (queue["queue"], queue["available"], queue["running"]) == ("elsewhere", 1, 0)
        assert queue["oldest_waiting_seconds"] >= 0
        assert (alive["pid"], alive["queues"]["emails"]["pool"]) == (runner.pid, 5)


def test_status_on_an_unmigrated_database_says_what_to_type(invoke: Invoke, empty_database_url: str) -> None:
    assert "`greenjobs migrate`" in _refused(invoke("status", database_url=empty_database_url))


# --- the command itself -----------------------------------------------------------------------------------------------


def test_version(invoke: Invoke) -> None:
    assert invoke("--version") == (0, f"greenjobs, version {greenjobs.__version__}\n")


@pytest.mark.parametrize("arguments", [["fly"], ["run", "--fly"], ["run", "--pool"], ["status", "extra"]], ids=" ".join)
def test_wrong_command_line_is_refused(invoke: Invoke, arguments: list[str]) -> None:
    status, output = invoke(*arguments)

    assert status == 2
    assert "Error: " in output
