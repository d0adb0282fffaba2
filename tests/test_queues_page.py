"""docs/queues.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import databases
import pages
import pytest

from greenjobs import config

PAGE = "queues.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def jobs_in(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("charged ", "counted ", "Welcome, "))]


def test_list_prints_the_table_that_is_shown(printed: dict[str, str]) -> None:
    (shown,) = [block.text for block in pages.blocks(PAGE) if block.language == "text"]
    assert printed["Looking"].startswith(shown)
    assert '"waiting": 2' in printed["Looking"]


def test_mails_are_sent_by_the_second_run_only(printed: dict[str, str]) -> None:
    before, after = printed["Pausing"].split("resumed emails\n")
    assert jobs_in(before) == []
    assert "not waiting for what is in paused queues: emails" in before
    assert sorted(jobs_in(after)) == ["Welcome, Ann!", "Welcome, Bob!"]


def test_several_names_are_paused_and_resumed(printed: dict[str, str]) -> None:
    assert "paused reports\npaused bulk\nresumed reports\nresumed bulk\n" in printed["Pausing"]


def test_sizes_are_said(printed: dict[str, str]) -> None:
    assert printed["Resizing"] == (
        "emails has a pool of 10 in every runner\nemails has the pools that its runners were started with\n"
    )


def test_snippet_prints_what_was_changed(printed: dict[str, str]) -> None:
    assert printed["In Python"].splitlines() == [
        "['emails']",
        "[]",
        "['reports']",
        "True",
        "emails 1 0 True 10",
        "emails []",
        "reports []",
        "['emails', 'reports']",
        "True",
    ]


def test_share_runs_the_first_queue_first(printed: dict[str, str]) -> None:
    assert jobs_in(printed["Queues that share slots"])[:5] == [
        *("charged 1", "charged 2", "Welcome, Cleo!", "counted home", "counted shop"),
    ]


def test_runner_in_python_runs_what_waits(printed: dict[str, str]) -> None:
    assert sorted(jobs_in(printed["Queues that share slots"])[5:]) == ["charged 3", "counted about"]


def test_ranges_are_those_of_the_code() -> None:
    assert f"A weight is {config.WEIGHT_ALLOWED}." in TEXT
    assert "from 1 to 10,000" in TEXT and config.OPTIONS["pool"].allowed == "a whole number from 1 to 10,000"
