"""docs/logs.md: every command and snippet is run, in order, and the lines are those that it shows."""

from __future__ import annotations

import json
import re

import databases
import pages
import pytest

from greenjobs import logs

PAGE = (pages.DOCS / "logs.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow("logs.md", tmp_path_factory.mktemp("page"), url)


def shown(heading: str) -> list[str]:
    (text,) = [block.text for block in pages.blocks("logs.md") if (block.heading, block.language) == (heading, "text")]
    return text.splitlines()


def test_plain_line_is_as_shown(printed: dict[str, str]) -> None:
    (line,) = shown("Logs")
    _, end = line.split("+01:00 ")
    pattern = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d " + re.escape(end) + "$"
    assert re.search(pattern, printed["Logs"], re.MULTILINE)
    assert re.search(pattern.split(" ")[0], line)


def test_line_of_json_is_as_shown(printed: dict[str, str]) -> None:
    (line,) = map(json.loads, shown("JSON"))
    (written,) = [json.loads(each) for each in printed["JSON"].splitlines() if '"app"' in each]
    assert list(written) == list(line)
    changing = {"time", "runner"}
    assert {key: value for key, value in written.items() if key not in changing} == {
        key: value for key, value in line.items() if key not in changing
    }


def test_every_key_of_a_job_is_on_the_page() -> None:
    rows = "".join(re.findall(r"^\| (`.*?) \| ", PAGE, re.MULTILINE))
    assert {*logs.JOB_KEYS, "duration_ms", "time", "level", "logger", "message", "exc", "stack"} == {
        *re.findall(r"`(\w+)`", rows)
    }


def test_lines_in_a_format_of_ones_own_are_as_shown(printed: dict[str, str]) -> None:
    lines = printed["A set-up of your own"].splitlines()
    assert [line for line in shown("A set-up of your own") if line not in lines] == []


def test_processor_of_structlog_adds_nothing_outside_of_a_job(printed: dict[str, str]) -> None:
    assert printed["A set-up of your own"].splitlines()[-1] == "{'event': 'outside of a job'}"
