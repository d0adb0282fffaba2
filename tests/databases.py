"""Databases for tests: which server they live on, and fresh copies of a migrated template.

The server is $GREENJOBS_TEST_DATABASE_URL if set, else a container if a Docker daemon answers, else the embedded one.
GREENJOBS_TEST_BACKEND=url|docker|embedded forces one of them, and its failure is then an error. Names of databases hold
a random part, so that several runs can share a server.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from urllib.parse import urlsplit

import psycopg2
import pytest
from psycopg2 import extensions

from greenjobs import embedded

_IMAGE = os.environ.get("GREENJOBS_TEST_PG_IMAGE", "postgres:17-alpine")
_FAST_SERVER = "postgres -c fsync=off -c synchronous_commit=off -c full_page_writes=off -c max_connections=300"

# testcontainers waits 60 s for a socket on which nobody answers.
_DOCKER_ANSWER_SECONDS = 3

_FIRST_WITH_STRATEGY = 150000  # server_version of the first with CREATE DATABASE ... STRATEGY

_SESSION_END_SECONDS = 5.0
_SESSION_POLL_SECONDS = 0.002


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of a database on the server to test with; its account must be allowed to create databases."""
    backend = os.environ.get("GREENJOBS_TEST_BACKEND", "")
    url = os.environ.get("GREENJOBS_TEST_DATABASE_URL", "")
    if backend not in ("", "url", "docker", "embedded"):
        raise pytest.UsageError(f"GREENJOBS_TEST_BACKEND={backend}: must be url, docker or embedded")
    if backend == "url" and not url:
        raise pytest.UsageError("GREENJOBS_TEST_BACKEND=url needs GREENJOBS_TEST_DATABASE_URL")
    with contextlib.ExitStack() as stack:
        if backend == "url" or (url and not backend):
            yield url
        elif backend == "docker":
            yield stack.enter_context(_container())
        elif backend == "embedded":
            yield stack.enter_context(embedded.temporary())
        else:
            yield _container_if_possible(stack) or stack.enter_context(embedded.temporary())


@contextlib.contextmanager
def template(server_url: str) -> Iterator[str]:
    """The name of a migrated database, to be copied; nobody may be connected to it meanwhile."""
    from greenjobs.migrate import migrate

    with fresh(server_url) as url:
        migrate(url)
        yield _name_in(url)


@contextlib.contextmanager
def fresh(server_url: str, *, template: str = "template0") -> Iterator[str]:
    """The URL of a new database, a copy of the template; dropped at the end, whoever is still connected."""
    name = f"greenjobs_test_{uuid.uuid4().hex}"
    with administration(server_url) as cursor:
        # Copying files beats writing a template of this size to the log.
        strategy = " STRATEGY file_copy" if cursor.connection.server_version >= _FIRST_WITH_STRATEGY else ""
        cursor.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"{strategy}')
    try:
        yield with_database(server_url, name)
    finally:
        with administration(server_url) as cursor:
            _end_sessions(cursor, name)
            cursor.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@contextlib.contextmanager
def administration(url: str) -> Iterator[extensions.cursor]:
    """A cursor on a connection of its own, in autocommit."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def with_database(url: str, name: str) -> str:
    """The same address with another database: a URL stays a URL, a keyword string a keyword string."""
    if "://" not in url:
        return str(extensions.make_dsn(url, dbname=name))
    parts = urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}/{name}{query}"


def sqlalchemy_url(url: str) -> str:
    """The same database as SQLAlchemy names it, through psycopg2."""
    from sqlalchemy import URL

    given = extensions.parse_dsn(url)
    address = {"host": given.pop("host", None), "database": given.pop("dbname", None)}
    address |= {"username": given.pop("user", None), "password": given.pop("password", None)}
    if (address["host"] or "").startswith("/"):
        given["host"] = address.pop("host")
    port = int(given.pop("port")) if "port" in given and "host" not in given else None
    made = URL.create("postgresql+psycopg2", **address, port=port, query=given)
    return made.render_as_string(hide_password=False)


def _name_in(url: str) -> str:
    return str(extensions.parse_dsn(url)["dbname"])


def _end_sessions(cursor: extensions.cursor, name: str) -> None:
    """End the sessions of a database and wait for it, as DROP ... WITH (FORCE) does, which looks every 100 ms only."""
    deadline = time.monotonic() + _SESSION_END_SECONDS
    while time.monotonic() < deadline:
        cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        if not cursor.rowcount:
            return
        time.sleep(_SESSION_POLL_SECONDS)


def _container_if_possible(stack: contextlib.ExitStack) -> str:
    if not _docker_answers():
        return ""
    try:
        return stack.enter_context(_container())
    except Exception as error:  # such as an image that cannot be pulled; there is another way
        print(f"Docker answers, but gives no container: {error!r}; using the embedded server", file=sys.stderr)
        return ""


def _docker_answers() -> bool:
    """Ask through testcontainers' own client, which honours DOCKER_HOST, contexts and its properties file."""
    import docker.errors
    from testcontainers.core.docker_client import DockerClient

    with warnings.catch_warnings():
        # The docker package forgets the socket over which it got no answer. Collected here, lest a test is blamed.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            return bool(DockerClient(timeout=_DOCKER_ANSWER_SECONDS).client.ping())
        except (docker.errors.DockerException, OSError):  # requests' errors are OSErrors
            return False
        finally:
            gc.collect()


@contextlib.contextmanager
def _container() -> Iterator[str]:
    from testcontainers.community.postgres import PostgresContainer

    # Without driver=None the URL is one of SQLAlchemy's, which libpq refuses.
    with PostgresContainer(_IMAGE, driver=None).with_command(_FAST_SERVER) as container:
        yield container.get_connection_url()
