"""The bare loop: claim, execute and acknowledge in gevent, overlapping, and nothing else.

It is what a framework costs nothing in: no sessions, no fences, no retries, no timeouts, no errors, one queue, a lean
table of its own, and jobs whose runner dies are lost. A claim is under way while the jobs of the last one run, and
finished jobs are deleted in groups.
"""

from __future__ import annotations

from greenjobs import green

green.patch()

from collections import deque  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
import orjson  # noqa: E402
import psycopg2  # noqa: E402
from gevent.event import Event  # noqa: E402
from gevent.pool import Pool  # noqa: E402
from gevent.socket import wait_read  # noqa: E402
from psycopg2.extras import register_default_jsonb  # noqa: E402

from benchmarks.backlog import BARE_CHANNEL  # noqa: E402
from benchmarks.programs import jobs, protocol  # noqa: E402
from benchmarks.programs.tally import tally  # noqa: E402

_CLAIM = """
UPDATE bare_jobs
SET
    claimed_by = 7,
    last_retry = now()
WHERE id = ANY(ARRAY(
    SELECT id
    FROM bare_jobs
    WHERE queue = 'default'
        AND claimed_by IS NULL
        AND run_at <= now()
        AND job_type = ANY(%(job_types)s)
    ORDER BY priority DESC, id
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
RETURNING id, job_type, data, retries, priority
"""

_ACKNOWLEDGE = """
DELETE FROM bare_jobs
WHERE id = ANY(%(ids)s)
    AND claimed_by = 7
"""


class BareLoop:
    """Three greenlets: one claims, one starts jobs, one acknowledges."""

    def __init__(self, database_url: str, *, pool: int, read_ahead: int) -> None:
        self._pool = Pool(pool)
        self._room = pool + read_ahead
        self._read_ahead = read_ahead
        self._ready: deque[tuple[Any, ...]] = deque()
        self._done: list[int] = []
        self._claimed, self._space, self._finished, self._woken = Event(), Event(), Event(), Event()
        self._claimer, self._acknowledger, self._session = (connect(database_url) for _ in range(3))
        self._in_writing = False

    def start(self) -> None:
        """Begin; returns at once."""
        for loop in (self._claim, self._dispatch, self._acknowledge, self._listen):
            gevent.spawn(loop)

    def wait_until_acknowledged(self) -> None:
        """Block until every finished job is deleted."""
        self._pool.join()
        while self._done or self._in_writing:
            gevent.sleep(0.0005)

    def _claim(self) -> None:
        cursor = self._claimer.cursor()
        while True:
            if len(self._ready) > self._read_ahead:
                self._space.clear()
                self._space.wait()
                continue
            self._woken.clear()
            cursor.execute(_CLAIM, {"job_types": list(jobs.FUNCTIONS), "limit": self._room})
            rows = cursor.fetchall()
            self._ready.extend(rows)
            self._claimed.set()
            if not rows:
                self._woken.wait()

    def _dispatch(self) -> None:
        while True:
            if not self._ready:
                self._claimed.clear()
                self._claimed.wait()
                continue
            row = self._ready.popleft()
            if len(self._ready) <= self._read_ahead:
                self._space.set()
            self._pool.spawn(self._execute, row)

    def _execute(self, row: tuple[Any, ...]) -> None:
        jobs.FUNCTIONS[row[1]](**row[2])
        self._done.append(row[0])
        self._finished.set()

    def _acknowledge(self) -> None:
        cursor = self._acknowledger.cursor()
        while True:
            self._finished.wait()
            self._finished.clear()
            while self._done:
                group, self._done = self._done, []
                self._in_writing = True
                cursor.execute(_ACKNOWLEDGE, {"ids": group})
                self._in_writing = False

    def _listen(self) -> None:
        self._session.cursor().execute(f"LISTEN {BARE_CHANNEL}")
        while True:
            if self._session.notifies:
                self._session.notifies.clear()
                self._woken.set()
            wait_read(self._session.fileno())
            self._session.poll()


def connect(database_url: str) -> Any:
    """An autocommit connection whose jsonb values come parsed by the fastest parser there is."""
    connection = psycopg2.connect(database_url)
    connection.autocommit = True
    register_default_jsonb(connection, loads=orjson.loads)
    return connection


def main() -> None:
    """Run jobs from `go` to `stop`."""
    order = protocol.receive_order()
    tally.open(order["tally"], mark_every=order["mark_every"])
    if order["job_connections"]:
        jobs.open_connections(order["database_url"], order["job_connections"])
    loop = BareLoop(order["database_url"], pool=order["pool"], read_ahead=order["read_ahead"])
    protocol.wait_for_go()
    loop.start()
    gevent.get_hub().threadpool.apply(protocol.next_command)
    loop.wait_until_acknowledged()
    protocol.send_report(tally.report())


if __name__ == "__main__":
    main()
