"""Unique keys of jobs that go back to waiting, where another may have them by now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from psycopg2 import errors

from greenjobs.storage.transaction import undone_alone

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


# A unique key that is contested while rows go back to waiting: each round resolves what the last one ran into.
CONTEST_ROUNDS = 10

DROP_CONTESTED_KEYS = """
UPDATE background_jobs AS job
SET unique_key = NULL
WHERE job.id = ANY(%(ids)s)
    AND job.state = 'running'
    AND EXISTS (
        SELECT
        FROM background_jobs AS other
        WHERE other.unique_key = job.unique_key
            AND (other.state IN ('scheduled', 'available') OR (other.id = ANY(%(ids)s) AND other.id < job.id))
    )
"""


def to_waiting(connection: Connection, ids: Sequence[int], statement: str, parameters: Mapping[str, Any]) -> set[int]:
    """Run a statement that sends running jobs back to waiting, where each wants its unique key again.

    A job started let go of its key, and another may have it by now. That one is the unstarted job of the key then, and
    the older goes on without.
    """
    for round in range(CONTEST_ROUNDS):
        with connection.cursor() as cursor:
            try:
                with undone_alone(connection):
                    cursor.execute(statement, parameters)
                return {row[0] for row in cursor.fetchall()}
            except errors.UniqueViolation:
                if round == CONTEST_ROUNDS - 1:
                    raise
                cursor.execute(DROP_CONTESTED_KEYS, {"ids": list(ids)})
    raise AssertionError("unreachable")
