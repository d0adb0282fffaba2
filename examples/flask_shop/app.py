"""A shop: a form places an order, and a background job confirms it by mail.

    flask run                     # in one terminal; the page is at http://127.0.0.1:5000
    greenjobs run --pool 50       # in another

Plain synchronous code. Both processes import this module, and whichever comes first makes the tables. The database is
the one that setup.cfg names; set GREENJOBS_DATABASE_URL for another.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator

import psycopg2
import psycopg2.extras
from flask import Flask, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from greenjobs import config, embedded, job, migrate

CATALOGUE = ("Rubber duck", "Notebook", "Coffee mug")
MOST_PIECES = 100

TABLES = """
-- Not two at once: CREATE TABLE IF NOT EXISTS fails where another process is just creating the same table.
SELECT pg_advisory_xact_lock(hashtext('shop'));
CREATE TABLE IF NOT EXISTS shop_orders (
    id SERIAL PRIMARY KEY,
    customer TEXT NOT NULL,
    item TEXT NOT NULL,
    quantity INTEGER NOT NULL,
    placed_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    confirmed_at TIMESTAMPTZ
);
CREATE TABLE IF NOT EXISTS shop_mails (
    id SERIAL PRIMARY KEY,
    recipient TEXT NOT NULL,
    subject TEXT NOT NULL,
    body TEXT NOT NULL,
    sent_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
"""

app = Flask(__name__)


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
    with transaction() as cursor:
        cursor.execute(
            "INSERT INTO shop_orders (customer, item, quantity) VALUES (%s, %s, %s) RETURNING id",
            (customer, item, int(quantity)),
        )
        order_id = cursor.fetchone()["id"]
        # In the order's own transaction: either both are there, or neither.
        confirm_order.options(connection=cursor).delay(order_id)
    return redirect(url_for("show_orders", placed=order_id), code=303)


@job(queue="mail")
def confirm_order(order_id: int) -> None:
    """Write to the customer. A job may run twice, when its runner died; the customer still gets one mail."""
    time.sleep(0.5)  # the mail server thinks; forty-nine other confirmations go on meanwhile
    with transaction() as cursor:
        cursor.execute(
            "UPDATE shop_orders SET confirmed_at = now() WHERE id = %s AND confirmed_at IS NULL RETURNING *",
            (order_id,),
        )
        order = cursor.fetchone()
        if order is not None:
            subject = f"Your order {order['id']}"
            body = f"Thank you for ordering {order['quantity']} × {order['item']}."
            send_mail(cursor, order["customer"], subject, body)


def send_mail(cursor: psycopg2.extras.RealDictCursor, recipient: str, subject: str, body: str) -> None:
    """Put a mail in the outbox, which is a table here, so that you can see it on the page."""
    cursor.execute("INSERT INTO shop_mails (recipient, subject, body) VALUES (%s, %s, %s)", (recipient, subject, body))


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
    with transaction() as cursor:
        cursor.execute("SELECT * FROM shop_orders ORDER BY id DESC LIMIT 20")
        orders = cursor.fetchall()
        cursor.execute("SELECT * FROM shop_mails ORDER BY id DESC LIMIT 20")
        mails = cursor.fetchall()
    return render_template(
        "orders.html", orders=orders, mails=mails, catalogue=CATALOGUE, most=MOST_PIECES, mistake=mistake
    )


@contextlib.contextmanager
def transaction() -> Iterator[psycopg2.extras.RealDictCursor]:
    """A connection and a transaction of its own, committed at the end of the block."""
    connection = psycopg2.connect(database_dsn())
    try:
        with connection, connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
            yield cursor
    finally:
        connection.close()


def database_dsn() -> str:
    """The shop's tables lie beside those of greenjobs; an application with a database of its own just names that."""
    url = config.current().require_database_url()
    if embedded.is_embedded_url(url):
        return embedded.start(url, project_folder=config.project_folder())
    return url


def make_tables() -> None:
    # For a demonstration. Elsewhere this is a step of the deployment: `greenjobs migrate`.
    migrate.migrate(config.current().require_database_url())
    with transaction() as cursor:
        cursor.execute(TABLES)


make_tables()
