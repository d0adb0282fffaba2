"""The page of the shop, and what its form does."""

from __future__ import annotations

import re

import sqlalchemy as sa
from flask import Blueprint, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from shop import jobs
from shop.models import CATALOGUE, MOST_PIECES, Booking, Order, db, take_from_stock

pages = Blueprint("pages", __name__)

# What browsers take for an address, as HTML defines it.
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*")


@pages.get("/")
def show_orders() -> str:
    return orders_page()


@pages.post("/orders")
def place_order() -> Response | tuple[str, int]:
    customer = request.form.get("customer", "").strip()
    item = request.form.get("item", "")
    quantity = request.form.get("quantity", "")
    mistake = mistake_in(customer, item, quantity)
    if mistake:
        return orders_page(mistake), 400
    order = Order(customer=customer, item=item, quantity=int(quantity), total=CATALOGUE[item] * int(quantity))
    db.session.add(order)
    db.session.flush()  # it has its id from here on
    # In the order's own transaction, because that is what the session is in: either both are there, or neither.
    jobs.charge.delay(order.id)
    try:
        take_from_stock(item, int(quantity))
    except sa.exc.IntegrityError:
        db.session.rollback()  # takes the order along, and the job
        return orders_page(f"We have not got so many of these: {item}."), 409
    db.session.commit()
    return redirect(url_for("pages.show_orders", placed=order.id), code=303)


def mistake_in(customer: str, item: str, quantity: str) -> str:
    """What is wrong with the form, in a sentence for the customer; empty when nothing is."""
    if len(customer) > 200 or not _ADDRESS.fullmatch(customer):
        return "Please give an e-mail address, such as ann@example.com."
    if item not in CATALOGUE:
        return "Please choose something that we sell."
    if not re.fullmatch(r"[0-9]{1,3}", quantity) or not 1 <= int(quantity) <= MOST_PIECES:
        return f"Please order 1 to {MOST_PIECES} pieces."
    return ""


def orders_page(mistake: str = "") -> str:
    return render_template(
        "orders.html",
        orders=list(db.session.scalars(sa.select(Order).order_by(Order.id.desc()).limit(20))),
        income=db.session.scalar(sa.select(sa.func.coalesce(sa.func.sum(Booking.amount), 0))),
        catalogue=CATALOGUE,
        most=MOST_PIECES,
        mistake=mistake,
    )
