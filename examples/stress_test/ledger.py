"""The evidence: who asked for which job, and each run of each job, written to the same database as the jobs.

Nothing here is counted in memory. Whether a job was lost, or ran twice, is the answer to a query over what was
committed; so are the numbers that the display shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg2

from greenjobs import JobHandle, current_job
from greenjobs.pool import ConnectionPool

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import cursor as Cursor

ALL = "all"
"""The name under which the numbers of all kinds are together."""

# A job needs one for some milliseconds at its start and at its end: these serve hundreds of jobs at a time.
_CONNECTIONS = 16
_WAIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Standing:
    """What one kind of job has come to so far. `failed` counts attempts that failed."""

    enqueued: int
    deduplicated: int
    waiting: int
    awaiting_retry: int
    running: int
    done: int
    failed: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The game at this moment: the standing by kind, ALL included.

    `outstanding` counts the jobs that run, wait, or come due for another attempt before the game is over.
    """

    standings: Mapping[str, Standing]
    outstanding: int


@dataclass(frozen=True, slots=True)
class Score:
    """What one kind of job has come to in the end.

    Every enqueued job is one of: done, awaiting retry, given up, not started, lost, ran twice. `failed` counts attempts
    that failed, `retried` attempts after the first. Waits (from enqueuing to the first attempt) and runs are in
    seconds, None where there are none; `peak` is how many ran at the same moment.
    """

    enqueued: int
    deduplicated: int
    done: int
    failed: int
    retried: int
    awaiting_retry: int
    given_up: int
    not_started: int
    lost: int
    ran_twice: int
    wait_p50: float | None
    wait_p95: float | None
    run_p50: float | None
    run_p95: float | None
    done_per_second: float
    peak: int


@dataclass(frozen=True, slots=True)
class Report:
    """The scores by kind, ALL included, and the ids of the jobs that were lost or ran twice."""

    scores: Mapping[str, Score]
    lost: Sequence[int]
    ran_twice: Sequence[int]

    @property
    def is_clean(self) -> bool:
        """Whether no job was lost and none ran twice."""
        return not self.lost and not self.ran_twice


# No constraint says that a job has one run for each attempt: what must not happen has to be recorded when it does.
#
# The view holds once the runner has ended. Before that, a job that runs would pass for lost, and one that is done, but
# not yet taken out of the queue, for one that is going to run again.
_CREATE = """
CREATE TABLE ledger_moves (
    id BIGSERIAL PRIMARY KEY,
    job_id BIGINT NOT NULL,
    kind TEXT NOT NULL,
    is_duplicate BOOLEAN NOT NULL,
    made_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE ledger_runs (
    id BIGSERIAL PRIMARY KEY,
    job_id BIGINT NOT NULL,
    kind TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    started_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    finished_at TIMESTAMPTZ,
    outcome TEXT CHECK (outcome IN ('done', 'failed'))
);

CREATE VIEW ledger_fates AS
WITH jobs AS (
    SELECT
        move.job_id,
        move.kind,
        job.state,
        extract(epoch FROM min(run.started_at) - move.made_at)::float8 AS wait_seconds,
        count(run.id) AS runs,
        count(run.outcome) AS ends,
        count(DISTINCT run.attempt) FILTER (WHERE run.outcome IS NOT NULL) AS ended_attempts,
        count(*) FILTER (WHERE run.outcome = 'done') AS successes
    FROM ledger_moves AS move
    LEFT JOIN ledger_runs AS run ON run.job_id = move.job_id
    LEFT JOIN background_jobs AS job ON job.id = move.job_id
    WHERE NOT move.is_duplicate
    GROUP BY move.job_id, move.kind, move.made_at, job.state
)
SELECT
    job_id,
    kind,
    wait_seconds,
    CASE
        WHEN ends > ended_attempts THEN 'ran twice'
        WHEN successes > 1 THEN 'ran twice'
        WHEN successes = 1 AND state IS NOT NULL THEN 'ran twice'  -- or is about to
        WHEN successes = 1 THEN 'done'
        WHEN state = 'failed' THEN 'given up'
        WHEN state IN ('scheduled', 'available') AND runs > 0 THEN 'awaiting retry'
        WHEN state IN ('scheduled', 'available') THEN 'not started'
        ELSE 'lost'
    END AS fate
FROM jobs
"""


