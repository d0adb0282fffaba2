"""docs/finished.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import inspect
import re
from typing import get_args

import databases
import pages
import pytest

from greenjobs import handle, history
from greenjobs.job import Job

PAGE = "finished.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def test_client_prints_what_is_shown(printed: dict[str, str]) -> None:
    (shown,) = [block.text for block in pages.blocks(PAGE) if block.language == "text"]
    lines = printed["A view that waits"].splitlines()
    assert [line for line in lines if line in shown.splitlines()] == shown.splitlines()


def test_finished_jobs_are_listed_and_shown(printed: dict[str, str]) -> None:
    text = printed["A view that waits"]
    assert len(re.findall(r"^ *\d+  make_report  reports  done ", text, re.MULTILINE)) == 2
    assert 'result        {"turnover": "2498628.00"}' in text


def test_job_that_is_not_kept_is_waited_for(printed: dict[str, str]) -> None:
    assert printed["Handles"] == "scheduled\ngone\n"


def test_history_is_found_and_pruned(printed: dict[str, str]) -> None:
    lines = printed["The history"].splitlines()
    assert lines[:2] == [
        "3 done {'year': 2020} {'turnover': '2493690.00'}",
        "1 done {'year': 2024} {'turnover': '2498628.00'}",
    ]
    assert lines[2] == "pruned 2 jobs: 3, 1"


def test_every_setting_and_every_status_is_on_the_page() -> None:
    settings = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert settings == {"keep", "keep_result"} <= inspect.signature(Job.__init__).parameters.keys()
    statuses = {*get_args(history.Status), *get_args(handle.EndedAs)}
    assert statuses == set(
        re.findall(r'`"(\w+)"`', TEXT[TEXT.index("`handle.status()` is") : TEXT.index("`handle.wait(")])
    )
