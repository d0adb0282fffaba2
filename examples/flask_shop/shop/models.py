"""The tables of the shop."""

from __future__ import annotations

from decimal import Decimal

import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy

CATALOGUE = {"Rubber duck": Decimal("4.50"), "Notebook": Decimal("7.90"), "Coffee mug": Decimal("12.00")}
MOST_PIECES = 100
FIRST_STOCK = 1000

db = SQLAlchemy()


class Item(db.Model):  # type: ignore[name-defined, misc]
    """Something that is sold."""

    __tablename__ = "shop_items"
    __table_args__ = (sa.CheckConstraint("stock >= 0"),)

    name = db.Column(sa.Text, primary_key=True)
    price = db.Column(sa.Numeric(10, 2), nullable=False)
    stock = db.Column(sa.Integer, nullable=False)


class Order(db.Model):  # type: ignore[name-defined, misc]
    """What a customer wants. It waits, until it is either paid or declined."""

    __tablename__ = "shop_orders"

    id = db.Column(sa.Integer, primary_key=True)
    customer = db.Column(sa.Text, nullable=False)
    item = db.Column(sa.ForeignKey(Item.name), nullable=False)
    quantity = db.Column(sa.Integer, nullable=False)
    total = db.Column(sa.Numeric(10, 2), nullable=False)
    placed_at = db.Column(sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())
    paid_at = db.Column(sa.DateTime(timezone=True))
    declined_at = db.Column(sa.DateTime(timezone=True))


class Booking(db.Model):  # type: ignore[name-defined, misc]
    """A line of the ledger: an order that was paid.

    That a job books once, though it may run twice, is the doing of current_job.transaction(). The constraint is for
    two jobs that somebody enqueues for the same order.
    """

    __tablename__ = "shop_ledger"

    id = db.Column(sa.Integer, primary_key=True)
    order_id = db.Column(sa.ForeignKey(Order.id), nullable=False, unique=True)
    amount = db.Column(sa.Numeric(10, 2), nullable=False)
    receipt = db.Column(sa.Text, nullable=False)
    booked_at = db.Column(sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())


class Charge(db.Model):  # type: ignore[name-defined, misc]
    """What the payment provider remembers of a key; not the shop's business."""

    __tablename__ = "provider_charges"

    key = db.Column(sa.Text, primary_key=True)
    amount = db.Column(sa.Numeric(10, 2), nullable=False)
    asked = db.Column(sa.Integer, nullable=False, server_default="1")


def take_from_stock(item: str, quantity: int) -> None:
    """Raises IntegrityError when there are not so many: the database watches over that."""
    db.session.execute(sa.update(Item).where(Item.name == item).values(stock=Item.stock - quantity))