class Ledger:
    """The ledger of one game, in the schema that the database URL leads to."""

    def __init__(self, database_url: str, *, kinds: Sequence[str]) -> None:
        self._database_url = database_url
        self._kinds = [*kinds, ALL]
        self._pool = ConnectionPool(
            database_url, size=_CONNECTIONS, wait_seconds=_WAIT_SECONDS, application_name="greenjobs stress ledger"
        )

    def create(self) -> None:
        """Make its tables, beside those of greenjobs."""
        with self._cursor() as cursor:
            cursor.execute(_CREATE)

    def close(self) -> None:
        """Close its connections."""
        self._pool.close()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection to the same database for a player of the game; `with connection:` is a transaction."""
        connection = psycopg2.connect(self._database_url)
        try:
            yield connection
        finally:
            connection.close()

    def note_move(self, connection: Connection, handle: JobHandle) -> None:
        """Write down that a job was enqueued, or found to be there already, in the transaction that did it."""
        with connection.cursor() as cursor:
            cursor.execute(_NOTE_MOVE, {"job_id": handle.id, "kind": handle.job_type, "is_duplicate": handle.duplicate})

    @contextmanager
    def run(self) -> Iterator[None]:
        """Write down this attempt of the current job: that it starts before the block, how it ended after it.

        An attempt that is interrupted has no end: the job is given back, and makes the same attempt again.
        """
        with self._cursor() as cursor:
            cursor.execute(
                _NOTE_START, {"job_id": current_job.id, "kind": current_job.name, "attempt": current_job.attempt}
            )
            run = cursor.fetchone()
        try:
            yield
        except Exception:
            self._note_end(run, "failed")
            raise
        self._note_end(run, "done")

    def progress(self, *, remaining_seconds: float) -> Progress:
        """The game at this moment, which is over in that many seconds."""
        with self._cursor() as cursor:
            cursor.execute(_PROGRESS, {"kinds": self._kinds, "all": ALL})
            standings = {kind: Standing(*numbers) for kind, *numbers in cursor.fetchall()}
            cursor.execute(_OUTSTANDING, {"remaining": remaining_seconds})
            (outstanding,) = cursor.fetchone() or (0,)
        return Progress(standings, outstanding)

    def report(self) -> Report:
        """What became of every job; to be asked once the runner has ended."""
        with self._cursor() as cursor:
            cursor.execute(_SCORES, {"kinds": self._kinds, "all": ALL})
            scores = {kind: Score(*numbers) for kind, *numbers in cursor.fetchall()}
            cursor.execute(_WRONG)
            wrong = cursor.fetchall()
        return Report(
            scores=scores,
            lost=[job_id for job_id, fate in wrong if fate == "lost"],
            ran_twice=[job_id for job_id, fate in wrong if fate == "ran twice"],
        )

    def _note_end(self, run: object, outcome: str) -> None:
        with self._cursor() as cursor:
            cursor.execute(_NOTE_END, {"run": run, "outcome": outcome})

    @contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        with self._pool.connection() as connection, connection.cursor() as cursor:
            yield cursor


_NOTE_MOVE = """
INSERT INTO ledger_moves (job_id, kind, is_duplicate)
VALUES (%(job_id)s, %(kind)s, %(is_duplicate)s)
"""

_NOTE_START = """
INSERT INTO ledger_runs (job_id, kind, attempt)
VALUES (%(job_id)s, %(kind)s, %(attempt)s)
RETURNING id
"""

_NOTE_END = """
UPDATE ledger_runs
SET
    finished_at = clock_timestamp(),
    outcome = %(outcome)s
WHERE id = %(run)s
"""

# One row for each kind, and one for all of them.
_MOVED = """
moved AS (
    SELECT
        coalesce(kind, %(all)s) AS kind,
        count(*) FILTER (WHERE NOT is_duplicate) AS enqueued,
        count(*) FILTER (WHERE is_duplicate) AS deduplicated
    FROM ledger_moves
    GROUP BY GROUPING SETS ((kind), ())
)
"""

_PROGRESS = f"""
WITH {_MOVED},
queued AS (
    SELECT
        coalesce(job_type, %(all)s) AS kind,
        count(*) FILTER (WHERE state = 'available') AS waiting,
        count(*) FILTER (WHERE state = 'scheduled') AS awaiting_retry
    FROM background_jobs
    GROUP BY GROUPING SETS ((job_type), ())
),
ran AS (
    SELECT
        coalesce(kind, %(all)s) AS kind,
        count(*) FILTER (WHERE outcome IS NULL) AS running,
        count(*) FILTER (WHERE outcome = 'done') AS done,
        count(*) FILTER (WHERE outcome = 'failed') AS failed
    FROM ledger_runs
    GROUP BY GROUPING SETS ((kind), ())
)
SELECT
    kind,
    coalesce(moved.enqueued, 0),
    coalesce(moved.deduplicated, 0),
    coalesce(queued.waiting, 0),
    coalesce(queued.awaiting_retry, 0),
    coalesce(ran.running, 0),
    coalesce(ran.done, 0),
    coalesce(ran.failed, 0)
