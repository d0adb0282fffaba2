"""docs/transactions.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import databases
import pages
import pytest


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow("transactions.md", tmp_path_factory.mktemp("page"), url)


def test_jobs_of_committed_orders_run_and_that_of_the_savepoint_does_not(printed: dict[str, str]) -> None:
    lines = printed["Enqueuing in a transaction"].splitlines()
    assert sorted(line for line in lines if line.endswith("is confirmed")) == [
        f"order {number} is confirmed" for number in (1, 2, 3)
    ]
