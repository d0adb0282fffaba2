"""Huey on PostgreSQL, with greenlets."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
from huey import PostgresHuey  # type: ignore[import-not-found]  # noqa: E402

from benchmarks.peers import skeleton  # noqa: E402
from benchmarks.programs import work  # noqa: E402


class Peer:
    """See skeleton.Peer."""

    def __init__(self, parameters: dict[str, str]) -> None:
        # Results are not kept, as greenjobs keeps none. Making the object makes the tables.
        self._huey = PostgresHuey("bench", results=False, **parameters)
        self._noop = self._huey.task()(work.noop)
        self._stamp = self._huey.task()(work.stamp)

    def install(self) -> None:
        pass

    def open(self) -> None:
        pass

    def enqueue(self, jobs: int) -> None:
        for number in range(jobs):
            self._noop(number, work.RECIPIENT)

    def enqueue_several(self, jobs: int) -> None:
        raise NotImplementedError("huey has no call for this")

    def stamp(self) -> None:
        self._stamp(time.monotonic_ns())

    def run(self, order: dict[str, Any], wait: Callable[[], Any]) -> None:
        consumer = self._huey.create_consumer(workers=order["pool"], worker_type="greenlet", periodic=False)
        consumer.start()
        gevent.get_hub().threadpool.apply(wait)
        consumer.stop(graceful=True)


if __name__ == "__main__":
    skeleton.main(Peer)
