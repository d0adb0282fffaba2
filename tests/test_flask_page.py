"""docs/flask.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import databases
import pages
import pytest

from greenjobs import config, loading
from greenjobs.contrib import joining

PAGE = "flask.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def test_job_is_there_with_its_order_and_gone_with_it(printed: dict[str, str]) -> None:
    lines = printed["In a Flask application"].splitlines()
    assert {"/orders/Ann 200", "/orders/Mallory 403", "/hello/Bob 200"} <= set(lines)
    assert lines.count("shop thanks Ann") == lines.count("Hello, Bob") == 1
    assert not [line for line in lines if "thanks Mallory" in line]


def test_view_that_does_not_commit_is_warned_of(printed: dict[str, str]) -> None:
    warnings = [line for line in printed["In a Flask application"].splitlines() if "never committed" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("the view hello enqueued job greet in its session")


def test_surrounding_is_around_the_job(printed: dict[str, str]) -> None:
    lines = printed["A context for every job"].splitlines()
    begin = lines.index("job work begins")
    assert lines[begin : begin + 3] == ["job work begins", "working", "job work ends"]


def test_every_setting_that_comes_too_late_is_named() -> None:
    told = TEXT[TEXT.index("What counts before the application is loaded") :].split("\n\n")[0]
    assert all(f"`GREENJOBS_{name.upper()}`" in told for name in loading.EARLY_OPTIONS)


def test_numbers_are_those_of_the_code() -> None:
    assert joining._MOST_LOOKS == 20 and "the first twenty times for each job and view" in TEXT
    assert config.OPTIONS["pool"].default == 50 and "a runner has 50 jobs at a time in each queue" in TEXT
