"""The pages of docs/ as a whole: each is in the index, each link leads somewhere, and none is of another's place."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import processes
import pytest

PAGES = sorted(page for page in pages.DOCS.glob("*.md") if page.name != "README.md")
TEXTS = [processes.ROOT / "README.md", pages.DOCS / "README.md", *PAGES, *(processes.ROOT / "examples").rglob("*.md")]

_LINK = re.compile(r"\[[^\]]+\]\((?!https?:)([^)#\s]+)?(?:#([^)]+))?\)")


def test_every_page_is_in_the_index() -> None:
    index = (pages.DOCS / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES} == {link for link, _ in _LINK.findall(index)} - {"../README.md"}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(processes.ROOT)))
def test_every_link_leads_somewhere(text: Path) -> None:
    for link, anchor in _LINK.findall(text.read_text(encoding="utf-8")):
        target = (text.parent / link).resolve() if link else text
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), f"{link}#{anchor}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
