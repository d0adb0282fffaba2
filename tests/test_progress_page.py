"""docs/progress.md and docs/counts.md: every command and snippet is run, in order, and what they say holds."""

from __future__ import annotations

import re

import databases
import pages
import pytest

from greenjobs import config, reporter
from greenjobs.durations import duration
from greenjobs.progress import KEPT_LINES, LONGEST_LINE, LONGEST_MESSAGE, MOST_KEPT_LINES
from greenjobs.tally import Tally

PROGRESS = (pages.DOCS / "progress.md").read_text(encoding="utf-8")
COUNTS = (pages.DOCS / "counts.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def progress(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow("progress.md", tmp_path_factory.mktemp("page"), url)


@pytest.fixture(scope="module")
def counts(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow("counts.md", tmp_path_factory.mktemp("page"), url)


def shown(page: str) -> list[str]:
    """The lines of the one block that shows what is printed."""
    (text,) = [block.text for block in pages.blocks(page) if block.language == "text"]
    return text.splitlines()


def is_printed(line: str, output: str) -> bool:
    """Whether it is there; … stands for anything, and spaces for any number of them."""
    words = [re.escape(word).replace("…", r"\S+(?: \S+)?") for word in line.split()]
    return bool(re.search(r"\s+".join(words), output))


def test_show_prints_what_is_shown(progress: dict[str, str]) -> None:
    output = progress["Progress, and the log of a job"]
    assert len(shown("progress.md")) == 5
    assert [line for line in shown("progress.md") if not is_printed(line, output)] == []
    assert "claims        2\n" in output


def test_snippet_prints_progress_and_log(progress: dict[str, str]) -> None:
    assert progress["Progress"].splitlines() == [
        "failed 200 200 customer 200",
        "['beginning with line 1', 'beginning with line 121', '200 lines are in']",
    ]


def test_figures_of_progress_are_those_of_the_code() -> None:
    assert reporter._PAUSE_SECONDS == 1
    assert f"a message is cut after {LONGEST_MESSAGE} characters" in PROGRESS
    assert f"the newest {KEPT_LINES} lines" in PROGRESS
    assert f"from 1 to {MOST_KEPT_LINES}" in PROGRESS
    assert re.search(rf"a line is\s+cut after {LONGEST_LINE} characters", PROGRESS)


def test_counts_command_prints_what_is_shown(counts: dict[str, str]) -> None:
    assert [line for line in shown("counts.md") if not is_printed(line, counts["Looking"])] == []
    assert re.search(r"^last 5 minutes +done/min +failed/min +run +waited$", counts["Looking"], re.MULTILINE)


def test_snippet_prints_totals_minutes_and_rates(counts: dict[str, str]) -> None:
    lines = counts["Looking"].splitlines()
    assert "send_email 3 1 4 True" in lines
    assert sum(int(line.split()[2]) for line in lines if line.startswith("True emails")) == 3
    assert lines[-1] == "emails True True True"


def test_every_count_is_on_the_page() -> None:
    assert {*re.findall(r"^\| `(\w+)` \|", COUNTS, re.MULTILINE), "run_seconds", "waited_seconds"} == {*Tally.__slots__}
    assert "`run_seconds` and `waited_seconds` are sums" in COUNTS


def test_default_of_keep_counts_is_said() -> None:
    assert config.OPTIONS["keep_counts"].default == duration("7 days")
    assert "`keep_counts`, 7 days if you do not set it" in COUNTS
