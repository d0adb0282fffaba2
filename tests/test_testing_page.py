"""docs/testing.md: its application and its tests are run as they stand, by the pytest of a user."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import databases
import pages
import pytest

from greenjobs import pytest_plugin, testing

PAGE = "testing.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    folder: Path = tmp_path_factory.mktemp("page")
    files = [block for block in pages.blocks(PAGE) if block.name.startswith("test_")]
    for block in files:  # those that stand behind the command are there when it runs, as in any project
        (folder / block.name).write_text(block.text, encoding="utf-8")
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, folder, url)


def test_all_tests_on_the_page_pass(printed: dict[str, str]) -> None:
    (output,) = printed.values()
    on_the_page = len(re.findall(r"^def test_", TEXT, re.MULTILINE))
    parameters = 2  # one of them has three
    assert f"{on_the_page + parameters} passed" in output
    assert "warning" not in output


def test_every_public_function_and_fixture_is_on_the_page() -> None:
    functions = {name for name in testing.__all__ if inspect.isfunction(getattr(testing, name))}
    fixtures = set(re.findall(r"^def (greenjobs_\w+)", inspect.getsource(pytest_plugin), re.MULTILINE))
    assert len(fixtures) == 5
    missing = {name for name in functions | fixtures if not re.search(rf"`(?:testing\.)?{name}\b|\b{name}\(", TEXT)}
    assert missing == set()


def test_every_option_of_drain_is_on_the_page() -> None:
    assert set(re.findall(r"^\| `(\w+)=", TEXT, re.MULTILINE)) == set(inspect.signature(testing.drain).parameters)
