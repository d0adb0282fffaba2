"""docs/time.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import re

import databases
import pages
import pytest

PAGE = "time.md"


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def test_code_that_is_too_late_is_not_sent_and_the_other_is(printed: dict[str, str]) -> None:
    lines = printed["Not too late"].splitlines()
    assert any(re.fullmatch(r"send_code expired, it was due \d+ s ago", line) for line in lines)
    assert "code 4712 for Bob" in lines
    assert not any("code 4711" in line for line in lines)
    assert sum(" send_code " in line and " scheduled " in line for line in lines) == 2


def test_jobs_of_one_customer_do_not_overlap_and_those_of_two_do(printed: dict[str, str]) -> None:
    lines = [line for line in printed["One at a time"].splitlines() if line.startswith("customer ")]
    of_17 = [line.removeprefix("customer 17 ") for line in lines if line.startswith("customer 17 ")]
    assert of_17 == ["begins", "ends", "begins", "ends"]
    assert set(lines[:2]) == {"customer 17 begins", "customer 23 begins"}


def test_index_is_rebuilt_once(printed: dict[str, str]) -> None:
    assert printed["One that waits, one that runs"].splitlines().count("index is rebuilt") == 1
