"""Jobs that wait: rows put into the table by plain SQL, so that what is measured afterwards begins with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.programs.work import RECIPIENT
from benchmarks.server import Database

QUEUE = "bench"
BARE_CHANNEL = "bare_jobs"

# The table of the bare loop and of the raw limit: what any such queue needs, and nothing more.
_BARE_TABLE = """
CREATE TABLE IF NOT EXISTS bare_jobs (
    id BIGSERIAL PRIMARY KEY,
    job_type TEXT NOT NULL,
    data JSONB NOT NULL,
    retries INTEGER NOT NULL DEFAULT 0,
    last_retry TIMESTAMPTZ NOT NULL DEFAULT now(),
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    priority SMALLINT NOT NULL DEFAULT 0,
    queue TEXT NOT NULL DEFAULT 'default',
    run_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    claimed_by BIGINT
);
CREATE INDEX IF NOT EXISTS bare_jobs_ready
    ON bare_jobs (queue, priority DESC, id)
    WHERE claimed_by IS NULL;
CREATE INDEX IF NOT EXISTS bare_jobs_claimed
    ON bare_jobs (claimed_by)
    WHERE claimed_by IS NOT NULL;
"""

_EMPTY = "TRUNCATE {table} RESTART IDENTITY"

_FILL = """
INSERT INTO background_jobs (job_type, data, priority, queue)
SELECT
    %(job_type)s,
    {data},
    {priority},
    %(queue)s
FROM generate_series(1, %(jobs)s) AS number
"""

_FILL_BARE = """
INSERT INTO bare_jobs (job_type, data, priority)
SELECT
    %(job_type)s,
    {data},
    {priority}
FROM generate_series(1, %(jobs)s) AS number
"""

_FILL_SCHEDULED = """
INSERT INTO background_jobs (job_type, data, queue, state, run_at)
SELECT
    %(job_type)s,
    {data},
    %(queue)s,
    'scheduled',
    now() + interval '1 day' + make_interval(secs => number / 100.0)
FROM generate_series(1, %(jobs)s) AS number
"""

_DATA = {
    "noop": "jsonb_build_object('n', number, 'to', %(to)s)",
    "sleep": "jsonb_build_object('seconds', %(seconds)s)",
    "query": "jsonb_build_object('seconds', %(seconds)s)",
}

# Hexadecimal digits at changing places of one random text: compressible to about a half, as text is.
_LARGE_DATA = """
jsonb_build_object('n', number, 'to', substr(
    (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 2 * %(payload_bytes)s / 32)),
    1 + (number * 31) %% %(payload_bytes)s,
    %(payload_bytes)s
))
"""

# Five priorities in turn.
_MIXED_PRIORITY = "(number %% 5 - 2)::smallint"

INSERT_ONE = """
INSERT INTO background_jobs (job_type, data, queue)
VALUES ('noop', %(data)s, 'bench')
RETURNING id
"""

INSERT_SEVERAL = """
INSERT INTO background_jobs (job_type, data, queue)
SELECT 'noop', given.data::jsonb, 'bench'
FROM unnest(%(data)s::text[]) AS given (data)
RETURNING id
"""

INSERT_ONE_BARE = """
WITH inserted AS (
    INSERT INTO bare_jobs (job_type, data)
    VALUES ('stamp', %(data)s)
    RETURNING id
)
SELECT id, pg_notify(%(channel)s, 'default')
FROM inserted
"""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Jobs that wait in a table; `scheduled` more are not due for a day, enqueued before the others or after."""

    jobs: int
    job_type: str = "noop"
    seconds: float = 0.0
    mixed_priorities: bool = False
    payload_bytes: int = 0
    scheduled: int = 0
    scheduled_first: bool = True

    def fill(self, database: Database) -> None:
        """Make these all the jobs that greenjobs' table holds."""
        database.execute(_EMPTY.format(table="background_jobs"))
        fills = [(_FILL, self.jobs), (_FILL_SCHEDULED, self.scheduled)]
        for statement, jobs in reversed(fills) if self.scheduled_first else fills:
            if jobs:
                database.execute(self._complete(statement), self._parameters(jobs))
        database.settle("background_jobs")

    def fill_bare(self, database: Database) -> None:
        """Make these, without the scheduled ones, all the jobs that the bare table holds."""
        database.execute(_BARE_TABLE)
        database.execute(_EMPTY.format(table="bare_jobs"))
        database.execute(self._complete(_FILL_BARE), self._parameters(self.jobs))
        database.settle("bare_jobs")

    def _complete(self, statement: str) -> str:
        data = _LARGE_DATA if self.payload_bytes else _DATA[self.job_type]
        return statement.format(data=data, priority=_MIXED_PRIORITY if self.mixed_priorities else "0")

    def _parameters(self, jobs: int) -> dict[str, Any]:
        return {
            "jobs": jobs,
            "job_type": self.job_type,
            "queue": QUEUE,
            "to": RECIPIENT,
            "seconds": self.seconds,
            "payload_bytes": self.payload_bytes,
        }
