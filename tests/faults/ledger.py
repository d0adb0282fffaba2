"""The ledger: what was committed, what ran, and what of it should not have.

Two sides are written down, each where it cannot be wrong. That a job was committed is noted by a trigger, in the
transaction that commits it, whoever enqueues it. That a job ran is noted by the job, on a connection of its own, which
may lead to a server that no fault touches. Comparing the two needs no help from what is under test.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg2
from psycopg2 import extensions
from waiting import eventually

# Bounds a failing test: two cores may be busy with other tests, and a fault may cost some seconds.
PATIENCE_SECONDS = 60.0

_COMMITTED = """
CREATE TABLE faults_committed (job_id BIGINT NOT NULL, token TEXT NOT NULL);
CREATE FUNCTION faults_note_committed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO faults_committed
    SELECT id, data->>'token'
    FROM added;
    RETURN NULL;
END
$$;
CREATE TRIGGER faults_committed
    AFTER INSERT ON background_jobs
    REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION faults_note_committed();
"""

# `returned`: the handles that `.delay` gave to who enqueued.
_LEDGER = """
CREATE TABLE faults_runs (
    id BIGSERIAL PRIMARY KEY,
    job_id BIGINT NOT NULL,
    attempt INTEGER NOT NULL,
    runner INTEGER NOT NULL,
    started_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    ended_at TIMESTAMPTZ
);
CREATE TABLE faults_returned (job_id BIGINT NOT NULL, token TEXT NOT NULL);
"""

_RUNS = """
SELECT job_id, attempt, runner, extract(epoch FROM started_at)::float8, extract(epoch FROM ended_at)::float8
FROM faults_runs
ORDER BY id
"""


class Run(NamedTuple):
    """One time that a job ran. `runner` is the number of its process; times are in seconds since 1970, by one clock."""

    job_id: int
    attempt: int
    runner: int
    started_at: float
    ended_at: float | None

    def overlaps(self, began_at: float, ended_at: float, *, slack: float = 1.0) -> bool:
        """Whether the job was under way at that time, or claimed before it began, or not acknowledged after its end.

        `slack`: the seconds that a busy machine may take for either.
        """
        return self.started_at - slack <= ended_at and (self.ended_at is None or began_at <= self.ended_at + slack)


@dataclass(frozen=True)
class Balance:
    """The two sides of the ledger, and the rows of jobs that are left."""

    committed: dict[int, str]
    returned: dict[int, str]
    runs: dict[int, list[Run]]
    left: dict[int, str]

    @property
    def lost(self) -> set[int]:
        """Committed jobs that never ran and do not wait, and jobs whose handle was returned but which were not kept."""
        never_ran = self.committed.keys() - self.runs.keys() - self.left.keys()
        return never_ran | (self.returned.keys() - self.committed.keys())

    @property
    def twice(self) -> dict[int, list[Run]]:
        """The jobs that ran more than once."""
        return {job: runs for job, runs in self.runs.items() if len(runs) > 1}

    @property
    def inserted_twice(self) -> list[str]:
        """Tokens that were enqueued by one call and are more than one job."""
        return [token for token, count in Counter(self.committed.values()).items() if count > 1]

    @property
    def unknown(self) -> set[int]:
        """Jobs that ran though nobody committed them."""
        return self.runs.keys() - self.committed.keys()


class Ledger:
    """The ledger of one database of jobs. `jobs_url` may be changed for one that leads to the same database."""

    def __init__(self, jobs_url: str, url: str) -> None:
        self.jobs_url = jobs_url
        self.url = url
        self._connection = psycopg2.connect(url)
        self._connection.autocommit = True

    @property
    def database_name(self) -> str:
        """The name of the database of the jobs."""
        return str(extensions.parse_dsn(self.jobs_url)["dbname"])

    def prepare(self) -> None:
        """Make the tables and the trigger."""
        self.jobs(_COMMITTED)
        self.rows(_LEDGER)

    def close(self) -> None:
        self._connection.close()

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement where the runs are noted; parameters by place, or one dict of them by name."""
        return _rows(self._connection, sql, parameters)

    def jobs(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement where the jobs are, on a new connection: the last one may be dead."""
        with contextlib.closing(psycopg2.connect(self.jobs_url, connect_timeout=10)) as connection:
            connection.autocommit = True
            return _rows(connection, sql, parameters)

    # --- what happened ------------------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """All runs so far, in the order in which they began."""
        return [Run._make(row) for row in self.rows(_RUNS)]

    def run_count(self) -> int:
        return int(self.rows("SELECT count(*) FROM faults_runs")[0][0])

    def wait_for_runs(self, count: int, *, seconds: float = PATIENCE_SECONDS) -> None:
        """Block until so many runs have begun."""
        eventually(lambda: self.run_count() >= count, f"not {count} runs", seconds=seconds)

    def clock(self) -> float:
        """What the ledger's clock says, by which the runs are written down: seconds since 1970."""
        return float(self.rows("SELECT extract(epoch FROM clock_timestamp())::float8")[0][0])

    def states(self) -> dict[int, str]:
        """The jobs that are left, with their states."""
        return dict(self.jobs("SELECT id, state FROM background_jobs"))

    def held_by(self, process_id: int) -> set[int]:
        """The jobs that the runners of this process hold, by the database."""
        held = self.jobs(
            "SELECT job.id FROM background_jobs AS job JOIN background_runners AS runner ON runner.id = job.claimed_by"
            " WHERE runner.pid = %s",
            process_id,
        )
        return {id for (id,) in held}

    def retry_now(self) -> None:
        """Make every job that waits for its next attempt due."""
        self.jobs("UPDATE background_jobs SET run_at = now() WHERE state = 'scheduled'")

    # --- verdict ------------------------------------------------------------------------------------------------------

    def wait_until_done(self, *, seconds: float = PATIENCE_SECONDS) -> None:
        """Block until no job waits, runs or is to be tried again."""

        def count() -> dict[str, int] | None:
            with contextlib.suppress(psycopg2.OperationalError):
                counts = "SELECT state, count(*) FROM background_jobs WHERE state <> 'failed' GROUP BY state"
                return dict(self.jobs(counts)) or None
            return {"no answer": 1}

        last: dict[str, int] | None = {}

        def is_done() -> bool:
            nonlocal last
            last = count()
            return last is None

        try:
            eventually(is_done, "jobs are stuck", seconds=seconds)
        except AssertionError:
            raise AssertionError(f"jobs are stuck after {seconds:g} s: {last}; {self.unfinished()}") from None

    def balance(self) -> Balance:
        """Both sides as they stand."""
        runs = defaultdict(list)
        for run in self.runs():
            runs[run.job_id].append(run)
        return Balance(
            committed=dict(self.jobs("SELECT job_id, token FROM faults_committed")),
            returned=dict(self.rows("SELECT job_id, token FROM faults_returned")),
            runs=dict(runs),
            left=self.states(),
        )

    def settle(
        self, *, may_run_twice: Collection[int] = (), may_run_often: bool = False, seconds: float = PATIENCE_SECONDS
    ) -> Balance:
        """Wait until all is done, and check that every job ran, and once, but for those that may have run twice."""
        self.wait_until_done(seconds=seconds)
        balance = self.balance()
        assert balance.committed, "no job was committed: nothing is proven"
        assert balance.left == {}, f"jobs failed: {balance.left}"
        assert not balance.lost, f"lost: {sorted(balance.lost)}"
        assert not balance.unknown, f"never committed: {sorted(balance.unknown)}"
        assert not balance.inserted_twice, f"enqueued once, inserted twice: {balance.inserted_twice}"
        again = {job: runs for job, runs in balance.twice.items() if job not in may_run_twice or len(runs) > 2}
        assert may_run_often or not again, f"ran again: {again}"
        return balance

    def unfinished(self) -> list[tuple[Any, ...]]:
        """Some of the jobs that are left, with all that may tell why."""
        return self.jobs(
            "SELECT job.id, job.job_type, job.state, job.attempt, job.retries, job.crashes, job.claimed_by, runner.pid,"
            " runner.ended_at, job.errors FROM background_jobs AS job"
            " LEFT JOIN background_runners AS runner ON runner.id = job.claimed_by"
            " WHERE job.state <> 'failed' ORDER BY job.id LIMIT 5"
        )


@contextlib.contextmanager
def opened(jobs_url: str, ledger_url: str) -> Iterator[Ledger]:
    """A new ledger for a migrated database of jobs; it may be written there, too."""
    ledger = Ledger(jobs_url, ledger_url)
    try:
        ledger.prepare()
        yield ledger
    finally:
        ledger.close()


def _rows(connection: psycopg2.extensions.connection, sql: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        named = len(parameters) == 1 and isinstance(parameters[0], dict)
        cursor.execute(sql, parameters[0] if named else parameters or None)
        return cursor.fetchall() if cursor.description else []
