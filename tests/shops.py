"""A shop with Flask-SQLAlchemy and the extension, for the tests of both; each application has engines of its own."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import databases
import pytest
import running
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

import greenjobs
from greenjobs import config, pool
from greenjobs.contrib.flask import GreenJobs

db = SQLAlchemy()
_made: weakref.WeakSet[Flask] = weakref.WeakSet()


class Order(db.Model):  # type: ignore[name-defined, misc]
    """What a shop is about."""

    __tablename__ = "shop_order"

    id = db.Column(db.Integer, primary_key=True)
    customer = db.Column(db.String, nullable=False)
    note = db.Column(db.String)


def make_shop(database_url: str, **settings: Any) -> Flask:
    """An application with its tables, in this database unless the settings say otherwise."""
    app = Flask("shop")
    app.config.update(
        SQLALCHEMY_DATABASE_URI=databases.sqlalchemy_url(database_url),
        SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 60, "max_overflow": 0},
    )
    app.config.update(settings)
    db.init_app(app)
    GreenJobs(app)
    _made.add(app)
    with app.app_context():
        db.create_all(bind_key=None)  # metadata of other keys, made for other tests, stay with the shared db
    return app


def engines(app: Flask) -> list[sa.Engine]:
    # Without a context, whose functions of teardown some tests let fail.
    return list(db._app_engines[app].values())


@contextlib.contextmanager
def application(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[running.Database]:
    """As in `running`, but where applications say which database; none of them is left behind."""
    for variable in ("DATABASE_URL", "GREENJOBS_DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    known = set(pool._shared_pools)
    with running.application(url) as database:
        greenjobs.configure()
        try:
            yield database
        finally:
            config.adopt(None)
            for app in list(_made):
                for engine in engines(app):
                    engine.dispose()
            _made.clear()
            for left in set(pool._shared_pools) - known - {url}:
                pool._shared_pools.pop(left).close()
