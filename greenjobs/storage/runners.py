"""The register of runners, and who of them waits for jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import orjson

from greenjobs.statement import Statement
from greenjobs.storage.fence import Fence
from greenjobs.storage.outcomes import give_back
from greenjobs.storage.transaction import atomic

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


_REGISTER = """
INSERT INTO background_runners (hostname, pid, version, queues, job_types, leased_until)
VALUES (
    %(hostname)s,
    %(pid)s,
    %(version)s,
    %(queues)s,
    %(job_types)s,
    now() + make_interval(secs => %(lease)s)
)
RETURNING id
"""

# The oid of the table is the class of the locks, so that two schemas in one database keep theirs apart.
_HOLD_SESSION = """
SELECT pg_advisory_lock('background_runners'::regclass::oid::int, %(runner)s)
"""


# What it claimed under its former ids, and nobody took over since, goes on under the new one.
_ADOPT = """
UPDATE background_jobs
SET claimed_by = %(runner)s
WHERE state = 'running'
    AND claimed_by = ANY(%(former)s)
"""

# A wake-up is for one who waits: there would be nobody to hear one that is meant for a former id.
_END_FORMER = """
WITH silenced AS (
    DELETE FROM background_waiting
    WHERE runner = ANY(%(former)s)
)
UPDATE background_runners
SET ended_at = now()
WHERE id = ANY(%(former)s)
    AND ended_at IS NULL
"""


def register_runner(
    connection: Connection,
    *,
    hostname: str,
    pid: int,
    version: str,
    queues: Mapping[str, Mapping[str, float]],
    job_types: Sequence[str],
    former: Sequence[int] = (),
    lease_seconds: float | None = None,
    before_commit: Callable[[int], None] | None = None,
) -> int:
    """Register a runner whose life is that of this connection's session, or that of its lease; returns its id.

    The row is committed when the session holds its lock, so nobody ever sees the one without the other. A process that
    lost its session gives its `former` ids, and keeps the jobs that were not taken from it meanwhile. `before_commit`
    is called with the id before anything can be found under it.
    """
    with atomic(connection), connection.cursor() as cursor:
        cursor.execute(
            _REGISTER,
            {
                "hostname": hostname,
                "pid": pid,
                "version": version,
                "queues": orjson.dumps(queues).decode(),
                "job_types": list(job_types),
                "lease": lease_seconds,
            },
        )
        (runner,) = cursor.fetchone() or (0,)
        if before_commit is not None:
            before_commit(runner)
        if lease_seconds is None:
            cursor.execute(_HOLD_SESSION, {"runner": runner})
        if former:
            cursor.execute(_ADOPT, {"runner": runner, "former": list(former)})
            cursor.execute(_END_FORMER, {"former": list(former)})
    return int(runner)


# A lease that ran out is gone for good: others may have acted on it.
_RENEW = """
UPDATE background_runners
SET leased_until = now() + make_interval(secs => %(lease)s)
WHERE id = %(runner)s
    AND leased_until > now()
    AND ended_at IS NULL
"""


def renew_lease(connection: Connection, runner: int, *, lease_seconds: float) -> bool:
    """Let the lease last that long from now on; False when it has run out already."""
    with connection.cursor() as cursor:
        cursor.execute(_RENEW, {"runner": runner, "lease": lease_seconds})
        return cursor.rowcount == 1


_NOTE_MEMORY = """
UPDATE background_runners
SET memory_bytes = %(memory)s
WHERE id = %(runner)s
"""


def note_memory(connection: Connection, runner: int, memory_bytes: int) -> None:
    """Write down how much memory a runner takes, for those who ask what it died of."""
    with connection.cursor() as cursor:
        cursor.execute(_NOTE_MEMORY, {"runner": runner, "memory": memory_bytes})


_HELD_FENCES = """
SELECT id, attempt, queue
FROM background_jobs
WHERE state = 'running'
    AND claimed_by = ANY(%(runners)s)
"""

_END_RUNNERS = """
WITH silenced AS (
    DELETE FROM background_waiting
    WHERE runner = ANY(%(runners)s)
)
UPDATE background_runners
SET ended_at = now()
WHERE id = ANY(%(runners)s)
"""


def end_runners(connection: Connection, runners: Sequence[int]) -> list[str]:
    """Note that a process ends in good order, and give back whatever it still holds; returns the queues of that."""
    with connection.cursor() as cursor:
        cursor.execute(_HELD_FENCES, {"runners": list(runners)})
        rows = cursor.fetchall()
        if rows:
            fences = [Fence(id, attempt) for id, attempt, _ in rows]
            give_back(connection, runners, fences, has_started=True)  # for all that is known
        cursor.execute(_END_RUNNERS, {"runners": list(runners)})
    return sorted({queue for _, _, queue in rows})


_FORGET_RUNNERS = """
DELETE FROM background_runners
WHERE ended_at < now() - make_interval(secs => %(age)s)
    AND NOT EXISTS (
        SELECT
        FROM background_jobs
        WHERE state = 'running'
            AND claimed_by = background_runners.id
    )
"""


def forget_runners(connection: Connection, *, age_seconds: float) -> int:
    """Delete the register's entries of runners that ended that long ago; returns how many."""
    with connection.cursor() as cursor:
        cursor.execute(_FORGET_RUNNERS, {"age": age_seconds})
        return cursor.rowcount


# Where the database was away meanwhile, the runner may have another id by now.
_SAY_WAITING = Statement(
    "say_waiting",
    """
INSERT INTO background_waiting (queue, runner)
SELECT queue, runner.id
FROM unnest(%(queues)s::text[]) AS queue
JOIN background_runners AS runner ON runner.id = %(runner)s
WHERE runner.ended_at IS NULL
ON CONFLICT DO NOTHING
""",
    runner="int",
    queues="text[]",
)


def say_waiting(connection: Connection, runner: int, queues: Sequence[str]) -> None:
    """Say that this runner has room in these queues, so that whoever enqueues there wakes it; not if it has ended.

    An enqueue that began before this committed cannot know: look once more afterwards.
    """
    with connection.cursor() as cursor:
        _SAY_WAITING.run(cursor, {"runner": runner, "queues": list(queues)})


_WAKE = Statement(
    "wake",
    """
WITH woken AS (
    DELETE FROM background_waiting
    WHERE queue = ANY(%(queues)s)
    RETURNING queue, runner
)
SELECT pg_notify('greenjobs', runner || ':' || queue)
FROM woken
""",
    queues="text[]",
)


def wake(connection: Connection, queues: Sequence[str]) -> None:
    """Wake every worker that waits at one of these queues."""
    with connection.cursor() as cursor:
        _WAKE.run(cursor, {"queues": list(queues)})
