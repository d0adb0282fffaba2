"""docs/attempts.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import inspect
import re
from typing import get_args

import databases
import pages
import pytest

from greenjobs import policy
from greenjobs.events import AttemptEnded, Outcome

PAGE = "attempts.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def test_partner_that_is_down_is_called_three_times_and_nonsense_once(printed: dict[str, str]) -> None:
    # By whichever of the page's runners: on a slow machine the first one has not the time for all of them.
    lines = "\n".join(printed.values()).splitlines()
    assert lines.count("attempt 1, last: False") == 2
    assert lines.count("attempt 2, last: False") == 1
    assert lines.count("attempt 3, last: True") == 1
    assert "call_partner failed: ConnectionError('partner is down')" in lines
    assert "call_partner failed: ValueError('partner answers nonsense')" in lines


def test_customers_are_discarded_or_wait(printed: dict[str, str]) -> None:
    lines = printed["Retries"].splitlines()
    assert "sync_customer discarded: Gone('no such customer')" in lines
    assert "sync_customer discarded: Discard('customer was merged into another')" in lines
    waiting = [line.split()[3:] for line in lines if " sync_customer " in line and "scheduled" in line]
    assert len(waiting) == 2


def test_polite_report_ends_well_and_the_stubborn_one_fails(printed: dict[str, str]) -> None:
    assert "a shorter report, then" in printed["Timeouts"]
    assert re.search(r"^report failed: JobHardTimeout", printed["Timeouts"], re.MULTILINE)


def test_every_setting_of_attempts_is_on_the_page() -> None:
    settings = {
        each.name for each in inspect.signature(policy.declared).parameters.values() if each.kind is each.KEYWORD_ONLY
    }
    assert settings | {"max_retries"} == set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))


def test_every_outcome_and_every_attribute_of_an_event_is_on_the_page() -> None:
    told = TEXT[TEXT.index("## Who is told") :]
    named = set(re.findall(r"`(\w+)`", told))
    assert set(get_args(Outcome)) | set(AttemptEnded.__slots__) <= named
