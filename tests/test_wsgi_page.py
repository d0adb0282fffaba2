"""docs/wsgi.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import databases
import pages
import pytest

from greenjobs import loading

PAGE = "wsgi.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def test_job_is_there_with_its_order_and_gone_with_it(printed: dict[str, str]) -> None:
    lines = printed["In any WSGI application"].splitlines()
    assert {"Ann 200 OK", "Mallory 403 Forbidden"} <= set(lines)
    assert lines.count("Thank you, Ann.") == 1
    assert not [line for line in lines if "Thank you, Mallory" in line]


def test_held_job_is_there_when_its_request_has_succeeded(printed: dict[str, str]) -> None:
    lines = printed["Jobs are held"].splitlines()
    assert {"right 200 OK", "wrong 409 Conflict"} <= set(lines)
    assert lines.count("<index, held>") == 2
    assert [line for line in lines if line.startswith("indexing")] == ["indexing right"]


def test_every_setting_that_comes_too_late_is_named() -> None:
    told = TEXT[TEXT.index("command line over them.") :].split("\n\n")[0]
    assert all(f"`{name}`" in told for name in loading.EARLY_OPTIONS)
