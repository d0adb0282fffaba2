"""A shop: a form places an order, and a background job confirms it by mail.

    flask run                     # in one terminal; the page is at http://127.0.0.1:5000
    greenjobs run --pool 50       # in another

Plain synchronous code, with Flask-SQLAlchemy. Both processes import this module, and whichever comes first makes the
tables. The database is the one that setup.cfg names; set GREENJOBS_DATABASE_URL for another.
"""

from __future__ import annotations

import re
import time
from typing import Any

import sqlalchemy as sa
from flask import Flask, redirect, render_template, request, url_for
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.dialects import postgresql
from werkzeug.wrappers import Response

from greenjobs import config, job, migrate
from greenjobs.contrib.flask import GreenJobs, sqlalchemy_url

CATALOGUE = ("Rubber duck", "Notebook", "Coffee mug")
MOST_PIECES = 100
FIRST_STOCK = 1000

app = Flask(__name__)
# The shop's tables lie beside those of greenjobs. Most applications go the other way round: they name their database
# here, and greenjobs finds it.
app.config["SQLALCHEMY_DATABASE_URI"] = sqlalchemy_url()
# As many as jobs run at a time; they are opened when they are needed.
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 10, "max_overflow": 40}
db = SQLAlchemy(app)
GreenJobs(app)


class Item(db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "shop_items"
    __table_args__ = (sa.CheckConstraint("stock >= 0"),)

    name = db.Column(sa.Text, primary_key=True)
    stock = db.Column(sa.Integer, nullable=False)


class Order(db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "shop_orders"

    id = db.Column(sa.Integer, primary_key=True)
    customer = db.Column(sa.Text, nullable=False)
    item = db.Column(sa.ForeignKey(Item.name), nullable=False)
    quantity = db.Column(sa.Integer, nullable=False)
    placed_at = db.Column(sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())
    confirmed_at = db.Column(sa.DateTime(timezone=True))


class Mail(db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "shop_mails"

    id = db.Column(sa.Integer, primary_key=True)
    recipient = db.Column(sa.Text, nullable=False)
    subject = db.Column(sa.Text, nullable=False)
    body = db.Column(sa.Text, nullable=False)
    sent_at = db.Column(sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())


@app.get("/")
def show_orders() -> str:
    return orders_page()


@app.post("/orders")
def place_order() -> Response | tuple[str, int]:
    customer = request.form.get("customer", "").strip()
    item = request.form.get("item", "")
    quantity = request.form.get("quantity", "")
    mistake = mistake_in(customer, item, quantity)
    if mistake:
        return orders_page(mistake), 400
    order = Order(customer=customer, item=item, quantity=int(quantity))
    db.session.add(order)
    db.session.flush()  # it has its id from here on
    # In the order's own transaction, because that is what the session is in: either both are there, or neither.
    confirm_order.delay(order.id)
    try:
        take_from_stock(item, int(quantity))
    except sa.exc.IntegrityError:
        db.session.rollback()  # takes the order along, and the job
        return orders_page(f"We have not got so many of these: {item}."), 409
    db.session.commit()
    return redirect(url_for("show_orders", placed=order.id), code=303)


@job(queue="mail")
def confirm_order(order_id: int) -> None:
    """Write to the customer. A job may run twice, when its runner died; the customer still gets one mail."""
    time.sleep(0.5)  # the mail server thinks; forty-nine other confirmations go on meanwhile
    order = db.session.get(Order, order_id, with_for_update=True)
    if order is not None and order.confirmed_at is None:
        order.confirmed_at = sa.func.now()
        send_mail(order.customer, f"Your order {order.id}", f"Thank you for ordering {order.quantity} × {order.item}.")
        db.session.commit()


def send_mail(recipient: str, subject: str, body: str) -> None:
    """Put a mail in the outbox, which is a table here, so that you can see it on the page."""
    db.session.add(Mail(recipient=recipient, subject=subject, body=body))


def take_from_stock(item: str, quantity: int) -> None:
    """Raises IntegrityError when there are not so many: the database watches over that."""
    db.session.execute(sa.update(Item).where(Item.name == item).values(stock=Item.stock - quantity))


def mistake_in(customer: str, item: str, quantity: str) -> str:
    """What is wrong with the form, in a sentence for the customer; empty when nothing is."""
    if len(customer) > 200 or not re.fullmatch(r"[^@\s\x00-\x1f]+@[^@\s\x00-\x1f]+", customer):
        return "Please give an e-mail address, such as ann@example.com."
    if item not in CATALOGUE:
        return "Please choose something that we sell."
    if not re.fullmatch(r"[0-9]{1,3}", quantity) or not 1 <= int(quantity) <= MOST_PIECES:
        return f"Please order 1 to {MOST_PIECES} pieces."
    return ""


def orders_page(mistake: str = "") -> str:
    return render_template(
        "orders.html",
        orders=newest(Order),
        mails=newest(Mail),
        catalogue=CATALOGUE,
        most=MOST_PIECES,
        mistake=mistake,
    )


def newest(model: Any) -> list[Any]:
    return list(db.session.scalars(sa.select(model).order_by(model.id.desc()).limit(20)))


def make_tables() -> None:
    # For a demonstration. Elsewhere this is a step of the deployment: `flask greenjobs migrate`.
    migrate.migrate(config.current().require_database_url())
    with app.app_context(), db.engine.begin() as connection:
        # Not two at once: CREATE TABLE fails where another process is just creating the same table.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext("shop"))))
        db.metadata.create_all(connection)
        stock = [{"name": name, "stock": FIRST_STOCK} for name in CATALOGUE]
        connection.execute(postgresql.insert(Item).on_conflict_do_nothing(), stock)


make_tables()
