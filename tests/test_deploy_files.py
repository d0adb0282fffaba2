"""examples/deploy: what is written there is what greenjobs understands, and it does what the comments say.

There is neither Docker nor a cluster here. So the files are read as their readers read them; every command in them is
parsed by the real command line, and those that run for long are run as they stand, but for ports, folders and Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import databases
import pages
import pytest
import yaml
from processes import ROOT, free_port, run, start, write_application
from test_health import ask, wait_for_status
from test_systemd import Manager

from greenjobs import config, supervisor
from greenjobs.address import Address
from greenjobs.cli import main

DEPLOY = ROOT / "examples" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
UNITS = sorted((DEPLOY / "systemd").iterdir())
FILES = sorted(file for file in DEPLOY.rglob("*") if file.is_file())

# What tidying up, and writing the last outcomes, may take: docs/deployment.md.
ENDING_SECONDS = 15

APPLICATION = """
    import time
    from greenjobs import job

    @job
    def nap(seconds):
        time.sleep(seconds)
"""


def documents(name: str) -> list[Any]:
    return [document for document in yaml.safe_load_all((KUBERNETES / name).read_text()) if document]


DEPLOYMENT, BUDGET = documents("deployment.yaml")
POD = DEPLOYMENT["spec"]["template"]["spec"]
[RUNNER] = POD["containers"]
COMPOSE = yaml.safe_load((DEPLOY / "docker" / "docker-compose.yml").read_text())["services"]
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()


def lines_of(unit: Path, key: str) -> list[str]:
    """The values of a key of a unit, which has no lines that go on in the next one."""
    pairs = (line.split("=", 1) for line in unit.read_text().splitlines() if re.match(r"\w+=", line))
    return [value for name, value in pairs if name == key]


def instructions(word: str) -> list[str]:
    """What follows this instruction of the Dockerfile, in its last stage."""
    stage = DOCKERFILE.split("\nFROM ")[-1]
    return [line.removeprefix(f"{word} ") for line in stage.splitlines() if line.startswith(f"{word} ")]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of greenjobs in the files: where it stands, and its words after the program's."""
    for unit in UNITS:
        for key in ("ExecStartPre", "ExecStart"):
            for line in lines_of(unit, key):
                words = shlex.split(line.replace("%i", "emails"))
                assert words[1:3] == ["-m", "greenjobs"]
                yield f"{unit.name} {key}", words[3:]
    for name in sorted(file.name for file in KUBERNETES.iterdir()):
        for document in documents(name):
            pod = document["spec"].get("template", {}).get("spec", {})
            for container in [*pod.get("initContainers", []), *pod.get("containers", [])]:
                yield f"{name} {container['name']}", container["command"]
    for name, service in COMPOSE.items():
        if "command" in service:
            yield f"docker-compose.yml {name}", service["command"]
    [command] = instructions("CMD")
    yield "Dockerfile CMD", json.loads(command)
    yield "Dockerfile HEALTHCHECK", healthcheck()
    for page in ("deployment.md", "operations.md"):
        for block in pages.blocks(page):
            if block.language == "sh":
                for command in re.findall(r"^(greenjobs [^&|#\n]*)", block.text, re.MULTILINE):
                    yield page, shlex.split(command)


def healthcheck() -> list[str]:
    [text] = instructions("HEALTHCHECK")
    words: list[str] = json.loads(text.partition(" CMD ")[2])
    return words


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


COMMANDS = [(place, words[1:] if words[0] == "greenjobs" else words) for place, words in commands()]


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=[f"{place}: {' '.join(words)}" for place, words in COMMANDS])
def test_command_is_one_that_the_command_line_takes(place: str, words: list[str]) -> None:
    group: Any = main
    while hasattr(group, "commands") and words and words[0] in group.commands:
        group, words = group.commands[words[0]], words[1:]
    context = group.make_context("greenjobs", list(words), resilient_parsing=False)
    with context:
        config.check({name: value for name, value in context.params.items() if name in config.OPTIONS})


def test_all_kinds_of_commands_were_found() -> None:
    places = {place.split()[0] for place, _ in COMMANDS}
    assert {"greenjobs.service", "greenjobs@.service", "deployment.yaml", "migrate.yaml", "Dockerfile"} <= places
    assert {"docker-compose.yml", "deployment.md", "operations.md"} <= places


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_variable_is_one_that_is_read(file: Path) -> None:
    known = {variable for each in config.OPTIONS.values() for variable in each.environment}
    assert set(re.findall(r"GREENJOBS_\w+", file.read_text())) <= known


def test_readme_of_the_folder_lists_its_files() -> None:
    listed = set(re.findall(r"^\| `(.+?)` \|", (DEPLOY / "README.md").read_text(), re.MULTILINE))
    assert listed == {str(file.relative_to(DEPLOY)) for file in FILES} - {"README.md"}


