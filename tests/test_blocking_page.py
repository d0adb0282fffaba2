"""docs/blocking.md: every command and snippet is run, in order, and what it says holds."""

from __future__ import annotations

import re

import databases
import pages
import pytest

from greenjobs import blocking, config, processes, watchdog

PAGE = (pages.DOCS / "blocking.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow("blocking.md", tmp_path_factory.mktemp("page"), url)


def test_watchdog_logs_what_is_shown(printed: dict[str, str]) -> None:
    (shown,) = [block.text for block in pages.blocks("blocking.md") if block.language == "text"]
    for line in shown.splitlines():
        pattern = re.escape(line.strip()).replace("…", ".*").replace(re.escape("0.6"), r"\d\.\d")
        assert re.search(pattern, printed["The watchdog"]), line


def test_handler_of_the_watchdog_is_told(printed: dict[str, str]) -> None:
    assert "hash_here held the event loop for more than half a second: True\n" in printed["The watchdog"]


def test_threads_and_processes_hold_nothing(printed: dict[str, str]) -> None:
    output = printed["Threads and processes"]  # where several processes print, and an end of a line comes by itself
    assert "hash_in_thread done" in output
    assert "hash_in_process done" in output
    assert not re.search("job .* held the event loop", output)


def test_crash_fails_only_its_job(printed: dict[str, str]) -> None:
    output = printed["Threads and processes"]
    assert "crash failed" in output
    assert re.search(r"its process \d+ was ended by SIGKILL", output)


def test_figures_are_those_of_the_code() -> None:
    assert config.OPTIONS["max_blocking"].default == 0.5
    assert "than `max_blocking`\nseconds (0.5;" in PAGE
    assert watchdog._QUIET_SECONDS == 60
    assert blocking._OFTEN == 3
    assert processes._TIDY_SECONDS == 4
    assert (processes._FIRST_PAUSE_SECONDS, processes._LONGEST_PAUSE_SECONDS) == (1, 60)
