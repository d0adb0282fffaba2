"""The application of the tests of exactly-once: money goes from account to account, each time in one transaction with
the end of the job, and with a receipt, which is a job, too.

With FAULTS_DIE_IN=block, or commit, the process kills itself at that place of its first transfer; the places between
are boundaries of storage.acknowledge, see faults.application.
"""

from __future__ import annotations

import os
import signal

from greenjobs import current_job, job

from . import application

_DIE_IN = os.environ.get("FAULTS_DIE_IN")

# So long it is under way, at least.
_SECONDS = 0.005

# A transfer that was cut off is tried again at once, and as often as it takes.
_OFTEN = 10_000


@job(max_retries=_OFTEN, backoff=[0.01, 0.1])
def transfer(token: str, number: int, source: int, target: int, amount: int) -> None:
    """Move money, once."""
    run = application.begin()
    with current_job.transaction() as connection, connection.cursor() as cursor:
        # In one order, so that two transfers between the same accounts wait for each other.
        for account, change in sorted([(source, -amount), (target, amount)]):
            cursor.execute("UPDATE faults_accounts SET balance = balance + %s WHERE id = %s", (change, account))
        cursor.execute("INSERT INTO faults_transfers (number) SELECT %s FROM pg_sleep(%s)", (number, _SECONDS))
        receipt.delay(token=f"receipt-{token}", number=number)
        _die_in("block")
    _die_in("commit")
    application.end(run)


@job(max_retries=_OFTEN, backoff=[0.01, 0.1])
def receipt(token: str, number: int) -> None:
    """Write a receipt, once."""
    run = application.begin()
    with current_job.transaction() as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO faults_receipts (number) VALUES (%s)", (number,))
    application.end(run)


def _die_in(place: str) -> None:
    if place == _DIE_IN:
        os.kill(os.getpid(), signal.SIGKILL)
