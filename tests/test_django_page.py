"""docs/django.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import databases
import pages
import pytest

from greenjobs import config, loading
from greenjobs.contrib.django import options

PAGE = "django.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def test_job_is_there_with_its_order_and_gone_with_it(printed: dict[str, str]) -> None:
    lines = printed["In a Django project"].splitlines()
    assert "Mallory was refused" in lines
    assert [line for line in lines if line.startswith("Thank you")] == ["Thank you, Ann."]
    assert any(line.strip().startswith("Applying greenjobs.0001") for line in lines)


def test_project_is_found_by_the_variable_of_django(printed: dict[str, str]) -> None:
    assert "queues: mail (20 at a time)" in printed["Commands"]


def test_tests_of_the_project_pass(printed: dict[str, str]) -> None:
    assert "Ran 2 tests" in printed["Tests"] and "\nOK" in printed["Tests"]


def test_every_key_of_the_settings_is_named() -> None:
    assert all(f"| `{key}` | " in TEXT for key in options._OWN_KEYS)
    told = TEXT[TEXT.index("is no option is refused.") :].split("\n\n")[0]
    assert all(f"`{name.upper()}`" in told for name in loading.EARLY_OPTIONS)


def test_numbers_are_those_of_the_code() -> None:
    assert config.OPTIONS["pool"].default == 50 and "50 of them run at a time in each queue" in TEXT
