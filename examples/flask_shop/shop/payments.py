"""The client of the payment provider, which is asked over HTTP."""

from __future__ import annotations

import json
from decimal import Decimal
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from flask import current_app

TIMEOUT_SECONDS = 10
PAYMENT_REQUIRED = 402


class Declined(Exception):
    """The bank says no, and will say so again."""


def charge(amount: Decimal, *, key: str) -> str:
    """Charge the amount; returns the number of the receipt. Whoever asks again with the same key gets the same one.

    Raises Declined; and OSError when there is no answer, or another than yes or no, so that nobody knows: ask again.
    """
    request = Request(
        f"{current_app.config['PAYMENTS_URL']}/charges",
        data=urlencode({"amount": amount}).encode(),
        headers={"Idempotency-Key": key},
    )
    try:
        with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            return str(json.load(answer)["receipt"])
    except HTTPError as error:
        with error:
            if error.code == PAYMENT_REQUIRED:
                raise Declined(key) from None
            raise
