"""Fixtures. The whole test process is cooperative, as every process that runs jobs is."""

from __future__ import annotations

# Before anything else is imported, as in greenjobs.__main__.
from gevent import monkey

monkey.patch_all()

from greenjobs import green  # noqa: E402

green.patch()

from collections.abc import Iterator  # noqa: E402

import databases  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The server of this run; use `database_url`, unless the test is about servers."""
    with databases.server() as url:
        yield url


@pytest.fixture(scope="session")
def migrated_template(server_url: str) -> Iterator[str]:
    with databases.template(server_url) as name:
        yield name


@pytest.fixture
def database_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """A migrated database of the test's own."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def empty_database_url(server_url: str) -> Iterator[str]:
    """A database of the test's own, without any table."""
    with databases.fresh(server_url) as url:
        yield url
