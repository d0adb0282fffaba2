"""Every test has a database of its own: the one of the settings, in a transaction that is rolled back at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient

from shop import create_app, make_tables
from shop.models import db


@pytest.fixture(scope="session")
def application() -> Flask:
    app = create_app(TESTING=True)
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
