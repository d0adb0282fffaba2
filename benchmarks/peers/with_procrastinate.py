"""Procrastinate on psycopg 3, with its asynchronous worker; finished jobs are deleted, as greenjobs does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import procrastinate  # type: ignore[import-not-found]

from benchmarks.peers import skeleton
from benchmarks.programs import work

_BATCH = 1000


class Peer:
    """See skeleton.Peer."""

    def __init__(self, parameters: dict[str, str]) -> None:
        self._loop = asyncio.new_event_loop()
        self._app = procrastinate.App(connector=procrastinate.PsycopgConnector(kwargs=parameters))
        self._noop = self._app.task(name="noop", queue="bench")(_noop)
        self._stamp = self._app.task(name="stamp", queue="bench")(_stamp)

    def install(self) -> None:
        self.open()
        self._loop.run_until_complete(self._app.schema_manager.apply_schema_async())

    def open(self) -> None:
        self._loop.run_until_complete(self._app.open_async())

    def enqueue(self, jobs: int) -> None:
        async def enqueue() -> None:
            for number in range(jobs):
                await self._noop.defer_async(n=number, to=work.RECIPIENT)

        self._loop.run_until_complete(enqueue())

    def enqueue_several(self, jobs: int) -> None:
        async def enqueue() -> None:
            for start in range(0, jobs, _BATCH):
                numbers = range(start, min(start + _BATCH, jobs))
                await self._noop.batch_defer_async(*({"n": number, "to": work.RECIPIENT} for number in numbers))

        self._loop.run_until_complete(enqueue())

    def stamp(self) -> None:
        self._loop.run_until_complete(self._stamp.defer_async(sent_ns=time.monotonic_ns()))

    def run(self, order: dict[str, Any], wait: Callable[[], Any]) -> None:
        async def run() -> None:
            async with self._app.open_async():
                running = asyncio.create_task(
                    self._app.run_worker_async(
                        queues=["bench"],
                        concurrency=order["pool"],
                        delete_jobs="always",
                        install_signal_handlers=False,
                    )
                )
                await asyncio.to_thread(wait)
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

        self._loop.run_until_complete(run())


async def _noop(n: int, to: str) -> None:
    work.noop(n, to)


async def _stamp(sent_ns: int) -> None:
    work.stamp(sent_ns)


if __name__ == "__main__":
    skeleton.main(Peer)
