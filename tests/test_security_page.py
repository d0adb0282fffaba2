"""docs/security.md: what it tells to type works, and each right is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import databases
import pages
import pytest

from greenjobs import config, grants
from greenjobs.shapes.plain import MAX_DEPTH

PAGE = "security.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture
def url(server_url: str, database_url: str) -> Iterator[str]:
    """A database, and no role left behind: roles are of the whole server."""
    yield database_url
    roles = ", ".join(re.findall(r"CREATE ROLE (\w+)", TEXT))
    with databases.administration(database_url) as cursor:
        cursor.execute(f"DROP OWNED BY {roles}")
        cursor.execute(f"DROP ROLE {roles}")


def test_what_the_page_says_works(url: str, tmp_path: Path) -> None:
    printed = pages.follow(PAGE, tmp_path, url)["Roles of the database"]
    for line in ("shop_web may enqueue", "shop_runner may run", "shop_dashboard may read"):
        assert line in printed.splitlines()


def test_every_right_is_on_the_page() -> None:
    assert re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE) == list(grants.RIGHTS)


def test_bounds_on_the_page_are_those_of_the_code() -> None:
    assert f"at most {MAX_DEPTH} lists or objects deep" in TEXT
    assert config.OPTIONS["max_payload_bytes"].default == 1024 * 1024
