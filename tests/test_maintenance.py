"""What runners do beside running jobs: due jobs, homeless jobs, claims that were never answered."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg2
import pytest
import running
from gevent.event import Event
from waiting import eventually

from greenjobs import job
from greenjobs.maintenance import Maintenance, resident_memory
from greenjobs.runner import Runner

PATIENCE_SECONDS = running.PATIENCE_SECONDS


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        yield database


def test_jobs_that_become_due_are_promoted_whatever_runner_knows_their_type(database: running.Database) -> None:
    """There is no leader: any runner does it for all."""

    @job
    def work() -> None: ...

    database.rows(
        "INSERT INTO background_jobs (job_type, queue, data, state, run_at)"
        " VALUES ('of others', 'elsewhere', '{}', 'scheduled', now() - interval '1 second')"
    )
    with running.started(Runner().register(work)):
        database.wait_for("state = 'available'")


def test_homeless_job_for_later_is_run_when_it_is_due(database: running.Database) -> None:
    @job(queue="emails")
    def work() -> None: ...

    database.rows(
        "INSERT INTO background_jobs (job_type, data, state, run_at)"
        " VALUES ('work', '{}', 'scheduled', now() + interval '0.2 second')"
    )
    with running.started(Runner().register(work).configure_queue("emails", poll_interval=3600)):
        database.wait_for("true", count=0)


def test_many_jobs_due_within_a_moment_run_while_others_run(database: running.Database) -> None:
    ran = []

    @job
    def work(number: int) -> None:
        ran.append(number)

    with running.started(Runner().register(work).configure_queue("default", pool=5, poll_interval=3600)):
        for number in range(50):
            work.options(delay=0.01 * number).delay(number)
        database.wait_for("true", count=0)

    assert sorted(ran) == list(range(50))


def test_job_whose_rows_are_locked_for_a_while_is_run_afterwards(database: running.Database) -> None:
    """Somebody looks at it with FOR UPDATE: a claim passes it by."""
    ran = []

    @job
    def work(number: int) -> None:
        ran.append(number)

    first, _ = work.delay_many([(1,), (2,)])
    holder = psycopg2.connect(database.url)
    holder.cursor().execute("SELECT * FROM background_jobs WHERE id = %s FOR UPDATE", (first.id,))
    with running.started(Runner().register(work).configure_queue("default", poll_interval=0.05)):
        eventually(lambda: ran == [2], "the other did not run")
        holder.rollback()
        eventually(lambda: ran == [2, 1], "it did not run")
    holder.close()


def test_runner_of_an_earlier_release_that_ended_in_good_order_is_blamed_for_nothing(
    database: running.Database,
) -> None:
    """What turns up under its name afterwards is a claim that never started."""
    ran = []

    @job
    def work() -> None:
        from greenjobs import current_job

        ran.append(current_job.row.crashes)

    handle = work.delay()
    database.rows(
        "WITH gone AS (INSERT INTO background_runners (hostname, pid, version, queues, job_types, ended_at)"
        " VALUES ('gone', 1, '0', '{}', '{}', now()) RETURNING id)"
        " UPDATE background_jobs SET state = 'running', claimed_by = gone.id, claimed_at = now(), attempt = 1"
        " FROM gone WHERE background_jobs.id = %s",
        handle.id,
    )
    running.work_off(work)

    assert ran == [0]


def test_claim_that_was_never_answered_is_given_back(database: running.Database) -> None:
    """As when a connection died between the commit of a claim and its answer."""
    release, started = Event(), []

    @job
    def work(number: int) -> None:
        started.append(number)
        assert release.wait(PATIENCE_SECONDS)

    held, lost = work.delay_many([(1,), (2,)])
    database.rows("UPDATE background_jobs SET state = 'scheduled', run_at = 'infinity' WHERE id = %s", lost.id)
    with running.started(Runner().register(work)) as handle:
        eventually(lambda: started == [1], "it did not start")
        database.rows("UPDATE background_jobs SET claimed_at = now() - interval '1 hour' WHERE id = %s", held.id)
        database.rows(
            "UPDATE background_jobs SET state = 'running', run_at = now(), claimed_by = %s,"
            " claimed_at = now() - interval '1 hour', attempt = 1 WHERE id = %s",
            handle.runner_id,
            lost.id,
        )
        maintenance: Maintenance = handle._maintenance
        maintenance.audit()
        eventually(lambda: started == [1, 2], "it was not given back")
        release.set()
        database.wait_for("true", count=0)


def test_resident_memory_is_that_of_this_process() -> None:
    before = resident_memory()
    block = bytearray(b"x") * 50_000_000

    assert 10_000_000 < before < resident_memory() - 40_000_000
    assert len(block) == 50_000_000
