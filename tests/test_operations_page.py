"""docs/operations.md: every command and every statement on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import databases
import pages
import pytest

from greenjobs import address, config, http_server

PAGE = "operations.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def test_runner_tells_that_it_is_ready_and_alive_and_what_it_runs(printed: dict[str, str]) -> None:
    output = printed["Asking a runner how it is"]
    assert '"ready": true' in output
    assert '"alive": true' in output
    assert '"job_type": "nap"' in output and "app.py:6 nap" in output


def test_looks_by_hand_print_something(printed: dict[str, str]) -> None:
    assert "default" in printed["What to watch"]


def test_queue_is_paused_and_resumed_and_tables_are_current(printed: dict[str, str]) -> None:
    assert printed["Draining and deploying"] == "paused default\nresumed default\nup to date\n"


def test_files_that_are_named_are_there() -> None:
    assert (pages.DOCS.parent / "examples/deploy/README.md").is_file()
    assert (pages.DOCS.parent / "examples/deploy/kubernetes/keda.yaml").is_file()


def test_figures_are_those_of_the_code() -> None:
    assert f"{http_server.MOST_CONNECTIONS} connections are" in TEXT
    assert config.OPTIONS["max_crashes"].default == 3 and "`max_crashes` (3)" in TEXT
    assert config.OPTIONS["job_connections"].default == config.OPTIONS["enqueue_connections"].default == 10
    assert config.OPTIONS["keep_failed"].default == config.duration("30 days")
    assert config.OPTIONS["keep_counts"].default == config.duration("7 days")
    assert str(address.Address.parse(":9600")) == "127.0.0.1:9600"
