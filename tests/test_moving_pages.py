"""docs/from-celery.md and docs/from-rq-and-huey.md: what they say is run, in order, and every option is told."""

from __future__ import annotations

import re

import databases
import pages
import pytest

from greenjobs.contrib.celery import options, settings
from greenjobs.contrib.celery.task import Task

CELERY = "from-celery.md"
OTHERS = "from-rq-and-huey.md"
TEXT = (pages.DOCS / CELERY).read_text(encoding="utf-8")
TOLD = {name for line in TEXT.splitlines() for name in re.findall(r"`([a-z_]+)(?:=…)?`", line)}


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page about Celery."""
    with databases.fresh(server_url) as url:
        return pages.follow(CELERY, tmp_path_factory.mktemp("page"), url)


def test_client_prints_what_is_shown(printed: dict[str, str]) -> None:
    (shown,) = [block.text for block in pages.blocks(CELERY) if block.language == "text"]
    lines = printed["An application"].splitlines()
    assert [line for line in lines if line in shown.splitlines()] == shown.splitlines()


def test_tasks_run_in_the_application_and_after_one_another(printed: dict[str, str]) -> None:
    lines = printed["An application"].splitlines()
    assert lines.count("the total is 13") == 1
    assert lines.count("shop mails Ann") == 1
    assert re.search(r"^ *nightly .*shop\.clean_up", printed["An application"], re.MULTILINE)


def test_tasks_of_a_django_project_are_in_its_transactions(printed: dict[str, str]) -> None:
    assert printed["In a Django project"].splitlines().count("Welcome, Ann") == 1


def test_task_becomes_a_job_of_the_same_name(printed: dict[str, str]) -> None:
    assert "the total was 7" in printed["On to greenjobs"].splitlines()


def test_page_about_rq_and_huey_holds(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with databases.fresh(server_url) as url:
        printed = pages.follow(OTHERS, tmp_path_factory.mktemp("page"), url)
    assert "3 done" in printed["From RQ and huey"].splitlines()


def test_every_option_and_every_setting_is_on_the_page() -> None:
    calls = options._TAKEN | options.TASKS_OWN | options.WITHOUT_MEANING - {"serializer"}
    tasks = {name for name in Task.__annotations__ if name not in ("app", "job", "serializer")}
    assert (calls | tasks | settings.USED.keys() | {"task_annotations", "beat_scheduler"}) - TOLD == set()
    assert {"task_id", "link_error", "exchange", "chord"} <= TOLD
