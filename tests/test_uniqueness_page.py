"""docs/uniqueness.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import inspect
import re
from typing import get_args

import databases
import pages
import pytest

from greenjobs.handle import Action
from greenjobs.job import Job
from greenjobs.uniqueness import OnConflict, UniqueSettings

PAGE = "uniqueness.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)


def test_jobs_print_what_is_shown(printed: dict[str, str]) -> None:
    (shown,) = [block.text for block in pages.blocks(PAGE) if block.language == "text"]
    words = {line.split()[0] for line in shown.splitlines()}
    lines = [line for line in printed["What becomes of the first"].splitlines() if line.split()[0] in words]
    assert sorted(lines) == sorted(shown.splitlines())


def test_every_setting_is_in_the_table_and_all_but_merge_are_options_of_a_call() -> None:
    settings = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert settings == set(UniqueSettings.__slots__)
    assert settings - set(inspect.signature(Job.options).parameters) == {"merge"}


def test_every_action_and_every_way_to_act_is_on_the_page() -> None:
    said = set(re.findall(r'`"(\w+)"`', TEXT))
    assert {*get_args(Action), *get_args(OnConflict)} <= said