# Time to finish


def test_pods_have_time_to_finish() -> None:
    waits = float(RUNNER["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = waits + float(option(RUNNER["command"], "--grace")) + ENDING_SECONDS
    assert POD["terminationGracePeriodSeconds"] >= needed


def test_pods_are_told_to_stop_once() -> None:
    """SIGTERM comes by itself after preStop; one from there would make it the second, which interrupts the jobs."""
    assert RUNNER["lifecycle"]["preStop"]["exec"]["command"][0] == "sleep"


@pytest.mark.parametrize("name", [name for name, service in COMPOSE.items() if "run" in service.get("command", [])])
def test_containers_have_time_to_finish(name: str) -> None:
    seconds = float(COMPOSE[name]["stop_grace_period"].removesuffix("s"))
    assert seconds >= float(option(COMPOSE[name]["command"], "--grace")) + ENDING_SECONDS


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_services_have_time_to_finish(unit: Path) -> None:
    [stop], [start] = lines_of(unit, "TimeoutStopSec"), lines_of(unit, "ExecStart")
    assert float(stop) >= float(option(start.split(), "--grace")) + ENDING_SECONDS


def test_probes_wait_for_as_long_as_a_supervisor_does() -> None:
    from greenjobs.supervisor_http import CHILD_SECONDS

    probes = [RUNNER[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert all(probe["timeoutSeconds"] > CHILD_SECONDS + supervisor._ANSWER_SECONDS for probe in probes)


# What belongs together


def test_port_is_the_same_everywhere() -> None:
    [port] = RUNNER["ports"]
    assert Address.parse(option(RUNNER["command"], "--http")).port == port["containerPort"]
    assert {RUNNER[name]["httpGet"]["port"] for name in ("startupProbe", "livenessProbe", "readinessProbe")} == {"http"}
    assert DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    assert instructions("EXPOSE") == [str(port["containerPort"])]
    assert f"GREENJOBS_HTTP=0.0.0.0:{port['containerPort']}" in instructions("ENV")


def test_selectors_find_the_pods() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels == BUDGET["spec"]["selector"]["matchLabels"]


@pytest.mark.parametrize("name", ["keda.yaml", "keda-prometheus.yaml", "hpa.yaml"])
def test_scalers_scale_the_deployment(name: str) -> None:
    [scaler] = documents(name)
    assert scaler["spec"]["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    assert "scaleTargetRef" in scaler["spec"]


def test_nobody_is_root() -> None:
    [user] = instructions("USER")
    pods = [POD, documents("migrate.yaml")[0]["spec"]["template"]["spec"]]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert str(pod["securityContext"]["runAsUser"]) == user != "0"
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert all(lines_of(unit, "User") == ["app"] for unit in UNITS)


def test_unit_on_the_page_is_that_of_the_file() -> None:
    [block] = [block for block in pages.blocks("deployment.md") if block.language == "ini"]
    assert set(block.text.splitlines()) <= set((DEPLOY / "systemd" / "greenjobs.service").read_text().splitlines())


# The statement by which is scaled


def query() -> str:
    [scaler] = documents("keda.yaml")
    [trigger] = scaler["spec"]["triggers"]
    return str(trigger["metadata"]["query"])


def test_statement_on_the_page_is_that_of_the_file() -> None:
    [block] = [block for block in pages.blocks("operations.md") if block.language == "sql"]
    assert block.text.split() == query().split()


def test_statement_gives_the_age_of_the_oldest_job_that_could_run(database_url: str) -> None:
    def age() -> float:
        cursor.execute(query())
        [(value,)] = cursor.fetchall()
        assert isinstance(value, float)
        return value

    with databases.administration(database_url) as cursor:
        assert age() == 0

        insert = "INSERT INTO background_jobs (job_type, data, queue, state, created_at, run_at) VALUES "
        due = "now() - interval '%s s', now() - interval '%s s'"
        cursor.execute(f"{insert} ('nap', '{{}}', 'default', 'available', {due % (100, 100)})")
        assert 100 <= age() < 160

        # What is for later, failed or paused does not count; what was for later counts from when it was due.
        cursor.execute(f"{insert} ('nap', '{{}}', 'default', 'scheduled', {due % (9000, -100)})")
        cursor.execute(f"{insert} ('nap', '{{}}', 'default', 'failed', {due % (9000, 9000)})")
        cursor.execute(f"{insert} ('nap', '{{}}', 'default', 'available', {due % (9000, 50)})")
        cursor.execute(f"{insert} ('nap', '{{}}', 'paused', 'available', {due % (9000, 9000)})")
        assert age() > 8000
        run("greenjobs", "queues", "pause", "paused", folder=ROOT, database_url=database_url)
        assert 100 <= age() < 160


# As they run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_application(tmp_path, APPLICATION)
    return tmp_path


def test_pod_migrates_runs_and_answers_its_probes(folder: Path, empty_database_url: str) -> None:
    """As Kubernetes does: the container that comes first, the runner, its probes, the end."""
    [first] = POD["initContainers"]
    assert "applied " in run(*first["command"], folder=folder, database_url=empty_database_url)
    port = str(free_port())
    command = [word.replace("0.0.0.0:9600", f"0.0.0.0:{port}") for word in RUNNER["command"]]
    assert command != RUNNER["command"]
    # Its one volume that can be written is for temporary files.
    with tempfile.TemporaryDirectory(prefix="t-") as temporary:
        more = {"TMPDIR": temporary}
        with start(*command, folder=folder, database_url=empty_database_url, environment=more) as runner:
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                wait_for_status(f"0.0.0.0:{port}", RUNNER[name]["httpGet"]["path"], 200)
            assert "WARNING greenjobs.http_server: http is 0.0.0.0:" in runner.output
            health = run(*healthcheck(), folder=folder, environment={"GREENJOBS_HTTP": f"0.0.0.0:{port}"})
            assert json.loads(health)["alive"] is True
            runner.terminate()
            assert runner.wait() == 0
    assert "nobody answers" in run(
        *healthcheck(), folder=folder, environment={"GREENJOBS_HTTP": f"0.0.0.0:{port}"}, status=1
    )


def as_here(command: str, runtime: str, queue: str = "") -> list[str]:
    """The command of a unit with this Python, and this folder in place of /run."""
    words = shlex.split(command.replace("%i", queue).replace("unix:/run/", f"unix:{runtime}/"))
    return [sys.executable if word.endswith("/python") else word for word in words]


@pytest.fixture
def runtime() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="r-") as path:
        for name in ("greenjobs", "greenjobs-default"):
            os.mkdir(f"{path}/{name}")  # as RuntimeDirectory= does
        yield path


def test_service_starts_reloads_and_stops_as_systemd_has_it(folder: Path, database_url: str, runtime: str) -> None:
    unit = DEPLOY / "systemd" / "greenjobs.service"
    [before], [command], [reload] = (lines_of(unit, key) for key in ("ExecStartPre", "ExecStart", "ExecReload"))
    assert lines_of(unit, "RuntimeDirectory") == ["greenjobs"]
    run(*as_here(before, runtime), folder=folder, database_url=database_url)
    [watchdog] = lines_of(unit, "WatchdogSec")
    with contextlib.closing(Manager(f"{runtime}/notify")) as manager:
        environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": str(int(watchdog) * 1_000_000)}
        words = as_here(command, runtime)
        with start(*words, folder=folder, database_url=database_url, environment=environment) as service:
            manager.hear_until("READY=1")
            document = wait_for_status(f"unix:{runtime}/greenjobs/http.sock", "/readyz", 200)
            assert len(document["processes"]) == int(option(words, "--processes"))
            subprocess.run(shlex.split(reload.replace("$MAINPID", str(service.pid))), check=True)
            manager.hear_until("RELOADING=1")
            manager.hear_until("READY=1")
            service.terminate()
            manager.hear_until("STOPPING=1")
            assert service.wait() == 0


def test_service_of_a_queue_serves_that_queue(folder: Path, database_url: str, runtime: str) -> None:
    unit = DEPLOY / "systemd" / "greenjobs@.service"
    [command] = lines_of(unit, "ExecStart")
    assert lines_of(unit, "RuntimeDirectory") == ["greenjobs-%i"]
    with contextlib.closing(Manager(f"{runtime}/notify")) as manager:
        environment = {"NOTIFY_SOCKET": manager.address}
        words = as_here(command, runtime, "default")
        with start(*words, folder=folder, database_url=database_url, environment=environment) as service:
            manager.hear_until("READY=1")
            service.wait_for_line(r"queues: default \(20 at a time\)")
            assert ask(f"unix:{runtime}/greenjobs-default/http.sock", "/livez")[0] == 200
            service.send(signal.SIGTERM)
            assert service.wait() == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not on this machine")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_no_fault(unit: Path, tmp_path: Path) -> None:
    # It looks whether the program is there.
    text = unit.read_text().replace("/srv/app/current/.venv/bin/python", sys.executable)
    copy = tmp_path / unit.name
    copy.write_text(text)
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    ours = [line for line in verified.stderr.splitlines() if "greenjobs" in line]
    assert (verified.returncode, ours) == (0, [])
