"""A runner's life: what it serves, how it is told what to do, how it stops, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import databases
import gevent
import pytest
import running
from gevent.event import Event
from waiting import eventually

import greenjobs
from greenjobs import current_job, job
from greenjobs.errors import ConfigError, DatabaseUnavailable, JobsFailed
from greenjobs.runner import Runner

PATIENCE_SECONDS = running.PATIENCE_SECONDS


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing but rows behind."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    with running.application(shared_url) as database:
        yield database
        database.rows("TRUNCATE background_jobs, background_runners, background_waiting")


# --- configuring ------------------------------------------------------------------------------------------------------


def test_methods_that_configure_can_be_chained(database: running.Database) -> None:
    @job
    def work() -> None: ...

    runner = Runner()

    assert runner.register(work).configure_queue("default").shutdown_when_queue_empty() is runner


def test_runner_takes_its_database_from_the_settings(database: running.Database) -> None:
    assert Runner().database_url == database.url


def test_given_database_wins_over_the_settings(database: running.Database) -> None:
    assert Runner("postgresql://elsewhere/shop").database_url == "postgresql://elsewhere/shop"


@pytest.mark.parametrize("url", ["mysql://here/shop", "", 5, "localhost"], ids=repr)
def test_wrong_database_is_refused(database: running.Database, url: Any) -> None:
    with pytest.raises(ConfigError, match="database_url"):
        Runner(url)


@pytest.mark.parametrize("given", [print, "work", None, 5], ids=lambda given: repr(given)[:10])
def test_only_jobs_can_be_registered(database: running.Database, given: Any) -> None:
    with pytest.raises(ConfigError, match="decorated with @job"):
        Runner().register(given)


def test_registering_a_job_again_is_harmless(database: running.Database) -> None:
    @job
    def work() -> None: ...

    Runner().register(work, work).register(work)


def test_two_jobs_of_one_name_are_not_registered(database: running.Database) -> None:
    def declare() -> Any:
        @job
        def work() -> None: ...

        return work

    with pytest.raises(ConfigError, match="two jobs are named 'work'"):
        Runner().register(declare(), declare())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"queue": ""}, "queue is ''"),
        ({"queue": "two words"}, "queue is 'two words'"),
        ({"queue": "emails:5"}, "queue is 'emails:5'"),
        ({"queue": 5}, "queue is 5"),
        ({"queue": "emails", "pool": 0}, "pool is 0"),
        ({"queue": "emails", "pool": -1}, "pool is -1"),
        ({"queue": "emails", "pool": 1.5}, "pool is 1.5"),
        ({"queue": "emails", "pool": True}, "pool is True"),
        ({"queue": "emails", "pool": 1_000_000}, "pool is 1000000"),
        ({"queue": "emails", "pool": "many"}, "pool is 'many'"),
        ({"queue": "emails", "poll_interval": 0}, "poll_interval is 0"),
        ({"queue": "emails", "poll_interval": float("nan")}, "poll_interval is nan"),
        ({"queue": "emails", "poll_interval": float("inf")}, "poll_interval is inf"),
        ({"queue": "emails", "poll_interval": "soon"}, "poll_interval is 'soon'"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_queue_is_refused_with_option_and_value(
    database: running.Database, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Runner().configure_queue(**arguments)


def test_runner_without_jobs_does_not_start(database: running.Database) -> None:
    with pytest.raises(ConfigError, match="no jobs"):
        Runner().start()


def test_runner_does_not_start_without_its_database(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with pytest.raises(DatabaseUnavailable, match="cannot connect"):
        Runner("postgresql://127.0.0.1:1/shop").register(work).start()


def test_without_queues_it_serves_those_that_its_jobs_name(database: running.Database) -> None:
    @job(queue="one")
    def first() -> None: ...

    @job(queue="other")
    def second() -> None: ...

    @job
    def third() -> None: ...

    with running.started(Runner().register(first, second, third)) as handle:
        assert sorted(handle.workers) == ["default", "one", "other"]


def test_with_queues_it_serves_those_alone(database: running.Database) -> None:
    ran = []

    @job(queue="one")
    def first() -> None:
        ran.append("first")

    @job(queue="other")
    def second() -> None:
        ran.append("second")

    first.delay()
    second.delay()
    runner = Runner().register(first, second).configure_queue("other").shutdown_when_queue_empty()
    assert runner.start().wait_for_shutdown(PATIENCE_SECONDS)

    assert ran == ["second"]
    assert database.column("SELECT queue FROM background_jobs") == ["one"]


def test_runner_can_be_started_again_after_it_has_ended(database: running.Database) -> None:
    ran = []

    @job
    def work() -> None:
        ran.append(1)

    runner = Runner().register(work).shutdown_when_queue_empty()
    for _ in range(2):
        work.delay()
        assert runner.start().wait_for_shutdown(PATIENCE_SECONDS)

    assert ran == [1, 1]


def test_runner_registers_what_it_is_and_serves(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with running.started(Runner().register(work).configure_queue("default", pool=7, poll_interval=2.5)):
        rows = database.rows("SELECT id, version, queues, job_types, ended_at FROM background_runners")

    assert rows == [(rows[0][0], greenjobs.__version__, {"default": {"pool": 7, "poll_interval": 2.5}}, ["work"], None)]


def test_check_for_failed_jobs_is_silent_when_there_are_none(database: running.Database) -> None:
    @job
    def work() -> None: ...

    work.delay()

    Runner().check_for_failed_jobs()


def test_check_for_failed_jobs_counts_those_that_failed_at_least_once(database: running.Database) -> None:
    @job
    def work(retries: int) -> None:
        raise RuntimeError

    work.delay_many([(1,), (2,)])
    running.work_off(work)

    with pytest.raises(JobsFailed, match="2 jobs failed") as caught:
        Runner().check_for_failed_jobs()
    assert caught.value.count == 2


# --- until it is empty ------------------------------------------------------------------------------------------------


def test_runner_with_nothing_to_do_ends(database: running.Database) -> None:
    @job
    def work() -> None: ...

    assert Runner().register(work).shutdown_when_queue_empty().start().wait_for_shutdown(PATIENCE_SECONDS)


def test_runner_that_ends_by_itself_does_not_wait_for_later_jobs(database: running.Database) -> None:
    @job
    def work() -> None: ...

    work.options(delay=3600).delay()
    running.work_off(work)

    assert database.column("SELECT state FROM background_jobs") == ["scheduled"]


def test_runner_that_ends_by_itself_runs_what_became_due(database: running.Database) -> None:
    @job
    def work() -> None: ...

    work.options(delay=3600).delay()
    database.rows("UPDATE background_jobs SET run_at = now() - interval '1 second'")
    running.work_off(work)

    assert database.count() == 0


def test_runner_that_ends_by_itself_waits_for_what_its_jobs_enqueue_late(database: running.Database) -> None:
    ran = []

    @job
    def second() -> None:
        ran.append("second")

    @job
    def first() -> None:
        gevent.sleep(0.2)
        second.delay()

    first.delay()
    running.work_off(first, second)

    assert ran == ["second"]


def test_runner_without_an_end_waits_for_more(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with running.started(Runner().register(work)) as handle:
        work.delay()
        database.wait_for("true", count=0)
        assert not handle.wait_for_shutdown(0.1)


# --- stopping ---------------------------------------------------------------------------------------------------------


class _Blocking:
    """A job that runs until it is released, and what has become of it."""

    def __init__(self) -> None:
        self.release = Event()
        self.started = self.finished = 0

        @job(queue="blocking")
        def block() -> None:
            self.started += 1
            assert self.release.wait(PATIENCE_SECONDS)
            self.finished += 1

        self.job = block


def test_stopping_lets_finish_what_runs(database: running.Database) -> None:
    blocking = _Blocking()
    blocking.job.delay_many([()] * 3)
    with running.started(Runner().register(blocking.job)) as handle:
        eventually(lambda: blocking.started == 3, "they did not start")
        handle.shutdown()
        assert not handle.wait_for_shutdown(0.05)
        blocking.release.set()

    assert blocking.finished == 3
    assert database.count() == 0


def test_stopping_starts_nothing_more(database: running.Database) -> None:
    blocking = _Blocking()
    blocking.job.delay_many([()] * 20)
    with running.started(Runner().register(blocking.job).configure_queue("blocking", pool=2)) as handle:
        eventually(lambda: blocking.started == 2, "they did not start")
        handle.shutdown()
        blocking.release.set()

    assert blocking.started == 2
    assert database.rows("SELECT state, count(*), max(crashes), max(retries) FROM background_jobs GROUP BY 1") == [
        ("available", 18, 0, 0)
    ]


def test_stopped_runner_is_not_alive_and_waits_for_nothing(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with running.started(Runner().register(work)):
        eventually(lambda: database.column("SELECT runner FROM background_waiting"), "it does not wait")

    assert database.rows("SELECT * FROM background_waiting") == []
    assert database.column("SELECT ended_at IS NOT NULL FROM background_runners") == [True]


def test_stopping_twice_is_no_error(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with running.started(Runner().register(work)) as handle:
        handle.shutdown()
        handle.shutdown()
        handle.shutdown()

    assert handle.wait_for_shutdown(0)
    assert handle.wait_for_shutdown()


def test_second_call_interrupts_what_runs_and_gives_it_back_without_counting_it(database: running.Database) -> None:
    blocking = _Blocking()
    blocking.job.delay()
    with running.started(Runner().register(blocking.job)) as handle:
        eventually(lambda: blocking.started, "it did not start")
        handle.shutdown()
        handle.shutdown()
        assert handle.wait_for_shutdown(PATIENCE_SECONDS)

    assert blocking.finished == 0
    assert database.rows("SELECT state, retries, crashes, errors FROM background_jobs") == [("available", 0, 0, None)]


# --- when the runner dies ---------------------------------------------------------------------------------------------


def _die(database: running.Database, *, holding: list[int], crashes: int = 0) -> int:
    """The register and the rows as a runner leaves them that was killed while it held these jobs."""
    runner = database.value(
        "INSERT INTO background_runners (hostname, pid, version, queues, job_types)"
        " VALUES ('gone', 1, '0', '{}', '{}') RETURNING id"
    )
    database.rows(
        "UPDATE background_jobs SET state = 'running', claimed_by = %s, attempt = 1, claimed_at = now(), crashes = %s"
        " WHERE id = ANY(%s)",
        runner,
        crashes,
        holding,
    )
    return int(runner)


def test_jobs_of_a_dead_runner_run_elsewhere_and_know_of_it(database: running.Database) -> None:
    ran = []

    @job
    def work() -> None:
        ran.append((current_job.id, current_job.attempt, current_job.row.crashes))

    handle = work.delay()
    _die(database, holding=[handle.id])
    running.work_off(work)

    assert ran == [(handle.id, 2, 1)]


def test_runner_that_dies_later_is_found_too(database: running.Database) -> None:
    @job
    def work() -> None: ...

    handle = work.options(queue="elsewhere").delay()
    with running.started(Runner().register(work)):
        _die(database, holding=[handle.id])
        database.rows("UPDATE background_jobs SET queue = 'default'")
        database.wait_for("true", count=0)


def test_suspects_run_one_at_a_time_and_the_innocent_beside_them(database: running.Database) -> None:
    running_suspects = peak = innocents = 0

    @job
    def work(is_suspect: bool) -> None:
        nonlocal running_suspects, peak, innocents
        if is_suspect:
            running_suspects += 1
            peak = max(peak, running_suspects)
            gevent.sleep(0.002)
            running_suspects -= 1
        else:
            innocents += 1

    suspects = work.delay_many([(True,)] * 10)
    work.delay_many([(False,)] * 10)
    _die(database, holding=[handle.id for handle in suspects])
    running.work_off(work, pool=20)

    assert (peak, innocents) == (1, 10)
    assert database.count() == 0


def test_suspects_of_several_queues_run_one_at_a_time(database: running.Database) -> None:
    now = peak = 0

    @job
    def work() -> None:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        gevent.sleep(0.002)
        now -= 1

    handles = [work.options(queue=queue).delay() for queue in ("a", "b", "c") for _ in range(3)]
    _die(database, holding=[handle.id for handle in handles])
    runner = Runner().register(work).shutdown_when_queue_empty()
    for queue in ("a", "b", "c"):
        runner.configure_queue(queue)
    assert runner.start().wait_for_shutdown(PATIENCE_SECONDS)

    assert peak == 1
    assert database.count() == 0


def test_job_whose_runner_died_three_times_is_not_run_again(database: running.Database) -> None:
    ran = []

    @job
    def work() -> None:
        ran.append(1)

    handle = work.delay()
    _die(database, holding=[handle.id], crashes=2)
    running.work_off(work)

    assert ran == []
    ((state, crashes, error),) = database.rows("SELECT state, crashes, errors->-1 FROM background_jobs")
    assert (state, crashes, error["error"]) == ("failed", 3, "RunnerDied")
    assert error["message"] == "its runner died 3 times"


def test_death_of_a_runner_uses_up_no_retry(database: running.Database) -> None:
    @job(max_retries=0)
    def work() -> None: ...

    handle = work.delay()
    _die(database, holding=[handle.id])
    running.work_off(work)

    assert database.count() == 0


def test_rescue_is_logged(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    @job
    def work() -> None: ...

    handle = work.delay()
    _die(database, holding=[handle.id])
    running.work_off(work)

    assert f"job {handle.id} (work) was held by a runner that died (1 times so far): available again" in caplog.text


# --- outcomes that come too late --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["done", "failed"])
def test_outcome_of_a_job_that_was_taken_away_changes_nothing_and_is_logged(
    database: running.Database, caplog: pytest.LogCaptureFixture, ending: str
) -> None:
    release = Event()
    started = []

    @job
    def work() -> None:
        started.append(1)
        assert release.wait(PATIENCE_SECONDS)
        if ending == "failed":
            raise RuntimeError

    handle = work.delay()
    with running.started(Runner().register(work)):
        eventually(lambda: started, "it did not start")
        database.rows(
            "UPDATE background_jobs SET attempt = attempt + 1, claimed_by = 2000000000, claimed_at = now()"
            " WHERE id = %s",
            handle.id,
        )
        release.set()
        eventually(lambda: "its outcome changes nothing" in caplog.text, "it was not logged")

    assert database.rows("SELECT state, claimed_by, retries FROM background_jobs") == [("running", 2_000_000_000, 0)]
    assert f"job {handle.id} is no longer held here" in caplog.text


def test_job_that_comes_back_while_its_former_attempt_runs_is_counted(
    database: running.Database,
) -> None:
    """As to a runner that lost its session, let its jobs go on, and claims what another one rescued meanwhile."""
    began = [Event(), Event()]
    ends = [Event(), Event()]
    attempts = iter((0, 1))

    @job
    def work() -> None:
        number = next(attempts)
        began[number].set()
        assert ends[number].wait(PATIENCE_SECONDS)

    handle = work.delay()
    with running.started(Runner().register(work)) as runner:
        assert began[0].wait(PATIENCE_SECONDS)
        database.rows(
            "UPDATE background_jobs SET state = 'available', claimed_by = NULL, claimed_at = NULL WHERE id = %s",
            handle.id,
        )
        assert began[1].wait(PATIENCE_SECONDS)
        ends[0].set()
        eventually(lambda: runner.finished_jobs() == 1, "the former attempt did not end")
        assert [attempt.row.id for attempt in runner.attempts()] == [handle.id]
        ends[1].set()
        eventually(lambda: runner.finished_jobs() == 2, "the second attempt did not end")
    assert (runner.running_jobs(), database.count()) == (0, 0)
