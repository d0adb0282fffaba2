"""greenjobs.jobs: which jobs are found, what an action does to them, and whom it leaves alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import databases
import gevent
import psycopg2
import pytest
import running
from gevent.event import Event
from psycopg2 import extensions
from waiting import eventually

import greenjobs
from greenjobs import job, jobs, storage
from greenjobs.errors import DatabaseUnavailable, JobCancelled, OptionError, SchemaError
from greenjobs.runner import Runner

PATIENCE = running.PATIENCE_SECONDS
LONG_AGO = "2020-01-01 00:00:00+00"


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing but rows behind: making one takes longer than most of them do."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    with running.application(shared_url) as database:
        yield database
        database.rows("TRUNCATE background_jobs")


@pytest.fixture
def own_database(database_url: str) -> Iterator[running.Database]:
    """For tests with runners, whose maintenance is not to meet the rows of others."""
    with running.application(database_url) as database:
        yield database


def insert(database: running.Database, count: int = 1, **columns: Any) -> list[int]:
    """Rows with these values in these columns; returns their ids, in order."""
    given = {"job_type": "work", "data": "{}", "queue": "default", **columns}
    if given.get("state") == "failed":
        given.setdefault("last_retry", "now")
    names, values = ", ".join(given), ", ".join(["%s"] * len(given))
    return database.column(
        f"INSERT INTO background_jobs ({names}) SELECT {values} FROM generate_series(1, %s) RETURNING id",
        *given.values(),
        count,
    )


def insert_one(database: running.Database, **columns: Any) -> int:
    (id,) = insert(database, **columns)
    return id


def failed_with(error: str, message: str) -> str:
    return json.dumps([{"at": LONG_AGO, "attempt": 1, "error": error, "message": message, "runner": "host:1"}])


@contextlib.contextmanager
def transaction(database: running.Database) -> Iterator[extensions.cursor]:
    """A cursor of somebody else, whose transaction is open until the block ends."""
    connection = psycopg2.connect(database.url)
    try:
        with connection, connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def wait_until_blocked(database: running.Database, count: int = 1) -> None:
    """Block until that many sessions wait for a lock of another one."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    eventually(lambda: database.value(waiting) == count, f"not {count} sessions wait", seconds=PATIENCE)


def at_once(*calls: Callable[[], Any]) -> list[gevent.Greenlet[..., Any]]:
    return [gevent.spawn(call) for call in calls]


def results(greenlets: list[gevent.Greenlet[..., Any]]) -> list[Any]:
    return [greenlet.get(timeout=PATIENCE) for greenlet in greenlets]


CLAIM = """
UPDATE background_jobs
SET state = 'running', attempt = attempt + 1, claimed_by = 1, claimed_at = now()
WHERE id = %s
"""


# --- find -------------------------------------------------------------------------------------------------------------


