"""`greenjobs doctor`: what it says of processes that were set up wrongly, and how it says it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import doctors
import processes
import pytest
import running
from click.testing import CliRunner

from greenjobs import config
from greenjobs.cli import main
from greenjobs.doctor import AREAS, Application, at_start, blocking, examine
from greenjobs.errors import OptionError

NAMES = [check.name for checks in AREAS.values() for check in checks]

SECRET = "hunter2"

Findings = dict[str, dict[str, Any]]


def read(output: str) -> Findings:
    """What `--json` printed, by name."""
    return {finding["name"]: finding for finding in json.loads(output[output.index("[\n") :])}


# --- a process in which all is well -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(server_url: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    import databases

    folder = tmp_path_factory.mktemp("healthy")
    processes.write_application(folder, "from greenjobs import job\n\n@job\ndef greet(name: str): ...\n")
    with databases.fresh(server_url, template=migrated_template) as url:
        return read(processes.run("greenjobs", "doctor", "--json", folder=folder, database_url=url))


def test_every_check_is_made_in_order(healthy: Findings) -> None:
    assert list(healthy) == NAMES


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_keys_are_stable(healthy: Findings) -> None:
    assert {tuple(finding) for finding in healthy.values()} == {("name", "area", "level", "message", "remedy")}


def test_all_is_well_in_a_fresh_process_and_database(healthy: Findings) -> None:
    """But for what the server of the tests saves on, and what there is none of."""
    levels = {name: finding["level"] for name, finding in healthy.items()}
    assert levels.pop("durability") in ("ok", "warn")
    assert levels.pop("application pools") == "skipped"
    assert set(levels.values()) == {"ok"}, healthy


def test_versions_are_told(healthy: Findings) -> None:
    assert re.search(r"Python 3\.\d+.*, gevent \d.*, psycopg2 2\.\d+.*, libpq \d+\.\d", healthy["versions"]["message"])


# --- a process in which nothing is ------------------------------------------------------------------------------------

SITE = """
import threading
from socket import socket
from time import sleep as nap

class Link(socket): ...
"""

APPLICATION = """
import MySQLdb
from greenjobs import job
from psycogreen.gevent import patch_psycopg

print("the application prints when it is imported")
patch_psycopg()

@job
def greet(name: str): ...
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Of a process that brings early imports along, whose resolver blocks, and whose database is not there."""
    folder = tmp_path_factory.mktemp("broken")
    processes.write_application(folder, SITE, name="sitecustomize.py")
    processes.write_application(folder, "", name="MySQLdb.py")
    processes.write_application(folder, APPLICATION)
    url = f"postgresql://somebody:{SECRET}@127.0.0.1:{processes.free_port()}/nowhere"
    environment = {"PYTHONPATH": str(folder), "GEVENT_RESOLVER": "block"}
    command = ("sh", "-c", 'ulimit -n 120; exec greenjobs doctor --json "$@"', "sh")
    output = processes.run(*command, folder=folder, database_url=url, environment=environment, status=1)
    assert SECRET not in output
    return read(output)


def test_module_that_keeps_what_gevent_replaced_is_named(broken: Findings) -> None:
    assert broken["early imports"]["level"] == "fail"
    assert "sitecustomize (Link, nap, socket)" in broken["early imports"]["message"]


def test_resolver_that_blocks_is_found(broken: Findings) -> None:
    assert broken["resolver"]["level"] == "fail"
    assert "unset GEVENT_RESOLVER" in broken["resolver"]["remedy"]


def test_module_that_blocks_is_named_with_its_remedy(broken: Findings) -> None:
    assert broken["blocking modules"]["level"] == "warn"
    assert "mysqlclient" in broken["blocking modules"]["message"]
    assert "PyMySQL" in broken["blocking modules"]["remedy"]


def test_wait_callback_of_somebody_else_is_found(broken: Findings) -> None:
    assert broken["patches"]["level"] == "warn"
    assert "leave out patch_psycopg()" in broken["patches"]["remedy"]


def test_too_few_open_files_are_found(broken: Findings) -> None:
    assert broken["open files"]["level"] == "warn"
    assert "may open 120 files" in broken["open files"]["message"]


def test_dead_database_is_one_failure_and_the_rest_is_skipped(broken: Findings) -> None:
    rest = [finding for finding in broken.values() if finding["area"] != "process" and finding["name"] != "connection"]
    assert broken["connection"]["level"] == "fail"
    assert "postgresql://somebody:***@127.0.0.1" in broken["connection"]["message"]
    assert {(finding["level"], finding["message"]) for finding in rest} == {("skipped", "see 'connection'")}


# --- other ways to be wrong -------------------------------------------------------------------------------------------


def test_process_that_nobody_patched_is_found(tmp_path: Path, database_url: str) -> None:
    code = """
