"""Fixtures for tests of faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import databases
import pytest

from greenjobs.migrate import migrate

from . import arena as arenas
from .arena import Arena
from .server import Server, new_server, workshop

MakeServer = Callable[..., Server]


@pytest.fixture
def arena(tmp_path: Path, database_url: str) -> Iterator[Arena]:
    """An arena on the server of this run, for faults that leave the server alone."""
    with arenas.opened(tmp_path, database_url, database_url) as arena:
        yield arena


@pytest.fixture(scope="session")
def _restless_server() -> Iterator[tuple[Server, str]]:
    """A server, and the name of a migrated database there."""
    with workshop() as folder:
        server = new_server(folder / "server", listen_addresses="127.0.0.1")
        try:
            server.start()
            migrated = databases.with_database(server.url, "migrated")
            with databases.administration(server.url) as cursor:
                cursor.execute("CREATE DATABASE migrated TEMPLATE template0")
            migrate(migrated)
            yield server, "migrated"
        finally:
            server.end()


@pytest.fixture
def server(_restless_server: tuple[Server, str]) -> Iterator[Server]:
    """A server that a test may restart, and kill as often as it wants; it runs when the test begins."""
    server, _ = _restless_server
    yield server
    if not server.is_running:
        server.start()


@pytest.fixture
def served(
    server: Server, _restless_server: tuple[Server, str], tmp_path: Path, empty_database_url: str
) -> Iterator[Arena]:
    """An arena on `server`; its ledger is on the server of this run, which no fault touches."""
    _, template = _restless_server
    with databases.fresh(server.url, template=template) as url:
        with arenas.opened(tmp_path, url, empty_database_url) as arena:
            yield arena
        if not server.is_running:
            server.start()


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    """Starts servers of the test's own, with these settings; they end with it."""
    with workshop() as folder, ExitStack() as servers:

        def make(**settings: str) -> Server:
            server = new_server(folder / f"server{len(list(folder.iterdir()))}", **settings)
            servers.callback(server.end)
            server.start()
            return server

        yield make
