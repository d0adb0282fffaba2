"""docs/transactions.md and docs/connections.md: every command and every snippet on them is run, in order."""

from __future__ import annotations

import re
from typing import get_args

import databases
import pages
import pytest

from greenjobs.events import Outcome

TEXT = (pages.DOCS / "transactions.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page of transactions."""
    with databases.fresh(server_url) as url:
        return pages.follow("transactions.md", tmp_path_factory.mktemp("page"), url)


def test_jobs_of_committed_orders_run_and_that_of_the_savepoint_does_not(printed: dict[str, str]) -> None:
    lines = printed["Enqueuing in a transaction"].splitlines()
    assert sorted(line for line in lines if line.endswith("is confirmed")) == [
        f"order {number} is confirmed" for number in (1, 2, 3)
    ]


def test_one_transfer_is_made_and_confirmed_and_the_other_one_leaves_no_trace(printed: dict[str, str]) -> None:
    lines = printed["Exactly once: completing in the job's own transaction"].splitlines()
    assert lines.count("30 from ann to bob: committed") == 1
    assert lines.count("bob, you have got 30") == 1
    assert lines[-1] == "[('ann', 70), ('bob', 30)]"
    assert not [line for line in lines if "500 from ann" in line or "you have got 500" in line]
    assert [line for line in lines if "(transfer) failed on attempt 1 of 11; retrying in" in line]


def test_outcomes_on_the_page_are_outcomes() -> None:
    named = set(re.findall(r"outcome (?:is|stays:|has outcome)? ?`(\w+)`", TEXT))
    assert named and named <= set(get_args(Outcome))


def test_hundred_visits_are_counted_over_two_connections(
    server_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with databases.fresh(server_url) as url:
        pages.follow("connections.md", tmp_path_factory.mktemp("page"), url)
        with databases.administration(url) as cursor:
            cursor.execute("SELECT count(*) FROM visits")
            assert cursor.fetchone() == (100,)
