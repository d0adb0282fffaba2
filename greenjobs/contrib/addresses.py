"""Whether two ways to a database lead to the same one, as far as their text can tell.

Users do not matter. In doubt the answer is no: a job then has a transaction of its own, instead of one that fails.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import psycopg2
from psycopg2 import extensions

from greenjobs import config, embedded

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_DEFAULT_PORT = "5432"

# Ways that may end at a standby, which takes no jobs.
_WRITABLE = ("", "any", "read-write", "primary")


class Address(NamedTuple):
    """Hosts with their ports, the name of the database, and the search path that the client asks for, if it does."""

    servers: frozenset[tuple[str, str]]
    database: str
    search_path: str


def of_url(database_url: str) -> Address | None:
    """Where a database URL of greenjobs leads; None when that cannot be said."""
    try:
        return of_parameters(extensions.parse_dsn(for_libpq(database_url)))
    except psycopg2.ProgrammingError:
        return None


def of_engine(engine: Any) -> Address | None:
    """Where a SQLAlchemy engine for PostgreSQL leads, by its URL; None when that cannot be said."""
    if engine.dialect.name != "postgresql":
        return None
    url = engine.url
    if engine.dialect.driver in ("psycopg2", "psycopg"):
        _, parameters = engine.dialect.create_connect_args(url)
        return of_parameters(parameters)
    return of_parameters({"host": url.host, "port": url.port, "dbname": url.database})


def for_libpq(database_url: str) -> str:
    """The same, as libpq takes it; starts the embedded server where the URL names one."""
    if embedded.is_embedded_url(database_url):
        return embedded.start(database_url, project_folder=config.project_folder())
    return database_url


def of_parameters(parameters: Mapping[str, Any]) -> Address | None:
    """Where these parameters of libpq lead; None when that cannot be said."""
    # The text of each as libpq would have it; SQLAlchemy 1.4 names the database otherwise.
    given = {name: str(value) for name, value in parameters.items() if value is not None}

    def value(name: str, variable: str, default: str = "") -> str:
        return given.get(name) or os.environ.get(variable) or default

    database = given.get("database") or value("dbname", "PGDATABASE")
    if not database or "service" in given or given.get("target_session_attrs", "") not in _WRITABLE:
        return None
    hosts = (given.get("hostaddr") or value("host", "PGHOST")).lower().split(",")
    ports = value("port", "PGPORT", _DEFAULT_PORT).split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    if len(hosts) != len(ports):
        return None
    servers = frozenset(
        ("localhost" if host in _LOCAL_NAMES else host, port or _DEFAULT_PORT)
        for host, port in zip(hosts, ports, strict=True)
    )
    options = given.get("options", "")
    search_path = re.sub(r"\s|\\", "", options) if "search_path" in options else ""
    return Address(servers, database, search_path)
