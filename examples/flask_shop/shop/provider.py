"""The payment provider, which is somebody else in real life. It charges nobody, and remembers what it was asked.

POST /provider/charges    Idempotency-Key: order-17    amount=15.80
"""

from __future__ import annotations

import time
from decimal import Decimal, InvalidOperation

from flask import Blueprint, jsonify, request
from sqlalchemy.dialects import postgresql
from werkzeug.wrappers import Response

from shop.models import Charge, db

MOST = Decimal("1000.00")
THINKS_SECONDS = 0.2

provider = Blueprint("provider", __name__)


@provider.post("/charges")
def charge() -> tuple[Response, int]:
    """Charge once for each key, however often it is asked."""
    key = request.headers.get("Idempotency-Key", "")
    try:
        amount = Decimal(request.form.get("amount", ""))
    except InvalidOperation:
        amount = Decimal("NaN")
    if not key or not amount.is_finite() or amount <= 0:
        return jsonify(error="an Idempotency-Key and an amount are needed"), 400
    time.sleep(THINKS_SECONDS)  # forty-nine other jobs go on meanwhile
    if amount > MOST:
        return jsonify(error="declined"), 402
    asked = postgresql.insert(Charge).values(key=key, amount=amount)
    again = {"asked": Charge.asked + 1}
    db.session.execute(asked.on_conflict_do_update(index_elements=[Charge.key], set_=again))
    db.session.commit()
    return jsonify(receipt=f"receipt-of-{key}"), 200
