"""docs/doctor.md: every snippet on it is run, and its tables are those of the code."""

from __future__ import annotations

import re

import databases
import pages
import pytest

from greenjobs.doctor import AREAS, Limits, blocking, process

PAGE = "doctor.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")
HEADINGS = {"process": "## The process", "database": "## The database", "jobs": "## The jobs"}


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        (output,) = pages.follow(PAGE, tmp_path_factory.mktemp("page"), url).values()
        return output


def test_commands_print_lines_as_shown(printed: str) -> None:
    (shown,) = [block.text for block in pages.blocks(PAGE) if block.language == "text"]
    line = next(line for line in shown.splitlines() if " patches: " in line)
    assert line in printed.splitlines()


def test_names_in_the_example_are_those_of_checks() -> None:
    (shown,) = [block.text for block in pages.blocks(PAGE) if block.language == "text"]
    names = {check.name for checks in AREAS.values() for check in checks}
    assert set(re.findall(r"^  (?:ok|warn|fail) +([a-z ]+): ", shown, re.MULTILINE)) <= names


def test_snippet_prints_what_it_asks_for(printed: str) -> None:
    assert printed.endswith("\nok connection\nok schema\n")


@pytest.mark.parametrize("area", AREAS)
def test_table_has_every_check_in_order(area: str) -> None:
    section = re.split(r"^## ", TEXT[TEXT.index(HEADINGS[area]) + 3 :], maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert rows == [check.name for check in AREAS[area]]


def test_table_of_modules_has_every_one_with_its_remedy() -> None:
    section = TEXT[TEXT.index("## Modules that block") :]
    rows = [tuple(line.strip("| ").split(" | ")) for line in section.splitlines() if line.startswith("| ")]
    assert rows[2:] == [(package.name, package.remedy) for package in blocking._PACKAGES]


def test_checks_of_run_are_listed() -> None:
    listed = TEXT[TEXT.index("`greenjobs run` makes the checks") : TEXT.index("## The process")]
    assert tuple(re.findall(r"`([a-z ]+)`", listed))[1:] == process.AT_START


def test_limits_are_said() -> None:
    limits = Limits()
    assert (limits.total_seconds, limits.connect_seconds) == (30, 5)
    assert (limits.clock_seconds, limits.clock_failure_seconds) == (1, 60)
    assert (limits.snapshot_seconds, limits.snapshot_transactions) == (5 * 60, 1_000_000)
    assert (limits.dead_rows, limits.waiting_seconds, limits.sampled_payloads) == (5, 5 * 60, 1_000)