class TestFinding:
    def test_all_jobs_are_found_the_newest_first(self, database: running.Database) -> None:
        ids = insert(database, 3)
        assert [found.id for found in jobs.find()] == ids[::-1]

    def test_a_hundred_are_found_unless_the_limit_is_another(self, database: running.Database) -> None:
        ids = insert(database, 103)
        assert [found.id for found in jobs.find()] == ids[:2:-1]
        assert [found.id for found in jobs.find(limit=2)] == ids[:-3:-1]
        assert len(jobs.find(limit=None)) == 103

    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ({"queue": "emails"}, {"a", "b"}),
            ({"queue": ["emails", "bulk"]}, {"a", "b", "c"}),
            ({"queue": []}, set()),
            ({"job_type": "send"}, {"a", "c"}),
            ({"job_type": ("send", "note")}, {"a", "b", "c"}),
            ({"state": "failed"}, {"a", "c"}),
            ({"state": iter(["failed", "scheduled"])}, {"a", "b", "c"}),
            ({"error": "REFUSED"}, {"a"}),
            ({"error": "timeouterror: no"}, {"c"}),
            ({"error": "%"}, set()),
            ({"older_than": "1 day"}, {"b", "c"}),
            ({"newer_than": 3600}, {"a", "d"}),
            ({"older_than": timedelta(days=1), "newer_than": "3w"}, {"b"}),
            ({"queue": "emails", "state": "failed"}, {"a"}),
            ({"queue": None, "state": None, "error": None}, {"a", "b", "c", "d"}),
        ],
        ids=str,
    )
    def test_filters_must_all_hold(
        self, database: running.Database, filters: dict[str, Any], expected: set[str]
    ) -> None:
        """Failed jobs are as old as their failure, others as old as themselves."""
        refused, timed_out = failed_with("ConnectionError", "connection refused"), failed_with("TimeoutError", "no")
        named = {
            "a": insert_one(
                database, queue="emails", job_type="send", state="failed", errors=refused, created_at=LONG_AGO
            ),
            "b": insert_one(
                database, queue="emails", job_type="note", state="scheduled", created_at="now", last_retry="now"
            ),
            "c": insert_one(
                database,
                queue="bulk",
                job_type="send",
                state="failed",
                created_at=LONG_AGO,
                last_retry=LONG_AGO,
                errors=timed_out,
            ),
            "d": insert_one(database),
        }
        database.rows("UPDATE background_jobs SET created_at = now() - interval '14 days' WHERE id = %s", named["b"])
        found = {one.id for one in jobs.find(**filters)}
        assert {name for name, id in named.items() if id in found} == expected

    def test_only_the_last_error_is_searched(self, database: running.Database) -> None:
        errors = json.loads(failed_with("KeyError", "first")) + json.loads(failed_with("IndexError", "last"))
        insert(database, state="failed", errors=json.dumps(errors))
        counts = [jobs.count(error=text) for text in ("KeyError", "first", "IndexError", "last", "IndexError: last")]
        assert counts == [0, 0, 1, 1, 1]

    def test_ids_and_filters_must_both_hold(self, database: running.Database) -> None:
        failed, other = insert_one(database, state="failed"), insert_one(database)
        assert [found.id for found in jobs.find(failed, other, state="failed")] == [failed]

    def test_count_counts_what_find_finds(self, database: running.Database) -> None:
        insert(database, 150, state="failed")
        insert(database, 3)
        assert (jobs.count(), jobs.count(state="failed")) == (153, 150)

    def test_get_says_all_about_a_job_that_failed(self, own_database: running.Database) -> None:
        @job(queue="emails", max_retries=0, priority=3)
        def work(to: str) -> None:
            raise ValueError(f"no such address: {to}")

        handle = work.delay("ann")
        running.work_off(work)
        found = jobs.get(handle.id)

        assert found is not None
        assert (found.id, found.job_type, found.queue, found.state) == (handle.id, "work", "emails", "failed")
        assert (found.data, found.priority) == ({"to": "ann"}, 3)
        assert (found.attempt, found.retries, found.crashes) == (1, 1, 0)
        assert found.error == "ValueError: no such address: ann"
        assert 'raise ValueError(f"no such address: {to}")' in found.errors[0]["traceback"]
        assert found.last_retry is not None
        assert found.created_at < found.last_retry
        assert 0 <= found.age_seconds < PATIENCE
        assert found.runner is None

    def test_running_job_says_who_runs_it(self, own_database: running.Database) -> None:
        began, ends = Event(), Event()

        @job
        def work() -> None:
            began.set()
            ends.wait()

        handle = work.delay()
        with running.started(Runner().register(work)) as runner:
            assert began.wait(PATIENCE)
            found = jobs.get(handle.id)
            ends.set()
        assert found is not None
        assert (found.state, found.runner, found.error) == ("running", runner.name, None)
        assert found.claimed_at is not None

    def test_there_is_no_job_that_is_done(self, own_database: running.Database) -> None:
        @job
        def work() -> None: ...

        handle = work.delay()
        running.work_off(work)
        assert jobs.get(handle.id) is None

    def test_job_finds_the_jobs_of_its_runner(self, own_database: running.Database) -> None:
        """Whose database is not that of the settings."""
        seen = []

        @job
        def work() -> None:
            seen.extend(found.job_type for found in jobs.find())

        work.delay()
        greenjobs.configure(database_url="postgresql://127.0.0.1:1/nowhere")
        running.work_off(work, database_url=own_database.url)
        assert seen == ["work"]

    @pytest.mark.parametrize(
        ("filters", "message"),
        [
            ({"state": "over"}, r"state is 'over'; allowed: scheduled, available, running, failed, done, discarded"),
            ({"state": ["failed", 3]}, r"state is \['failed', 3\]; allowed: a name, or a list of names"),
            ({"queue": ""}, "queue is ''"),
            ({"queue": 5}, "queue is 5"),
            ({"job_type": [None]}, r"job_type is \[None\]"),
            ({"job_type": "a\0b"}, "job_type is"),
            ({"error": " "}, "error is ' '; allowed: a part of the text of an error"),
            ({"error": 404}, "error is 404"),
            ({"older_than": "soon"}, "older_than is 'soon'; allowed: seconds, or a text such as \"90 s\""),
            ({"older_than": -1}, "older_than is -1"),
            ({"newer_than": float("nan")}, "newer_than is nan"),
            ({"newer_than": True}, "newer_than is True"),
            ({"limit": 0}, "limit is 0; allowed: a whole number from 1"),
            ({"limit": 2.5}, "limit is 2.5"),
        ],
        ids=str,
    )
    def test_wrong_filter_is_refused_with_what_is_allowed(
        self, database: running.Database, filters: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(OptionError, match=message):
            jobs.find(**filters)

    @pytest.mark.parametrize("id", [0, -5, 2**63, "17", True, 1.0, None])
    def test_what_is_no_id_is_refused(self, database: running.Database, id: Any) -> None:
        with pytest.raises(OptionError, match="is not the id of a job"):
            jobs.find(id)

    def test_unknown_filter_is_a_type_error_that_names_the_others(self, database: running.Database) -> None:
        with pytest.raises(TypeError, match="no filter 'quue'; there are queue, job_type, state"):
            jobs.find(quue="emails")  # type: ignore[call-arg]

    def test_database_without_tables_is_a_schema_error(self, empty_database_url: str) -> None:
        with running.application(empty_database_url), pytest.raises(SchemaError, match="greenjobs migrate"):
            jobs.find()

    def test_database_that_is_not_there_is_unavailable(self, database: running.Database) -> None:
        greenjobs.configure(database_url="postgresql://127.0.0.1:1/nowhere")
        with pytest.raises(DatabaseUnavailable):
            jobs.find()


# --- retry ------------------------------------------------------------------------------------------------------------


class TestRetrying:
    def test_failed_job_has_all_its_retries_again(self, own_database: running.Database) -> None:
        """And keeps the errors that it had."""
        attempts = []

        @job(max_retries=1)
        def work() -> None:
            attempts.append(greenjobs.current_job.attempt)
            raise ValueError(f"failure {len(attempts)}")

        handle = work.delay()
        for _ in range(2):
            running.work_off(work)
            own_database.rows("UPDATE background_jobs SET run_at = now() WHERE state = 'scheduled'")
        assert own_database.state(handle.id) == "failed"

        assert jobs.retry(handle.id).ids == (handle.id,)
        for _ in range(2):
            running.work_off(work)
            own_database.rows("UPDATE background_jobs SET run_at = now() WHERE state = 'scheduled'")

        assert own_database.state(handle.id) == "failed"
        assert attempts == [1, 2, 1, 2]
        found = jobs.get(handle.id)
        assert found is not None
        assert [error["message"] for error in found.errors] == [f"failure {number}" for number in (1, 2, 3, 4)]
        assert found.attempt == 4

    def test_job_that_killed_its_runners_remains_a_suspect(self, database: running.Database) -> None:
        """So that it is claimed alone, and the next death is nobody else's fault."""
        id = insert_one(database, state="failed", crashes=3, retries=2)
        jobs.retry(id)
        assert database.rows("SELECT state, crashes, retries FROM background_jobs") == [("available", 1, 0)]

    def test_cancelled_job_that_is_retried_is_cancelled_no_more(self, database: running.Database) -> None:
        id = insert_one(database, state="failed", cancel_asked_at="now")
        jobs.retry(id)
        assert database.value("SELECT cancel_asked_at FROM background_jobs") is None

    def test_scheduled_job_that_is_named_is_available_now(self, database: running.Database) -> None:
        """It has not failed for good: what it failed so far counts on."""
        id = insert_one(database, state="scheduled", run_at="2099-01-01 00:00+00", retries=4)
        assert jobs.retry(id).ids == (id,)
        assert database.rows("SELECT state, run_at <= now(), retries FROM background_jobs") == [("available", True, 4)]

    def test_scheduled_jobs_are_left_alone_where_nothing_says_scheduled(self, database: running.Database) -> None:
        scheduled = insert_one(database, state="scheduled", run_at="2099-01-01 00:00+00", queue="emails")
        failed = insert_one(database, state="failed", queue="emails")
        assert jobs.retry(queue="emails").ids == (failed,)
        assert database.state(scheduled) == "scheduled"
        assert jobs.retry(queue="emails", state="scheduled").ids == (scheduled,)

    @pytest.mark.parametrize("state", ["available", "running"])
    def test_job_in_another_state_is_left_alone_and_named(self, database: running.Database, state: str) -> None:
        id = insert_one(database, state=state, claimed_by=1 if state == "running" else None)
        assert jobs.retry(id) == jobs.Outcome(left_alone={id: f"is {state}"})
        assert database.state(id) == state

    def test_job_that_is_gone_or_does_not_fit_is_named(self, database: running.Database) -> None:
        id = insert_one(database, state="failed", queue="emails")
        outcome = jobs.retry(id, id + 1, queue="others")
        assert outcome == jobs.Outcome(left_alone={id: "does not fit the filters", id + 1: "is gone"})

    def test_named_job_beyond_the_limit_is_named_again(self, database: running.Database) -> None:
        first, second = insert(database, 2, state="failed")
        outcome = jobs.retry(first, second, limit=1)
        assert (outcome.ids, list(outcome.left_alone)) == ((second,), [first])
        assert "beyond the limit" in outcome.left_alone[first]

    def test_runners_that_wait_at_the_queue_are_woken(self, database: running.Database) -> None:
        """Those that said so; a runner that polls once an hour hears of it at once."""
        database.rows("TRUNCATE background_waiting")
        database.rows("INSERT INTO background_waiting VALUES ('emails', 71), ('emails', 72), ('others', 73)")
        insert(database, 5, state="failed", queue="emails")
        database.rows("LISTEN greenjobs")
        jobs.retry(queue="emails")
        database.rows("UNLISTEN greenjobs")
        heard = sorted(notification.payload for notification in database.connection.notifies)
        assert heard == ["71:emails", "72:emails"]
        assert database.column("SELECT runner FROM background_waiting") == [73]

    def test_only_one_of_a_unique_key_is_retried(self, database: running.Database) -> None:
        """The others stay failed: of a unique job, no two wait at the same time."""
        first, second = insert(database, 2, state="failed", unique_key="key")
        other = insert_one(database, state="failed", unique_key="other")
        outcome = jobs.retry(state="failed")
        assert set(outcome.ids) in ({first, other}, {second, other})
        assert list(outcome.left_alone.values()) == ["another job has its unique key"]
        assert sorted(database.column("SELECT state FROM background_jobs")) == ["available", "available", "failed"]

    def test_job_whose_unique_key_another_one_has_is_left_alone(self, database: running.Database) -> None:
        failed = insert_one(database, state="failed", unique_key="key")
        insert(database, unique_key="key")
        others = insert(database, 10, state="failed")
        outcome = jobs.retry(state="failed")
        assert sorted(outcome.ids) == others
        assert outcome.left_alone == {failed: "another job has its unique key"}

    def test_more_than_a_batch_is_retried(self, database: running.Database) -> None:
        ids = insert(database, 2500, state="failed")
        assert sorted(jobs.retry(state="failed").ids) == ids
        assert database.count("state = 'available'") == 2500

    def test_no_more_than_the_limit_are_retried(self, database: running.Database) -> None:
        ids = insert(database, 5, state="failed")
        assert jobs.retry(state="failed", limit=2).ids == tuple(ids[:-3:-1])
        assert database.count("state = 'failed'") == 3

    def test_of_two_who_retry_at_once_each_job_has_one(self, database: running.Database) -> None:
        """Both have chosen all of them, and wait for the first."""
        ids = insert(database, 200, state="failed")
        plans = [jobs.plan("retry", state="failed"), jobs.plan("retry", state="failed")]
        with transaction(database) as cursor:
            cursor.execute("SELECT FROM background_jobs WHERE id = %s FOR UPDATE", [ids[0]])
            greenlets = at_once(*[plan.carry_out for plan in plans])
            wait_until_blocked(database, 2)
        one, other = results(greenlets)
        assert sorted(one.ids + other.ids) == ids
        assert {*one.left_alone.values(), *other.left_alone.values()} == {"has moved on: is available"}
        assert sorted([*one.left_alone, *other.left_alone]) == ids

    def test_two_who_change_the_same_jobs_in_other_orders_do_not_lock_each_other_out(
        self, database: running.Database
    ) -> None:
        ids = insert(database, 300, state="failed")
        retrying, discarding = jobs.plan("retry", state="failed"), jobs.plan("discard", state="failed")
        retrying = replace(retrying, chosen=retrying.chosen[::-1])
        with transaction(database) as cursor:
            cursor.execute("SELECT FROM background_jobs WHERE id = %s FOR UPDATE", [ids[150]])
            greenlets = at_once(retrying.carry_out, discarding.carry_out)
            wait_until_blocked(database, 2)
        retried, discarded = results(greenlets)
        assert sorted(retried.ids + discarded.ids) == ids
        assert sorted(database.column("SELECT id FROM background_jobs")) == sorted(retried.ids)

    def test_job_that_was_retried_and_failed_again_meanwhile_is_left_alone(self, database: running.Database) -> None:
        id = insert_one(database, state="failed", attempt=1)
        plan = jobs.plan("retry", id)
        database.rows("UPDATE background_jobs SET attempt = attempt + 1, retries = 1")
        assert plan.carry_out() == jobs.Outcome(left_alone={id: "has moved on: is failed"})

    def test_unique_job_that_is_enqueued_meanwhile_keeps_the_failed_one_out(self, database: running.Database) -> None:
        """The retry waits for the one who enqueues, and then finds the key taken."""
        failed = insert_one(database, state="failed", unique_key="key")
        with transaction(database) as cursor:
            cursor.execute("INSERT INTO background_jobs (job_type, data, unique_key) VALUES ('work', '{}', 'key')")
            greenlets = at_once(lambda: jobs.retry(failed))
            wait_until_blocked(database)
        (outcome,) = results(greenlets)
        assert outcome.left_alone == {failed: "another job has its unique key"}
        assert database.state(failed) == "failed"


# --- cancel and discard -----------------------------------------------------------------------------------------------


class TestCancelling:
    @pytest.mark.parametrize("state", ["available", "scheduled"])
    def test_waiting_job_is_deleted(self, database: running.Database, state: str) -> None:
        id = insert_one(database, state=state)
        assert jobs.cancel(id) == jobs.Outcome(ids=(id,))
        assert database.count() == 0

    def test_running_job_is_asked_to_end(self, own_database: running.Database) -> None:
        began, ended = Event(), Event()
        raised: list[BaseException] = []

        @job
        def work() -> None:
            began.set()
            try:
                gevent.sleep(PATIENCE)
            except JobCancelled as error:
                raised.append(error)
                raise
            finally:
                ended.set()

        handle = work.delay()
        with running.started(Runner().register(work)):
            assert began.wait(PATIENCE)
            assert jobs.cancel(job_type="work") == jobs.Outcome(asked=(handle.id,))
            assert ended.wait(PATIENCE)
            own_database.wait_for("true", count=0)
        assert len(raised) == 1

    def test_failed_job_is_left_alone(self, database: running.Database) -> None:
        id = insert_one(database, state="failed")
        assert jobs.cancel(id) == jobs.Outcome(left_alone={id: "is failed"})
        assert database.state(id) == "failed"

    def test_job_that_is_claimed_at_the_same_moment_is_asked_to_end(self, database: running.Database) -> None:
        """It was chosen while it waited; the claim commits while the cancel waits for its lock."""
        id = insert_one(database)
        with transaction(database) as cursor:
            cursor.execute(CLAIM, [id])
            greenlets = at_once(lambda: jobs.cancel(id))
            wait_until_blocked(database)
        assert results(greenlets) == [jobs.Outcome(asked=(id,))]
        assert database.count("state = 'running' AND cancel_asked_at IS NOT NULL") == 1

    def test_job_that_is_done_meanwhile_is_named(self, database: running.Database) -> None:
        id = insert_one(database, state="running", claimed_by=1)
        plan = jobs.plan("cancel", id)
        database.rows("DELETE FROM background_jobs")
        assert plan.carry_out() == jobs.Outcome(left_alone={id: "has moved on: is gone"})

    def test_job_that_began_meanwhile_is_left_alone_where_only_waiting_ones_were_meant(
        self, database: running.Database
    ) -> None:
        id = insert_one(database)
        plan = jobs.plan("cancel", state="available")
        database.rows(CLAIM, id)
        assert plan.carry_out() == jobs.Outcome(left_alone={id: "has moved on: is running"})
        assert database.value("SELECT cancel_asked_at FROM background_jobs") is None


class TestDiscarding:
    def test_failed_jobs_are_deleted(self, database: running.Database) -> None:
        ids = insert(database, 3, state="failed")
        assert sorted(jobs.discard(job_type="work").ids) == ids
        assert database.count() == 0

    def test_waiting_jobs_are_left_alone_where_nothing_says_so(self, database: running.Database) -> None:
        waiting = insert_one(database)
        assert jobs.discard(job_type="work") == jobs.Outcome()
        assert database.state(waiting) == "available"

    @pytest.mark.parametrize("state", ["available", "scheduled"])
    def test_waiting_job_that_is_named_is_deleted(self, database: running.Database, state: str) -> None:
        by_id, by_state = insert(database, 2, state=state)
        assert jobs.discard(by_id).ids == (by_id,)
        assert jobs.discard(state=state).ids == (by_state,)

    def test_running_job_is_left_alone(self, database: running.Database) -> None:
        id = insert_one(database, state="running", claimed_by=1)
        assert jobs.discard(id) == jobs.Outcome(left_alone={id: "is running"})

    def test_job_that_is_claimed_at_the_same_moment_runs(self, database: running.Database) -> None:
        id = insert_one(database)
        with transaction(database) as cursor:
            cursor.execute(CLAIM, [id])
            greenlets = at_once(lambda: jobs.discard(id))
            wait_until_blocked(database)
        assert results(greenlets) == [jobs.Outcome(left_alone={id: "has moved on: is running"})]
        assert database.state(id) == "running"

    def test_job_that_is_retried_at_the_same_moment_is_kept(self, database: running.Database) -> None:
        id = insert_one(database, state="failed")
        plan = jobs.plan("discard", state="failed")
        jobs.retry(id)
        assert plan.carry_out() == jobs.Outcome(left_alone={id: "has moved on: is available"})

    @pytest.mark.parametrize("action", [jobs.retry, jobs.cancel, jobs.discard])
    def test_somebody_has_to_say_which_jobs(self, database: running.Database, action: Callable[..., Any]) -> None:
        for filters in ({}, {"queue": None}, {"limit": 5}):
            with pytest.raises(
                OptionError, match="which jobs\\? Name them by id, or by at least one of queue, job_type"
            ):
                action(**filters)

    @pytest.mark.parametrize(
        ("action", "state"),
        [(jobs.retry, "running"), (jobs.cancel, "failed"), (jobs.discard, "running"), (jobs.prune, "available")],
    )
    def test_state_that_an_action_does_not_take_is_refused(
        self, database: running.Database, action: Callable[..., Any], state: str
    ) -> None:
        with pytest.raises(OptionError, match=f"does not take {state} jobs; it takes those that are"):
            action(state=state)


# --- prune ------------------------------------------------------------------------------------------------------------


class TestPruning:
    def test_jobs_that_failed_long_ago_are_deleted(self, database: running.Database) -> None:
        old = insert_one(database, state="failed", created_at=LONG_AGO, last_retry=LONG_AGO)
        recent = insert_one(database, state="failed", created_at=LONG_AGO)
        waiting = insert_one(database, created_at=LONG_AGO, run_at=LONG_AGO)
        assert jobs.prune(older_than="7d").ids == (old,)
        assert [found.id for found in jobs.find()] == [waiting, recent]

    def test_age_is_that_of_the_settings_unless_it_is_given(self, database: running.Database) -> None:
        for days in (20, 40):
            (id,) = insert(database, state="failed", created_at=LONG_AGO)
            database.rows(f"UPDATE background_jobs SET last_retry = now() - interval '{days} days' WHERE id = %s", id)
        greenjobs.configure(database_url=database.url)
        assert len(jobs.prune().ids) == 1
        greenjobs.configure(database_url=database.url, keep_failed="2 weeks")
        assert len(jobs.prune().ids) == 1

    def test_age_has_to_be_given_where_jobs_are_kept_for_ever(self, database: running.Database) -> None:
        greenjobs.configure(database_url=database.url, keep_failed="forever")
        with pytest.raises(OptionError, match="Name older_than, for keep_failed is forever"):
            jobs.prune()

    def test_only_what_the_filters_say_is_pruned(self, database: running.Database) -> None:
        old = {"state": "failed", "created_at": LONG_AGO, "last_retry": LONG_AGO}
        insert(database, queue="emails", **old)
        bulk = insert_one(database, queue="bulk", **old)
        assert jobs.prune(queue="bulk").ids == (bulk,)

    def test_prune_takes_no_ids(self, database: running.Database) -> None:
        with pytest.raises(OptionError, match="prune takes no ids; discard does"):
            jobs.plan("prune", 17)

    def test_runner_prunes_by_itself(self, own_database: running.Database) -> None:
        @job
        def work() -> None: ...

        insert(own_database, 1500, state="failed", created_at=LONG_AGO, last_retry=LONG_AGO)
        recent = insert_one(own_database, state="failed", created_at=LONG_AGO)
        with running.started(Runner().register(work)):
            own_database.wait_for("state = 'failed'", count=1)
        assert own_database.state(recent) == "failed"

    def test_runner_keeps_failed_jobs_where_it_is_told_to_keep_them_for_ever(
        self, own_database: running.Database
    ) -> None:
        @job
        def work() -> None: ...

        greenjobs.configure(database_url=own_database.url, keep_failed="forever")
        id = insert_one(own_database, state="failed", created_at=LONG_AGO, last_retry=LONG_AGO)
        with running.started(Runner().register(work)) as handle:
            handle._maintenance.prune()
        assert own_database.state(id) == "failed"

    def test_job_that_was_failed_by_hand_counts_from_when_it_was_made(self, database: running.Database) -> None:
        """Its row says that it was last tried in 1970."""
        id = insert_one(database, state="failed", last_retry="epoch")
        assert storage.prune(database.connection, age_seconds=3600, limit=10) == 0
        assert jobs.prune(older_than=3600) == jobs.Outcome()
        assert database.state(id) == "failed"

    def test_a_batch_is_the_oldest(self, database: running.Database) -> None:
        old = [
            insert_one(database, state="failed", created_at=LONG_AGO, last_retry=f"2021-01-0{day} 00:00+00")
            for day in (3, 1, 2)
        ]
        assert storage.prune(database.connection, age_seconds=3600, limit=2) == 2
        assert database.column("SELECT id FROM background_jobs") == [old[0]]

    def test_job_that_somebody_changes_at_the_moment_is_passed_over(self, database: running.Database) -> None:
        first, second = insert(database, 2, state="failed", created_at=LONG_AGO, last_retry=LONG_AGO)
        with transaction(database) as cursor:
            cursor.execute("UPDATE background_jobs SET state = 'available' WHERE id = %s", [first])
            assert storage.prune(database.connection, age_seconds=3600, limit=10) == 1
        assert (database.state(first), database.state(second)) == ("available", None)

    def test_pruning_under_load_deletes_what_is_old_and_nothing_else(self, own_database: running.Database) -> None:
        """Two people and two runners prune, while jobs are run, fail, and are retried."""
        done: list[int] = []

        @job(max_retries=0)
        def work(number: int) -> None:
            if number % 3 == 0:
                raise ValueError("every third")
            gevent.sleep(0)
            done.append(number)

        insert(own_database, 5000, state="failed", created_at=LONG_AGO, last_retry=LONG_AGO)
        retried = insert(own_database, 500, state="failed", created_at=LONG_AGO, data='{"number": 1}')
        runners = [Runner().register(work), Runner().register(work)]
        with running.started(runners[0]), running.started(runners[1]):
            work.delay_many([(number,) for number in range(600)])
            greenlets = at_once(jobs.prune, jobs.prune, lambda: jobs.retry(*retried))
            results(greenlets)
            own_database.wait_for("state <> 'failed'", count=0)
            own_database.wait_for(f"last_retry = '{LONG_AGO}'", count=0)
        assert sorted(done) == sorted([1] * 500 + [number for number in range(600) if number % 3])
        assert own_database.count("state = 'failed'") == 200
