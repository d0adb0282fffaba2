"""A shop: a form places an order, a background job charges the customer, another one writes a mail.

Plain synchronous code. `models` has the tables, `views` the pages, `jobs` what happens in the background; `payments`
and `mail` talk to others, and `provider` plays one of these, for nobody here wants to be charged.
"""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.dialects import postgresql

from greenjobs import config, migrate
from greenjobs.contrib.flask import GreenJobs, sqlalchemy_url
from shop import jobs, provider, views
from shop.models import CATALOGUE, FIRST_STOCK, Item, db

__all__ = ["create_app", "jobs", "make_tables"]


def create_app(**settings: Any) -> Flask:
    """The shop. A setting is a default of below, a variable of the environment such as SHOP_SMTP, or an argument."""
    app = Flask(__name__)
    app.config.update(
        # The shop's tables lie beside those of greenjobs. Most applications go the other way round: they name their
        # database here, and greenjobs finds it.
        SQLALCHEMY_DATABASE_URI=sqlalchemy_url(),
        # For three queues with fifty jobs at a time each. A connection is opened when it is needed; few are, as no job
        # keeps one while it waits for others.
        SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 10, "max_overflow": 140},
        # Who charges customers: the shop itself plays that, too, and listens where `flask run` does.
        PAYMENTS_URL=f"http://127.0.0.1:{os.environ.get('FLASK_RUN_PORT', '5000')}/provider",
        # The mail server, as host:port. Without one, mails are printed.
        SMTP="",
        SENDER="shop@example.com",
        MANAGER="manager@example.com",
    )
    app.config.from_prefixed_env("SHOP")
    app.config.update(settings)
    db.init_app(app)
    GreenJobs(app)
    app.register_blueprint(views.pages)
    app.register_blueprint(provider.provider, url_prefix="/provider")
    return app


def make_tables(app: Flask) -> None:
    """Make what is missing: the tables of greenjobs, those of the shop, and something to sell."""
    with app.app_context():
        migrate.migrate(config.current().require_database_url())
        with db.engine.begin() as connection:
            # Not two at once: CREATE TABLE fails where another process is just creating the same table.
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext("shop"))))
            db.metadata.create_all(connection)
            stock = [{"name": name, "price": price, "stock": FIRST_STOCK} for name, price in CATALOGUE.items()]
            connection.execute(postgresql.insert(Item).on_conflict_do_nothing(), stock)
        # None stays open that the workers of `gunicorn --preload` would inherit, and share.
        db.engine.dispose()
