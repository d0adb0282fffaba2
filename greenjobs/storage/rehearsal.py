"""What a test does where runners have loops: one job after the other, by a clock that the test moves.

Nothing here is committed by itself: the connection may be one whose transaction the test rolls back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from psycopg2 import sql

from greenjobs.storage.fence import Fence

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


_ELAPSED = """
SELECT date_part('epoch', clock_timestamp() - now())
"""


def elapsed(connection: Connection) -> float:
    """For how many seconds now() has stood still, as it does in a transaction."""
    with connection.cursor() as cursor:
        cursor.execute(_ELAPSED)
        (seconds,) = cursor.fetchone() or (0.0,)
    return float(seconds)


_RIPEN = """
UPDATE background_jobs
SET state = 'available'
WHERE state = 'scheduled'
    AND run_at <= now() + make_interval(secs => %(ahead)s)
"""


def ripen(connection: Connection, *, ahead_seconds: float) -> None:
    """Make available what is due so many seconds from now, as `promote` does with what is due now."""
    with connection.cursor() as cursor:
        cursor.execute(_RIPEN, {"ahead": ahead_seconds})


_RIPEN_NEXT = """
UPDATE background_jobs AS job
SET state = 'available'
FROM (
    SELECT id
    FROM background_jobs
    WHERE state = 'scheduled'
        AND job_type = ANY(%(job_types)s)
        AND (%(queue)s::text IS NULL OR queue = %(queue)s)
    ORDER BY run_at, id
    LIMIT 1
    FOR UPDATE SKIP LOCKED
) AS next
WHERE job.id = next.id
RETURNING date_part('epoch', job.run_at - now())
"""


def ripen_next(connection: Connection, *, queue: str | None, job_types: Sequence[str]) -> float | None:
    """Make the next scheduled job available; returns in how many seconds from now it is due, None if there is none."""
    with connection.cursor() as cursor:
        cursor.execute(_RIPEN_NEXT, {"queue": queue, "job_types": list(job_types)})
        row = cursor.fetchone()
        return None if row is None else float(row[0])


_FIRST_AVAILABLE = """
SELECT queue, crashes > 0, exclusive_key
FROM background_jobs
WHERE state = 'available'
    AND queue IS NOT NULL
    AND job_type = ANY(%(job_types)s)
    AND (%(queue)s::text IS NULL OR queue = %(queue)s)
ORDER BY (-priority), id
LIMIT 1
"""


def first_available(
    connection: Connection, *, queue: str | None, job_types: Sequence[str]
) -> tuple[str, bool, str | None] | None:
    """The queue of the job that is first in the order of claims over all queues, whether its runner died, and the key
    under which it excludes others."""
    with connection.cursor() as cursor:
        cursor.execute(_FIRST_AVAILABLE, {"queue": queue, "job_types": list(job_types)})
        return cursor.fetchone()


_RECLAIM = """
UPDATE background_jobs
SET
    state = 'running',
    attempt = %(attempt)s,
    claimed_by = %(runner)s,
    claimed_at = now()
WHERE id = %(id)s
    AND attempt = %(attempt)s - 1
    AND state IN ('available', 'scheduled')
"""


def reclaim(connection: Connection, runner: int, fence: Fence) -> bool:
    """Claim a job again after it has rolled back its own claim, in the transaction that it shares with the test."""
    with connection.cursor() as cursor:
        cursor.execute(_RECLAIM, {**fence._asdict(), "runner": runner})
        return cursor.rowcount == 1


_UNDONE = """
SELECT job.id, fence.attempt
FROM unnest(%(ids)s::bigint[], %(attempts)s::int[], %(runners)s::int[]) AS fence (id, attempt, runner)
JOIN background_jobs AS job ON job.id = fence.id
WHERE job.attempt < fence.attempt
    OR (job.attempt = fence.attempt AND job.claimed_by = fence.runner)
"""


def undone(connection: Connection, ended: Sequence[tuple[Fence, int]]) -> set[Fence]:
    """Of claims that have ended, those whose end has been rolled back; each comes with its runner."""
    parameters = {
        "ids": [fence.id for fence, _ in ended],
        "attempts": [fence.attempt for fence, _ in ended],
        "runners": [runner for _, runner in ended],
    }
    with connection.cursor() as cursor:
        cursor.execute(_UNDONE, parameters)
        return {Fence._make(row) for row in cursor.fetchall()}


class Claim(NamedTuple):
    """The rows of a job and of its runner."""

    job_id: int
    runner: int


# A row that is written says in which subtransaction: that is how to know which savepoint is the innermost. That of a
# job may have ended; that of the runner is there, but every version of it makes the next one dearer.
_TOUCH_JOB = """
UPDATE background_jobs
SET claimed_at = claimed_at
WHERE id = %(job_id)s
RETURNING xmin::text
"""

_TOUCH_RUNNER = """
UPDATE background_runners
SET pid = pid
WHERE id = %(runner)s
RETURNING xmin::text
"""


def set_savepoint(connection: Connection, claim: Claim, name: str = "greenjobs_attempt") -> str | None:
    """Mark the place in the transaction that `back_to_savepoint` goes back to; returns what `drop_savepoint` takes."""
    _do(connection, sql.SQL("SAVEPOINT {}").format(sql.Identifier(name)))
    return _touch(connection, claim)


def drop_savepoint(connection: Connection, claim: Claim, mark: str | None, name: str = "greenjobs_attempt") -> None:
    """Forget the place, unless it is gone, or later savepoints would go with it, such as those of a session that the
    job began and the test goes on with. Those that stay make every look at a row slower."""
    if mark is not None and _touch(connection, claim) == mark:
        forget_savepoint(connection, name)


def back_to_savepoint(connection: Connection, name: str = "greenjobs_attempt") -> None:
    """Undo what was done since, if the savepoint is still there; raises InvalidSavepointSpecification if not."""
    _do(connection, sql.SQL("ROLLBACK TO SAVEPOINT {}").format(sql.Identifier(name)))


def forget_savepoint(connection: Connection, name: str) -> None:
    """Forget a savepoint, and all that are later."""
    _do(connection, sql.SQL("RELEASE SAVEPOINT {}").format(sql.Identifier(name)))


def _touch(connection: Connection, claim: Claim) -> str | None:
    with connection.cursor() as cursor:
        for statement in (_TOUCH_JOB, _TOUCH_RUNNER):
            cursor.execute(statement, claim._asdict())
            row = cursor.fetchone()
            if row is not None:
                return str(row[0])
    return None


def _do(connection: Connection, statement: sql.Composed) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)
