"""docs/jobs.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import re

import databases
import pages
import pytest
from click.testing import CliRunner

from greenjobs import config, jobs
from greenjobs.cli import main
from greenjobs.durations import duration

PAGE = "jobs.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def without_ages(table: str) -> list[list[str]]:
    return [re.sub(r"\d+ (?:s|min)\b", "", line).split() for line in table.splitlines() if "send_email" in line]


def test_list_prints_the_table_that_is_shown(printed: dict[str, str]) -> None:
    (shown,) = [block.text for block in pages.blocks(PAGE) if block.language == "text"]
    rows = without_ages(shown)
    assert len(rows) == 3
    assert [row for row in without_ages(printed["Looking"]) if row in rows] == rows


def test_show_has_arguments_and_traceback(printed: dict[str, str]) -> None:
    assert '{"to": "Ann", "subject": "Hi"}' in printed["Looking"]
    assert 'raise ConnectionError("connection refused by mail.example.com")' in printed["Looking"]


def test_status_lists_the_types_that_wait_for_nobody(printed: dict[str, str]) -> None:
    """Those that failed wait for nobody at all."""
    assert "no live runners" in printed["Looking"]
    assert "no live runner knows" not in printed["Looking"]


def test_what_is_retried_runs(printed: dict[str, str]) -> None:
    assert "retried 1 job: 1\nwould retry 2 jobs: 3, 2\nretried 2 jobs: 3, 2\n" in printed["Retrying"]
    assert {"Hi, Ann!", "Hi, Bob!", "News, Cleo!"} <= set(printed["Retrying"].splitlines())


def test_what_is_cancelled_is_gone(printed: dict[str, str]) -> None:
    assert re.search(r"^cancelled 2 jobs: \d+, \d+$", printed["Cancelling and discarding"], re.MULTILINE)


def test_snippet_prints_what_became_of_its_job(printed: dict[str, str]) -> None:
    lines = printed["In Python"].splitlines()
    id = lines[1].split()[0]
    assert lines[0] == "scheduled {'to': 'Ann', 'subject': 'Later'} None"
    assert lines[1].startswith(f"{id} send_email ")
    assert lines[2:] == ["0", f"({id},) {{}}", f"({id},) ()"]


def test_renamed_job_runs_the_row_of_its_former_name(printed: dict[str, str]) -> None:
    assert "Hello, dear Ann!" in printed["Names and aliases"]


def test_row_that_did_not_fit_is_listed_with_the_reason_and_runs_when_it_fits(printed: dict[str, str]) -> None:
    section = printed["Arguments that no longer fit"]
    assert "PayloadMismatch: send_email: the stored payload lacks the argument 'language'" in section
    assert section.splitlines().count("Hello, Ann!") == 1


def test_options_in_the_table_are_those_of_the_command_and_of_python() -> None:
    table = TEXT[TEXT.index("| Option | In Python") : TEXT.index("The age of a failed job")]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    flags = {flag for row in rows for flag in re.findall(r"`(--[a-z-]+)`", row[1])}
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row[2])}
    help = CliRunner().invoke(main, ["jobs", "retry", "--help"]).output
    assert flags == set(re.findall(r"--[a-z-]+", help)) - {
        *("--job-type", "--json", "--dry-run", "--yes", "--help", "--database-url")
    }
    assert names == {*jobs.Filters.__annotations__, "limit"}


def test_default_of_keep_failed_is_said() -> None:
    assert config.OPTIONS["keep_failed"].default == duration("30 days")
    assert "`keep_failed` ago, 30 days if you do not set it" in TEXT
