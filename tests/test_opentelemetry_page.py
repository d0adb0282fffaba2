"""docs/opentelemetry.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import databases
import pages
import processes
import pytest

PAGE = "opentelemetry.md"


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def ids(text: str, field: str) -> list[str]:
    return re.findall(rf'"{field}": "0x(\w+)"', text)


def test_enqueue_attempt_and_what_is_inside_are_in_one_trace(printed: dict[str, str]) -> None:
    text = printed["In the application"]
    names = re.findall(r'^    "name": "(.*)"', text, re.MULTILINE)
    assert sorted(names) == ["process greetings", "publish greetings", "say it"]
    assert len(set(ids(text, "trace_id"))) == 1
    carried = re.search(r"Hello, Ann, in 00-(\w+)-(\w+)-", text)
    assert carried is not None and carried[1] == ids(text, "trace_id")[0] and carried[2] in ids(text, "parent_id")


def test_everything_is_found_without_a_line_of_code(printed: dict[str, str]) -> None:
    text = printed["Without a line of code"]
    assert re.findall(r'^    "name": "(.*)"', text, re.MULTILINE) == ["publish plain", "process plain"]
    assert '"greenjobs.outcome": "failed"' in text and '"exception.type": "ZeroDivisionError"' in text
    assert '"status_code": "ERROR"' in text
    assert '"name": "messaging.process.duration"' in text and '"name": "greenjobs.wait.duration"' in text


def test_patches_and_threads_go_together(printed: dict[str, str]) -> None:
    text = printed["Without a line of code"]
    assert "before gevent's patches" not in text and "MonkeyPatchWarning" not in text and "KeyError" not in text


def test_processes_under_a_supervisor_that_was_patched_go_on_until_they_are_told_to_stop(
    database_url: str, tmp_path: Path
) -> None:
    """gevent makes the sockets of such a supervisor non-blocking, and its children read from them."""
    processes.write_application(
        tmp_path,
        """
        from greenjobs import job

        @job
        def work():
            print("it works", flush=True)
        """,
    )
    environment = {
        "OTEL_TRACES_EXPORTER": "console",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_PYTHON_AUTO_INSTRUMENTATION_EXPERIMENTAL_GEVENT_PATCH": "patch_all",
    }
    command = ("opentelemetry-instrument", "greenjobs", "run", "--processes", "2")
    with processes.start(*command, folder=tmp_path, database_url=database_url, environment=environment) as supervisor:
        supervisor.wait_for_line(r"(?s)(process \d+ is up.*){2}")
        processes.run(
            *("python", "-c", "from app import work; work.delay()"), folder=tmp_path, database_url=database_url
        )
        supervisor.wait_for_line("it works")
        supervisor.terminate()
        assert supervisor.wait() == 0
        output = supervisor.output
    assert '"name": "process default"' in output
    assert "early death" not in output and "supervisor is gone" not in output


def test_instrumentor_brings_nothing_along_that_is_to_be_patched_or_has_to_be_there() -> None:
    """It is imported at the very start of the process, also of those that never patch anything."""
    code = (
        "import greenjobs.contrib.opentelemetry, sys; print({'gevent', 'psycopg2', 'ssl', 'click'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "set()"
