"""The tests have a database of their own, and every test a transaction in it that is rolled back at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient

from greenjobs.contrib.flask import sqlalchemy_url
from shop import create_app, make_tables
from shop.models import db


@pytest.fixture(scope="session")
def database_url() -> Iterator[str]:
    """A new database beside the one of the settings, in which somebody may have ordered by hand."""
    url = sa.make_url(sqlalchemy_url())
    name = f"{url.database}_test"
    server = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        drop = sa.text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        connection.execute(drop)  # what a killed run has left
        connection.execute(sa.text(f'CREATE DATABASE "{name}"'))
        yield url.set(database=name).render_as_string(hide_password=False)
        connection.execute(drop)
    server.dispose()


@pytest.fixture(scope="session")
def application(database_url: str) -> Flask:
    app = create_app(TESTING=True, SQLALCHEMY_DATABASE_URI=database_url, GREENJOBS_DATABASE_URL=database_url)
    make_tables(app)
    with app.app_context():
        # What the shop commits is then a savepoint of the test's transaction.
        db.session.configure(join_transaction_mode="create_savepoint")
    return app


@pytest.fixture
def app(application: Flask) -> Iterator[Flask]:
    """The shop, in a context, in which its jobs run, too."""
    with application.app_context():
        engine = db.engines[None]
        with engine.connect() as connection, connection.begin() as transaction:
            db.engines[None] = connection
            try:
                yield application
            finally:
                db.session.remove()
                db.engines[None] = engine
                transaction.rollback()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def greenjobs_connection(app: Flask) -> Any:
    """The pytest plugin of greenjobs enqueues and drains in this transaction."""
    connection = db.engines[None]
    assert isinstance(connection, sa.Connection)
    return connection.connection.driver_connection
