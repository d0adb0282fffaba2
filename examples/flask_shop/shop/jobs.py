"""What the shop does in the background. `greenjobs run` gives every job a context of the application."""

from __future__ import annotations

import smtplib
from datetime import datetime, timedelta, timezone

import sqlalchemy as sa
from flask import current_app

from greenjobs import current_job, job
from shop import mail, payments
from shop.models import Booking, Order, db, take_from_stock

# Seconds. The provider and the mail server may be away for a moment, or for an hour.
BACKOFF = [1, 5, 30, 300, 1800]


@job(queue="payments", backoff=BACKOFF, timeout=60)
def charge(order_id: int) -> None:
    """Take the money, and book it: once, whatever is killed, and whenever.

    The provider is asked outside of any transaction, and may be asked again with the same key, which it takes for the
    same charge. What is written here, the mail to the customer and the end of this job are then committed together.
    """
    order = db.session.get(Order, order_id)
    if order is None or order.paid_at or order.declined_at:
        return
    customer, what, total = order.customer, f"{order.quantity} × {order.item}", order.total
    db.session.commit()  # gives the connection back while the provider thinks
    try:
        receipt = payments.charge(total, key=f"order-{order_id}")
    except payments.Declined:
        with current_job.transaction(db.session):
            order.declined_at = sa.func.now()
            take_from_stock(order.item, -order.quantity)
            send_mail.delay(customer, f"Your order {order_id}", f"Your bank declined {total}. Nothing was charged.")
        return
    with current_job.transaction(db.session):
        order.paid_at = sa.func.now()
        db.session.add(Booking(order_id=order_id, amount=total, receipt=receipt))
        send_mail.delay(customer, f"Your order {order_id}", f"Thank you for ordering {what}. You paid {total}.")


# An address that the server refuses will not be better in five minutes.
@job(queue="mail", backoff=BACKOFF, timeout=60, discard_on=(smtplib.SMTPRecipientsRefused,))
def send_mail(recipient: str, subject: str, body: str) -> None:
    """A mail is sent at least once: whether the server took it is known only when it has answered.

    Two of the same have the same Message-ID, by which mail programs find out.
    """
    mail.send(recipient, subject, body, message_id=f"<job-{current_job.id}@shop.example.com>")


@job(queue="reports", cron="0 2 * * *")
def report_sales() -> None:
    """Every night at two, UTC: what was booked in the day before. By hand: in the last 24 hours."""
    until = current_job.tick_at or datetime.now(timezone.utc)
    booked = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(Booking.amount), 0))
    with current_job.transaction(db.session):  # so that it is reported once
        count, amount = db.session.execute(
            booked.where(Booking.booked_at >= until - timedelta(days=1), Booking.booked_at < until)
        ).one()
        send_mail.delay(current_app.config["MANAGER"], f"Sales until {until:%Y-%m-%d %H:%M}", f"{count} for {amount}")
