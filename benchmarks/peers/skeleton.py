"""What all programs of peers have in common: they read an order, and have the peer do it.

The standard library alone, beside the peer: the interpreter that has the peers need not have greenjobs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Protocol

from benchmarks.programs import protocol
from benchmarks.programs.tally import tally


class Peer(Protocol):
    """A job queue that runs work.noop and work.stamp. Connection parameters are libpq's, by name."""

    def install(self) -> None:
        """Make the tables."""

    def open(self) -> None:
        """Connect, to enqueue."""

    def enqueue(self, jobs: int) -> None:
        """Enqueue that many no-ops one after the other, each committed before the next."""

    def enqueue_several(self, jobs: int) -> None:
        """Enqueue that many no-ops together, in the way the peer has for it."""

    def stamp(self) -> None:
        """Enqueue one stamp of now."""

    def run(self, order: dict[str, Any], wait: Callable[[], Any]) -> None:
        """Run jobs, `order["pool"]` at a time, until `wait`, which blocks its thread, returns."""


def main(connect: Callable[[dict[str, str]], Peer]) -> None:
    """Do what is ordered."""
    order = protocol.receive_order()
    peer = connect(order["parameters"])
    if order["action"] == "install":
        peer.install()
        protocol.wait_for_go()
        protocol.send_report({})
    elif order["action"] == "run":
        tally.open(order["tally"], mark_every=order["mark_every"])
        protocol.wait_for_go()
        peer.run(order, protocol.next_command)
        protocol.send_report(tally.report())
    else:
        _enqueue(peer, order)


def _enqueue(peer: Peer, order: dict[str, Any]) -> None:
    jobs, warm_up = order["jobs"], order.get("warm_up", 0)
    peer.open()
    if warm_up:
        peer.enqueue(warm_up)
    protocol.wait_for_go()
    started = time.monotonic()
    if order["action"] == "one":
        peer.enqueue(jobs)
    elif order["action"] == "several":
        peer.enqueue_several(jobs)
    else:
        shortest, longest = order["pause_ms"]
        for _ in range(jobs):
            time.sleep(random.uniform(shortest, longest) / 1000)
            peer.stamp()
    protocol.send_report({"seconds": time.monotonic() - started, "enqueued": jobs + warm_up})
