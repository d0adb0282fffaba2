"""PgQueuer on asyncpg and uvloop, as its documentation recommends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import asyncpg  # type: ignore[import-not-found]
import uvloop  # type: ignore[import-not-found]
from pgqueuer import AsyncpgDriver, PgQueuer, Queries  # type: ignore[import-not-found]

from benchmarks.peers import skeleton
from benchmarks.programs import work

_BATCH = 1000


class Peer:
    """See skeleton.Peer."""

    def __init__(self, parameters: dict[str, str]) -> None:
        names = {"dbname": "database"}
        self._parameters = {names.get(name, name): value for name, value in parameters.items()}
        self._loop = uvloop.new_event_loop()
        asyncio.set_event_loop(self._loop)

    def install(self) -> None:
        self.open()
        self._loop.run_until_complete(self._queries.install())

    def open(self) -> None:
        connection = self._loop.run_until_complete(asyncpg.connect(**self._parameters))
        self._queries = Queries(AsyncpgDriver(connection))

    def enqueue(self, jobs: int) -> None:
        async def enqueue() -> None:
            for number in range(jobs):
                await self._queries.enqueue("noop", _payload(number), 0)

        self._loop.run_until_complete(enqueue())

    def enqueue_several(self, jobs: int) -> None:
        async def enqueue() -> None:
            for start in range(0, jobs, _BATCH):
                payloads = [_payload(number) for number in range(start, min(start + _BATCH, jobs))]
                await self._queries.enqueue(["noop"] * len(payloads), payloads, [0] * len(payloads))

        self._loop.run_until_complete(enqueue())

    def stamp(self) -> None:
        payload = json.dumps({"sent_ns": time.monotonic_ns()}).encode()
        self._loop.run_until_complete(self._queries.enqueue("stamp", payload, 0))

    def run(self, order: dict[str, Any], wait: Callable[[], Any]) -> None:
        async def run() -> None:
            worker = PgQueuer.from_asyncpg_connection(await asyncpg.connect(**self._parameters))

            @worker.entrypoint("noop")  # type: ignore[untyped-decorator]
            async def noop(job: Any) -> None:
                work.noop(**json.loads(job.payload))

            @worker.entrypoint("stamp")  # type: ignore[untyped-decorator]
            async def stamp(job: Any) -> None:
                work.stamp(**json.loads(job.payload))

            running = asyncio.create_task(
                worker.run(batch_size=order["batch_size"], max_concurrent_tasks=order["concurrency"])
            )
            await asyncio.to_thread(wait)
            worker.shutdown.set()
            await running

        self._loop.run_until_complete(run())


def _payload(number: int) -> bytes:
    return json.dumps({"n": number, "to": work.RECIPIENT}).encode()


if __name__ == "__main__":
    skeleton.main(Peer)
