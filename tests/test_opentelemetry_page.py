"""docs/opentelemetry.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import re

import databases
import pages
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