FROM unnest(%(kinds)s) AS asked (kind)
LEFT JOIN moved USING (kind)
LEFT JOIN queued USING (kind)
LEFT JOIN ran USING (kind)
"""

_OUTSTANDING = """
SELECT count(*)
FROM background_jobs
WHERE state IN ('available', 'running')
    OR (state = 'scheduled' AND run_at < now() + make_interval(secs => %(remaining)s))
"""

# The peak: every run counts one more from its start, one less from its end, and the highest sum on the way is it.
_SCORES = f"""
WITH {_MOVED},
fates AS (
    SELECT
        coalesce(kind, %(all)s) AS kind,
        count(*) FILTER (WHERE fate = 'done') AS done,
        count(*) FILTER (WHERE fate = 'awaiting retry') AS awaiting_retry,
        count(*) FILTER (WHERE fate = 'given up') AS given_up,
        count(*) FILTER (WHERE fate = 'not started') AS not_started,
        count(*) FILTER (WHERE fate = 'lost') AS lost,
        count(*) FILTER (WHERE fate = 'ran twice') AS ran_twice,
        percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY wait_seconds) AS wait
    FROM ledger_fates
    GROUP BY GROUPING SETS ((kind), ())
),
ran AS (
    SELECT
        coalesce(kind, %(all)s) AS kind,
        count(*) FILTER (WHERE outcome = 'failed') AS failed,
        count(*) FILTER (WHERE attempt > 1) AS retried,
        percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY extract(epoch FROM finished_at - started_at)) AS run
    FROM ledger_runs
    GROUP BY GROUPING SETS ((kind), ())
),
steps AS (
    SELECT label.kind, step.at, step.change
    FROM ledger_runs AS run
    CROSS JOIN LATERAL (VALUES (run.kind), (%(all)s)) AS label (kind)
    CROSS JOIN LATERAL (VALUES (run.started_at, 1), (run.finished_at, -1)) AS step (at, change)
    WHERE step.at IS NOT NULL
),
levels AS (
    SELECT kind, sum(change) OVER (PARTITION BY kind ORDER BY at, change) AS level
    FROM steps
),
peaks AS (
    SELECT kind, max(level) AS peak
    FROM levels
    GROUP BY kind
),
game AS (
    SELECT extract(epoch FROM max(run.finished_at) - min(move.made_at))::float8 AS seconds
    FROM ledger_moves AS move
    JOIN ledger_runs AS run ON run.job_id = move.job_id
)
SELECT
    kind,
    coalesce(moved.enqueued, 0),
    coalesce(moved.deduplicated, 0),
    coalesce(fates.done, 0),
    coalesce(ran.failed, 0),
    coalesce(ran.retried, 0),
    coalesce(fates.awaiting_retry, 0),
    coalesce(fates.given_up, 0),
    coalesce(fates.not_started, 0),
    coalesce(fates.lost, 0),
    coalesce(fates.ran_twice, 0),
    fates.wait[1],
    fates.wait[2],
    ran.run[1],
    ran.run[2],
    coalesce(fates.done / nullif(game.seconds, 0), 0),
    coalesce(peaks.peak, 0)::int
FROM unnest(%(kinds)s) AS asked (kind)
CROSS JOIN game
LEFT JOIN moved USING (kind)
LEFT JOIN fates USING (kind)
LEFT JOIN ran USING (kind)
LEFT JOIN peaks USING (kind)
"""

_WRONG = """
SELECT job_id, fate
FROM ledger_fates
WHERE fate IN ('lost', 'ran twice')
ORDER BY job_id
"""
