"""Enqueues jobs: through greenjobs, or by the plain INSERT that is its limit."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

from benchmarks.backlog import BARE_CHANNEL, INSERT_ONE, INSERT_ONE_BARE, INSERT_SEVERAL
from benchmarks.programs import protocol, work

_BATCH = 1000
_WARM_UP = 10


class Greenjobs:
    """Enqueues as an application does."""

    def __init__(self, order: dict[str, Any]) -> None:
        from benchmarks.programs import jobs
        from greenjobs.config import configure

        configure(database_url=order["database_url"], enqueue_connections=order["concurrency"])
        self._noop, self._stamp = jobs.JOBS["noop"], jobs.JOBS["stamp"]
        self._to = recipient(order)

    def one(self, number: int) -> None:
        """Enqueue one job, committed."""
        self._noop.delay(number, to=self._to)

    def several(self, count: int) -> None:
        """Enqueue that many in one transaction."""
        self._noop.delay_many([(number, self._to) for number in range(count)])

    def stamped(self) -> None:
        """Enqueue one job that knows when."""
        self._stamp.delay(time.monotonic_ns())


class Raw:
    """Inserts rows, waking nobody unless they are stamped; the payloads of `several` are encoded beforehand."""

    def __init__(self, order: dict[str, Any]) -> None:
        from queue import LifoQueue

        import psycopg2

        self._to = recipient(order)
        self._connections: LifoQueue[Any] = LifoQueue()
        for _ in range(order["concurrency"]):
            connection = psycopg2.connect(order["database_url"])
            connection.autocommit = True
            self._connections.put(connection)
        self._encoded = [self._data(number) for number in range(order["jobs"] if order["mode"] == "several" else 0)]

    def one(self, number: int) -> None:
        """Insert one job, committed."""
        self._execute([(INSERT_ONE, {"data": self._data(number)})])

    def several(self, count: int) -> None:
        """Insert that many in one transaction."""
        batches = (self._encoded[start : min(start + _BATCH, count)] for start in range(0, count, _BATCH))
        statements = [(INSERT_SEVERAL, {"data": batch}) for batch in batches]
        self._execute([("BEGIN", {}), *statements, ("COMMIT", {})])

    def stamped(self) -> None:
        """Insert one job that knows when, and notify."""
        data = json.dumps({"sent_ns": time.monotonic_ns()})
        self._execute([(INSERT_ONE_BARE, {"data": data, "channel": BARE_CHANNEL})])

    def _data(self, number: int) -> str:
        return json.dumps({"n": number, "to": self._to})

    def _execute(self, statements: list[tuple[str, dict[str, Any]]]) -> None:
        connection = self._connections.get()
        try:
            with connection.cursor() as cursor:
                for statement, parameters in statements:
                    cursor.execute(statement, parameters)
        finally:
            self._connections.put(connection)


def recipient(order: dict[str, Any]) -> str:
    """The longest argument of the jobs: an address, or as many characters as are ordered."""
    return "".join(random.choices("0123456789abcdef", k=order["payload_bytes"])) or work.RECIPIENT


def one_after_the_other(sender: Greenjobs | Raw, order: dict[str, Any]) -> None:
    """All jobs from one caller."""
    for number in range(order["jobs"]):
        sender.one(number)


def side_by_side(sender: Greenjobs | Raw, order: dict[str, Any]) -> None:
    """All jobs from `concurrency` callers, each of whom waits for its commit."""
    from gevent.pool import Pool

    for _ in Pool(order["concurrency"]).imap_unordered(sender.one, range(order["jobs"])):
        pass


def together(sender: Greenjobs | Raw, order: dict[str, Any]) -> None:
    """All jobs in one call."""
    sender.several(order["jobs"])


def now_and_then(sender: Greenjobs | Raw, order: dict[str, Any]) -> None:
    """Jobs that know when they were sent, with pauses in between."""
    shortest, longest = order["pause_ms"]
    for _ in range(order["jobs"]):
        time.sleep(random.uniform(shortest, longest) / 1000)
        sender.stamped()


MODES: dict[str, Callable[[Greenjobs | Raw, dict[str, Any]], None]] = {
    "one": one_after_the_other,
    "concurrent": side_by_side,
    "several": together,
    "paced": now_and_then,
}


def main() -> None:
    """Enqueue, and report how long it took."""
    order = protocol.receive_order()
    if order["mode"] == "concurrent":
        from greenjobs import green

        green.patch()
    sender = Greenjobs(order) if order["side"] == "greenjobs" else Raw(order)
    enqueue = MODES[order["mode"]]
    # Opening connections and filling caches is not part of the rate. Stamps are all counted by who runs them.
    warm_up = 0 if order["mode"] == "paced" else min(max(order["concurrency"], _WARM_UP), order["jobs"])
    enqueue(sender, {**order, "jobs": warm_up})
    protocol.wait_for_go()
    started = time.monotonic()
    enqueue(sender, order)
    protocol.send_report({"seconds": time.monotonic() - started, "enqueued": warm_up + order["jobs"]})


if __name__ == "__main__":
    main()
