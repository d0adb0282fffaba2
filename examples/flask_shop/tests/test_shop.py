"""How to test an application that has jobs: what is enqueued, what the jobs do, and what they do when others fail."""

from __future__ import annotations

from decimal import Decimal

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient

from greenjobs import jobs as stored
from greenjobs import testing
from shop import jobs, mail, payments
from shop.models import FIRST_STOCK, Booking, Item, Order, db

pytestmark = pytest.mark.greenjobs("database")

ORDER = {"customer": "ann@example.com", "item": "Notebook", "quantity": "2"}


class Bank:
    """Says what the provider would say, and remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Decimal, str]] = []
        self.error: Exception | None = None
        monkeypatch.setattr(payments, "charge", self.charge)

    def charge(self, amount: Decimal, *, key: str) -> str:
        self.asked.append((amount, key))
        if self.error is not None:
            raise self.error
        return f"receipt-of-{key}"


@pytest.fixture
def bank(monkeypatch: pytest.MonkeyPatch) -> Bank:
    return Bank(monkeypatch)


@pytest.fixture
def order(client: FlaskClient) -> Order:
    """One that was just placed, by the form."""
    assert client.post("/orders", data=ORDER).status_code == 303
    return db.session.scalars(sa.select(Order).order_by(Order.id.desc()).limit(1)).one()


def now(order: Order) -> Order:
    """The order as it is by now: its jobs have sessions of their own."""
    db.session.refresh(order)
    return order


def stock(item: str) -> int:
    return db.session.scalar(sa.select(Item.stock).where(Item.name == item))


def test_order_enqueues_its_charge(order: Order) -> None:
    testing.assert_enqueued(jobs.charge, order.id, queue="payments", count=1)


def test_wrong_order_enqueues_nothing(client: FlaskClient) -> None:
    assert client.post("/orders", data={**ORDER, "quantity": "0"}).status_code == 400
    assert testing.enqueued_jobs() == []


def test_order_that_cannot_be_filled_is_gone_with_its_job(client: FlaskClient) -> None:
    db.session.execute(sa.update(Item).values(stock=1))
    db.session.commit()
    assert client.post("/orders", data=ORDER).status_code == 409
    assert db.session.scalar(sa.select(sa.func.count()).select_from(Order).where(Order.paid_at.is_(None))) == 0
    testing.assert_not_enqueued(jobs.charge)


def test_order_is_charged_booked_and_thanked_for(order: Order, bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    testing.drain()
    assert bank.asked == [(Decimal("15.80"), f"order-{order.id}")]
    assert db.session.scalars(sa.select(Booking.amount).filter_by(order_id=order.id)).all() == [Decimal("15.80")]
    assert now(order).paid_at
    assert "Thank you for ordering 2 × Notebook. You paid 15.80." in capsys.readouterr().out


def test_second_charge_of_the_same_order_asks_nobody(order: Order, bank: Bank) -> None:
    jobs.charge.delay(order.id)
    testing.drain()
    assert len(bank.asked) == 1


def test_declined_order_is_put_back_and_the_customer_told(
    order: Order, bank: Bank, capsys: pytest.CaptureFixture[str]
) -> None:
    bank.error = payments.Declined()
    testing.drain()
    assert now(order).declined_at and not order.paid_at
    assert stock("Notebook") == FIRST_STOCK
    assert "Your bank declined 15.80." in capsys.readouterr().out


def test_provider_that_is_away_is_asked_again_with_the_same_key(order: Order, bank: Bank) -> None:
    bank.error = ConnectionRefusedError()
    (ran,) = testing.drain(raise_errors=False)
    assert (ran.outcome, ran.retry_in, now(order).paid_at) == ("retried", 1, None)
    bank.error = None
    with testing.travel(seconds=1):
        testing.drain()
    assert now(order).paid_at
    assert bank.asked == [(Decimal("15.80"), f"order-{order.id}")] * 2


def test_mail_server_that_is_away_is_tried_again(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.config, "SMTP", "127.0.0.1:1")
    with pytest.raises(ConnectionRefusedError):
        testing.perform(jobs.send_mail, "ann@example.com", "Hello", "How are you?")
    ran = testing.perform(jobs.send_mail, "ann@example.com", "Hello", "", attempt=2, raise_errors=False)
    assert (ran.outcome, ran.retry_in) == ("retried", 5)


def test_nightly_report_has_what_was_booked(order: Order, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, ...]] = []
    monkeypatch.setattr(mail, "send", lambda *given, message_id: sent.append(given))
    testing.drain()
    jobs.report_sales.delay()
    testing.drain()
    recipient, subject, body = sent[-1]
    assert (recipient, body) == ("manager@example.com", "1 for 15.80")
    assert subject.startswith("Sales until ")
    assert stored.find(state="failed") == []