from greenjobs import config
from greenjobs.doctor import examine

names = ("patches", "sleep", "database waits")
for finding in examine(config.current(), only=names):
    print(finding.name, finding.level, finding.message)
"""
    output = processes.run("python", "-c", code, folder=tmp_path, database_url=database_url)
    assert "patches fail not cooperative in this process: socket, ssl, time, select, threading, psycopg2" in output
    assert "sleep fail two time.sleep come one after the other" in output
    assert "database waits fail two pg_sleep come one after the other" in output


@pytest.mark.parametrize(
    ("site", "told"),
    [
        ("import threading\nguard = threading.Lock()", "sitecustomize (guard)"),
        ("import threading\nguard = threading.RLock()", "sitecustomize (guard)"),
        ("import redis", "their objects may lack: redis"),
    ],
)
def test_early_import_that_may_do_harm_is_a_warning(tmp_path: Path, site: str, told: str) -> None:
    processes.write_application(tmp_path, site, name="sitecustomize.py")
    processes.write_application(tmp_path, "", name="redis.py")
    command = ("greenjobs", "doctor", "--json", "--only", "early imports")
    found = read(processes.run(*command, folder=tmp_path, environment={"PYTHONPATH": str(tmp_path)}))
    assert found["early imports"]["level"] == "warn"
    assert told in found["early imports"]["message"]


def test_application_that_cannot_be_imported_is_a_failure_without_its_passwords(tmp_path: Path) -> None:
    url = f"postgresql://somebody:{SECRET}@db/shop"
    processes.write_application(tmp_path, f"raise RuntimeError('cannot reach {url}')")
    output = processes.run("greenjobs", "doctor", "--only", "application", folder=tmp_path, status=1)
    assert "fail     application: cannot be loaded: RuntimeError: " in output
    assert "(app.py, line 1)" in output
    assert SECRET not in output


def test_application_that_is_named_and_not_there_is_a_failure(tmp_path: Path) -> None:
    command = ("greenjobs", "doctor", "--only", "application", "--app", "nowhere")
    assert "there is no module 'nowhere'" in processes.run(*command, folder=tmp_path, status=1)


def test_without_an_application_its_checks_are_skipped() -> None:
    found = doctors.findings("application", "payloads", url="postgresql://127.0.0.1:1/nowhere")
    assert (found["application"].level, found["payloads"].level) == ("skipped", "skipped")


def test_application_without_jobs_is_a_warning() -> None:
    (finding,) = examine(config.load(), Application("app"), only=["application"])
    assert finding.level == "warn"


@pytest.mark.parametrize("name", blocking.NAMES)
def test_blocking_module_is_found_while_it_is_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    package = next(each for each in blocking._PACKAGES if each.name == name)
    module = types.ModuleType(package.module)
    module.__dict__["__version__"] = "3.1.13"
    module.__dict__["is_thin_mode"] = lambda: False
    monkeypatch.setitem(sys.modules, package.module, module)
    finding = doctors.finding("blocking modules")
    assert (finding.level, name in finding.message, package.remedy in str(finding.remedy)) == ("warn", True, True)


@pytest.mark.parametrize(
    ("loaded", "attributes"),
    [
        (("grpc._cython.cygrpc", "grpc.experimental.gevent"), {}),
        (("zmq.backend.cython", "zmq.green"), {}),
        (("psycopg",), {"__version__": "3.2.1"}),
        (("oracledb",), {"is_thin_mode": lambda: True}),
    ],
)
def test_blocking_module_that_was_told_to_cooperate_is_well(
    loaded: tuple[str, ...], attributes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    for name in loaded:
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    assert doctors.finding("blocking modules").level == "ok"


# --- the command ------------------------------------------------------------------------------------------------------


def doctor(*arguments: str, url: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["doctor", "--database-url", url, *arguments])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def warned(database_url: str) -> str:
    """A database of which the doctor has a warning."""
    with running.application(database_url) as database:
        database.rows("INSERT INTO background_jobs (job_type, data, state) VALUES ('lost', '{}', 'failed')")
    return database_url


def test_warnings_are_no_failure(warned: str) -> None:
    output = doctor("--only", "failed jobs", url=warned)
    assert "  warn     failed jobs: 1 failed for good, and are kept\n" in output
    assert "           -> `greenjobs jobs list --state failed` shows why" in output
    assert output.endswith("\n2 ok, 1 warn, 0 fail, 0 skipped\n")


def test_strict_makes_warnings_count(warned: str) -> None:
    doctor("--strict", "--only", "failed jobs", url=warned, status=1)


def test_output_that_is_no_terminal_has_no_colours(warned: str) -> None:
    assert "\x1b" not in doctor("--only", "failed jobs", url=warned)


def test_each_check_has_one_line_whatever_libpq_says() -> None:
    output = doctor("--only", "connection", url="postgresql://127.0.0.1:1/jobs", status=1)
    assert [line.strip().split()[:2] for line in output.splitlines()] == [
        ["database"],
        ["fail", "connection:"],
        ["->", "start"],
        [],
        ["0", "ok,"],
    ]


def test_terminal_has_colours(warned: str) -> None:
    result = CliRunner().invoke(main, ["doctor", "--database-url", warned, "--only", "failed jobs"], color=True)
    assert "\x1b[33mwarn" in result.output


def test_unknown_check_is_refused_with_the_names(warned: str) -> None:
    assert "there is no check 'sleeep'; the names are versions, application," in doctor(
        "--only", "sleeep", url=warned, status=2
    )


def test_unknown_check_is_refused_at_once() -> None:
    with pytest.raises(OptionError):
        examine(config.load(), only=["sleeep"])


def test_without_a_database_it_says_how_to_name_one(tmp_path: Path) -> None:
    output = processes.run("greenjobs", "doctor", "--only", "connection", folder=tmp_path, status=1)
    assert "fail     connection: No database is named." in output


def test_flask_greenjobs_doctor_judges_a_fresh_process_by_the_settings_of_the_application(
    tmp_path: Path, database_url: str
) -> None:
    import databases

    url = databases.sqlalchemy_url(database_url)
    code = f"""
    import flask
    from flask_sqlalchemy import SQLAlchemy

    from greenjobs import job
    from greenjobs.contrib.flask import GreenJobs

    app = flask.Flask(__name__)
    app.config.update(
        SQLALCHEMY_DATABASE_URI={url!r},
        SQLALCHEMY_ENGINE_OPTIONS={{"pool_size": 5, "max_overflow": 2}},
    )
    SQLAlchemy(app)
    GreenJobs(app)

    @job
    def greet(name: str): ...
    """
    processes.write_application(tmp_path, code, name="shop.py")
    chosen = ("--only", "early imports", "--only", "schema", "--only", "application pools")
    command = ("flask", "--app", "shop", "greenjobs", "doctor", "--json", "--pool", "8", *chosen)
    found = read(processes.run(*command, folder=tmp_path))
    assert {name: finding["level"] for name, finding in found.items()} == {
        **dict.fromkeys(("application", "early imports", "connection", "schema"), "ok"),
        "application pools": "warn",
    }
    assert "up to 8 jobs run here at a time, and SQLAlchemy lends them 7" in found["application pools"]["message"]


# --- at the start of a runner -----------------------------------------------------------------------------------------


def test_run_warns_once_of_what_it_finds_in_its_process(tmp_path: Path, database_url: str) -> None:
    processes.write_application(tmp_path, SITE, name="sitecustomize.py")
    processes.write_application(tmp_path, "", name="MySQLdb.py")
    processes.write_application(tmp_path, "import MySQLdb\nfrom greenjobs import job\n@job\ndef greet(name: str): ...")
    environment = {"PYTHONPATH": str(tmp_path)}
    command = ("greenjobs", "run", "--until-empty")
    output = processes.run(*command, folder=tmp_path, database_url=database_url, environment=environment)
    warnings = re.findall(r" WARNING greenjobs\.cli_doctor: (.*)$", output, re.MULTILINE)
    assert [warning.partition(":")[0] for warning in warnings] == ["early imports", "blocking modules"]


def test_run_in_a_good_process_says_nothing(tmp_path: Path, database_url: str) -> None:
    processes.write_application(tmp_path, "from greenjobs import job\n@job\ndef greet(name: str): ...")
    command = ("greenjobs", "run", "--until-empty", "--max-blocking", "0")  # the machine may be busy with other things
    output = processes.run(*command, folder=tmp_path, database_url=database_url)
    assert "WARNING" not in output


def test_start_asks_the_database_nothing() -> None:
    """Nobody is there to answer, and nothing is said of it."""
    found = at_start(config.load(database_url="postgresql://127.0.0.1:1/nowhere"), Application())
    assert {finding.area for finding in found} <= {"process"}
    assert not any("127.0.0.1" in finding.message for finding in found)
