"""Chancy on psycopg 3, with its asynchronous executor."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from chancy import Chancy, Queue, Worker, job  # type: ignore[import-not-found]

from benchmarks.peers import skeleton
from benchmarks.programs import work

_BATCH = 1000


@job()  # type: ignore[untyped-decorator]
async def noop(*, n: int, to: str) -> None:
    """See work."""
    work.noop(n, to)


@job()  # type: ignore[untyped-decorator]
async def stamp(*, sent_ns: int) -> None:
    """See work."""
    work.stamp(sent_ns)


class Peer:
    """See skeleton.Peer."""

    def __init__(self, parameters: dict[str, str]) -> None:
        self._loop = asyncio.new_event_loop()
        dsn = " ".join(f"{name}='{value}'" for name, value in parameters.items())
        # Its default logger writes to stdout, where the report goes.
        self._chancy = Chancy(dsn, log=logging.getLogger("chancy"))

    def install(self) -> None:
        async def install() -> None:
            async with self._chancy:
                await self._chancy.migrate()

        self._loop.run_until_complete(install())

    def open(self) -> None:
        self._loop.run_until_complete(self._chancy.pool.open())

    def enqueue(self, jobs: int) -> None:
        async def enqueue() -> None:
            for number in range(jobs):
                await self._chancy.push(_job(number))

        self._loop.run_until_complete(enqueue())

    def enqueue_several(self, jobs: int) -> None:
        async def enqueue() -> None:
            async for _ in self._chancy.push_many([_job(number) for number in range(jobs)], batch_size=_BATCH):
                pass

        self._loop.run_until_complete(enqueue())

    def stamp(self) -> None:
        self._loop.run_until_complete(self._chancy.push(stamp.job.with_kwargs(sent_ns=time.monotonic_ns())))

    def run(self, order: dict[str, Any], wait: Callable[[], Any]) -> None:
        async def run() -> None:
            async with self._chancy:
                await self._chancy.declare(
                    Queue(
                        "default",
                        concurrency=order["pool"],
                        executor="chancy.executors.asyncex.AsyncExecutor",
                        polling_interval=1,
                        eager_polling=True,
                    ),
                    upsert=True,
                )
                async with Worker(self._chancy):
                    await asyncio.to_thread(wait)

        self._loop.run_until_complete(run())


def _job(number: int) -> Any:
    return noop.job.with_kwargs(n=number, to=work.RECIPIENT)


if __name__ == "__main__":
    skeleton.main(Peer)
