"""Jobs that exclude one another: one of a key runs at a time, the others take their turn, and none is left behind."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import processes
import psycopg2
import pytest
import running
from click.testing import CliRunner
from gevent.event import Event
from running import Database
from waiting import eventually

from greenjobs import current_job, job, jobs, pool, storage
from greenjobs.cli import main
from greenjobs.control import Retry, Snooze
from greenjobs.errors import JobDefinitionError, OptionError
from greenjobs.job import Job
from greenjobs.runner import Runner
from greenjobs.statement import PlanningConnection

PATIENCE_SECONDS = running.PATIENCE_SECONDS

# So long that whoever is not woken in these tests does not come in time.
NEVER_SECONDS = 3600


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with running.application(database_url, on_session_loss="finish") as database:
        yield database


@pytest.fixture
def connection(database: Database) -> Iterator[PlanningConnection]:
    connection = pool.connect(database.url, application_name="test", timeout_seconds=10)
    yield connection
    connection.close()


class Witness:
    """Sees how many of each key run at once, and in what order they began."""

    def __init__(self) -> None:
        self.at_work: Counter[Any] = Counter()
        self.most: Counter[Any] = Counter()
        self.order: list[Any] = []
        self._lock = threading.Lock()

    def attend(self, key: Any, what: Any = None, *, seconds: float = 0.002) -> None:
        """Be at work under this key for a moment."""
        with self._lock:
            self.at_work[key] += 1
            self.most[key] = max(self.most[key], self.at_work[key])
            self.order.append(what)
        gevent.sleep(seconds)
        with self._lock:
            self.at_work[key] -= 1


def keys_in(database: Database) -> list[str | None]:
    return database.column("SELECT exclusive_key FROM background_jobs ORDER BY id")


def unwoken(*jobs: Job[Any, Any], queue: str = "default", pool: int = 10) -> Runner:
    """A runner that looks for work by itself only when it starts."""
    return Runner().register(*jobs).configure_queue(queue, pool=pool, poll_interval=NEVER_SECONDS)


# --- what can be said -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": "no"}, r"^sync: overlap is 'no'; allowed: True or False"),
        ({"overlap": 0}, r"^sync: overlap is 0; allowed"),
        ({"overlap_key": "customer"}, r"^sync: overlap_key is for jobs with overlap=False"),
        ({"overlap": True, "overlap_key": "customer"}, r"^sync: overlap_key is for jobs with overlap=False"),
        ({"overlap": False, "overlap_key": 5}, r"^sync: overlap_key is 5; allowed: a text such as"),
        ({"overlap": False, "overlap_key": ""}, r"^sync: overlap_key is ''; allowed: a text such as"),
        (
            {"overlap": False, "overlap_key": "{shop}"},
            r"{shop} is no parameter of the job; allowed: {customer}, {full}",
        ),
        ({"overlap": False, "overlap_key": "{}"}, r"{} is no parameter of the job; allowed: {customer}, {full}"),
        ({"overlap": False, "overlap_key": "{customer"}, r"^sync: overlap_key is '{customer': expected '}'"),
    ],
)
def test_a_wrong_setting_is_refused_when_the_job_is_declared(settings: dict[str, Any], message: str) -> None:
    def sync(customer: int, full: bool = False) -> None: ...

    with pytest.raises(JobDefinitionError, match=message):
        job(**settings)(sync)


@pytest.mark.parametrize("key", ["{customer}-{full}", lambda customer, full: f"{customer}-{full}"])
def test_key_is_that_of_the_arguments_however_they_are_passed(database: Database, key: Any) -> None:
    @job(overlap=False, overlap_key=key)
    def sync(customer: int, full: bool = False) -> None: ...

    sync.delay(17)
    sync.delay(customer=17, full=False)
    sync.delay_many([(17,), {"customer": 17, "full": False}])
    sync.delay(18)
    *same, other = keys_in(database)
    assert len(set(same)) == 1
    assert None not in same
    assert other not in same


def test_key_may_look_into_arguments_and_into_extra_ones(database: Database) -> None:
    @job(overlap=False, overlap_key="{order[shop]}/{region}")
    def sync(order: dict[str, int], **extra: str) -> None: ...

    sync.delay({"shop": 1, "number": 1}, region="north")
    sync.delay({"shop": 1, "number": 2}, region="north", colour="red")
    sync.delay({"shop": 1, "number": 1}, region="south")
    first, second, third = keys_in(database)
    assert first == second != third


def test_without_a_key_all_of_a_type_exclude_one_another_and_none_of_another(database: Database) -> None:
    @job(overlap=False)
    def sync(customer: int) -> None: ...

    @job(overlap=False)
    def scan(customer: int) -> None: ...

    @job
    def mail(customer: int) -> None: ...

    for each in (sync, sync, scan, mail):
        each.delay(1)
    first, second, third, none = keys_in(database)
    assert first == second
    assert third not in (first, None)
    assert none is None


def test_keys_of_any_length_and_content_can_be_stored(database: Database) -> None:
    @job(overlap=False, overlap_key=lambda number: ["\0", "\ud800", "x" * 100_000][number])
    def sync(number: int) -> None: ...

    sync.delay_many([(0,), (1,), (2,)])
    assert len(set(keys_in(database))) == 3


@pytest.mark.parametrize("answer", [None, True, 1.5, b"x"])
def test_key_that_is_none_is_refused_and_nothing_enqueued(database: Database, answer: Any) -> None:
    @job(overlap=False, overlap_key=lambda: answer)
    def sync() -> None: ...

    with pytest.raises(OptionError, match=r"^sync: overlap_key .* answered .*; allowed: a text or an integer"):
        sync.delay()
    assert database.count() == 0


def test_key_that_fails_is_refused_and_nothing_enqueued(database: Database) -> None:
    @job(overlap=False, overlap_key="{customer.name}")
    def sync(customer: int) -> None: ...

    with pytest.raises(OptionError, match=r"^sync: overlap_key .* fails for this call: AttributeError"):
        sync.delay_many([(1,), (2,)])
    assert database.count() == 0


def test_key_is_that_of_a_transaction_too(database: Database) -> None:
    @job(overlap=False)
    def sync() -> None: ...

    sync.delay()
    with psycopg2.connect(database.url) as connection:
        sync.options(connection=connection).delay()
    connection.close()
    assert len(set(keys_in(database))) == 1


# --- one at a time ----------------------------------------------------------------------------------------------------


def test_one_of_a_key_runs_at_a_time_over_all_runners_and_all_of_them_run(database: Database) -> None:
    witness = Witness()

    @job(overlap=False, overlap_key="{customer}")
    def sync(customer: int, number: int) -> None:
        witness.attend(customer, number)

    sync.delay_many([(number % 7, number) for number in range(350)])
    runners = [unwoken(sync, pool=5) for _ in range(3)]
    with running.started(runners[0]), running.started(runners[1]), running.started(runners[2]):
        sync.delay_many([(number % 7, number) for number in range(350, 700)])
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert set(witness.most.values()) == {1}
    assert sorted(witness.order) == list(range(700))


def test_jobs_of_one_key_in_two_queues_do_not_overlap(database: Database) -> None:
    """Where they are claimed by different workers, which look at the same keys at the same time."""
    witness = Witness()

    @job(overlap=False, overlap_key="{customer}")
    def sync(customer: int, number: int) -> None:
        witness.attend(customer, number)

    with running.started(unwoken(sync, queue="one")), running.started(unwoken(sync, queue="two")):
        for number in range(40):
            for queue in ("one", "two"):
                sync.options(queue=queue).delay_many([(customer, number) for customer in range(5)])
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert set(witness.most.values()) == {1}
    assert len(witness.order) == 400


def test_they_come_in_the_order_of_priority_and_age(database: Database) -> None:
    witness = Witness()

    @job(overlap=False)
    def sync(what: str) -> None:
        witness.attend("all", what)

    for priority in (0, 5, -5):
        sync.options(priority=priority).delay_many([(f"{priority}: {number}",) for number in range(3)])
    with running.started(unwoken(sync)), running.started(unwoken(sync)):
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert witness.order == [f"{priority}: {number}" for priority in (5, 0, -5) for number in range(3)]


def test_they_take_their_turn_among_plain_jobs_by_priority(database: Database) -> None:
    """One slot, and more plain jobs than it ever has done: who is more urgent does not wait for them, and who is less
    urgent does."""
    order: list[str] = []

    @job
    def mail(what: str) -> None:
        order.append(what)
        gevent.sleep(0.06)  # slow enough for none to be claimed ahead

    @job(overlap=False, overlap_key="{what}")
    def sync(what: str) -> None:
        order.append(what)

    mail.delay_many([("plain",)] * 12)
    sync.options(priority=-1).delay("patient")
    sync.options(priority=1).delay("urgent")
    with running.started(unwoken(mail, sync, pool=1)):
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert order.index("urgent") <= 2
    assert order[-1] == "patient"


def test_an_endless_stream_of_plain_jobs_starves_nobody(database: Database) -> None:
    """The queue is never empty while the others wait."""
    ran = Event()
    fed: list[int] = []

    @job
    def mail() -> None:
        fed.append(1)
        if not ran.is_set():
            mail.delay_many([()] * 2)

    @job(overlap=False)
    def sync() -> None:
        ran.set()

    mail.delay_many([()] * 300)
    sync.delay()
    with running.started(unwoken(mail, sync, pool=3)):
        assert ran.wait(PATIENCE_SECONDS)
    database.rows("TRUNCATE background_jobs")


def test_one_customer_with_thousands_of_jobs_in_front_does_not_keep_others_from_free_slots(database: Database) -> None:
    may_end = Event()
    ran: list[int] = []

    @job(overlap=False, overlap_key="{customer}")
    def sync(customer: int) -> None:
        ran.append(customer)
        if customer == 0:
            may_end.wait(PATIENCE_SECONDS)

    sync.delay_many([(0,)] * 3000)
    sync.delay_many([(1,), (2,), (3,)])
    with running.started(unwoken(sync)):
        eventually(lambda: sorted(ran) == [0, 1, 2, 3], "others did not run", seconds=PATIENCE_SECONDS)
        database.rows("DELETE FROM background_jobs WHERE state = 'available'")
        may_end.set()


def test_read_ahead_claims_one_of_a_key_at_most(database: Database, connection: PlanningConnection) -> None:
    @job(overlap=False, overlap_key="{customer}")
    def sync(customer: int) -> None: ...

    sync.delay_many([(number % 3,) for number in range(30)])
    claimed = storage.claim_exclusive(connection, runner=1, queue="default", job_types=["sync"], limit=30)
    assert [row.data for row in claimed] == [f'{{"customer": {number}}}' for number in range(3)]
    assert storage.claim(connection, runner=1, queue="default", job_types=["sync"], limit=30) == []


def test_two_claims_of_the_same_keys_at_once_share_them(database: Database) -> None:
    """Claims that were begun with the same view of the table: neither fails, and no key is taken twice."""

    @job(overlap=False, overlap_key="{customer}")
    def sync(customer: int) -> None: ...

    connections = [pool.connect(database.url, application_name="test", timeout_seconds=10) for _ in range(6)]
    for _ in range(20):
        for queue in ("one", "two"):
            sync.options(queue=queue).delay_many([(customer,) for customer in range(20)])
        claims = [
            gevent.spawn(
                storage.claim_exclusive,
                connection,
                runner=1,
                queue=("one", "two")[number % 2],
                job_types=["sync"],
                limit=15,
            )
            for number, connection in enumerate(connections)
        ]
        claimed = [row for claim in claims for row in claim.get()]
        keys = [row.exclusive_key for row in claimed]
        assert len(set(keys)) == len(keys) <= 20
        database.rows("TRUNCATE background_jobs")
    for each in connections:
        each.close()


def test_database_refuses_a_second_running_job_of_a_key(database: Database) -> None:
    """Whoever tries, also one who knows nothing of keys."""

    @job(overlap=False)
    def sync() -> None: ...

    sync.delay_many([()] * 2)
    with pytest.raises(psycopg2.errors.UniqueViolation):
        database.rows("UPDATE background_jobs SET state = 'running', claimed_by = 1, claimed_at = now()")


# --- the next one starts at once --------------------------------------------------------------------------------------


def test_the_next_starts_at_once_and_not_at_the_next_poll(database: Database) -> None:
    witness = Witness()

    @job(overlap=False)
    def sync(number: int) -> None:
        witness.attend("all", number, seconds=0)

    with running.started(unwoken(sync)):
        eventually(lambda: database.value("SELECT count(*) FROM background_waiting") == 1, "it does not wait")
        sync.delay_many([(number,) for number in range(200)])
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert witness.order == list(range(200))


@pytest.mark.parametrize("ending", ["done", "failed", "retried", "snoozed", "cancelled"])
def test_however_one_ends_one_that_waits_elsewhere_starts_at_once(database: Database, ending: str) -> None:
    """In another queue, which another runner serves that is idle and polls once an hour."""
    began, ran = Event(), Event()

    @job(overlap=False, max_retries=0 if ending == "failed" else 5, backoff=1000)
    def sync(is_first: bool) -> None:
        if not is_first:
            ran.set()
            return
        began.set()
        if ending == "cancelled":
            gevent.sleep(PATIENCE_SECONDS)
        eventually(lambda: len(waiting()) == 1, "the other does not wait")
        if ending == "snoozed":
            raise Snooze(1000)
        if ending == "retried":
            raise Retry("later")
        assert ending == "done"

    def waiting() -> list[str]:
        return database.column("SELECT queue FROM background_waiting WHERE queue = 'two'")

    first = sync.options(queue="one").delay(True)
    with running.started(unwoken(sync, queue="one")):
        assert began.wait(PATIENCE_SECONDS)
        sync.options(queue="two").delay(False)
        with running.started(unwoken(sync, queue="two")):
            if ending == "cancelled":
                eventually(lambda: len(waiting()) == 1, "the other does not wait")
                assert first.cancel() == "asked"
            assert ran.wait(PATIENCE_SECONDS)
            eventually(lambda: database.count("queue = 'two'") == 0, "it is not acknowledged")


def test_what_a_runner_gives_back_when_it_stops_goes_on_elsewhere_before_what_is_behind_it(database: Database) -> None:
    order: list[str] = []
    began = Event()
    at_leisure = Event()

    @job(overlap=False)
    def sync(what: str) -> None:
        order.append(what)
        if len(order) == 1:
            began.set()
            at_leisure.wait(PATIENCE_SECONDS)

    sync.delay_many([("first",), ("second",)])
    handle = unwoken(sync).start()
    assert began.wait(PATIENCE_SECONDS)
    with running.started(unwoken(sync)):
        eventually(lambda: database.value("SELECT count(*) FROM background_waiting") >= 1, "the other does not wait")
        handle.shutdown(urgency=2)
        assert handle.wait_for_shutdown(PATIENCE_SECONDS)
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert order == ["first", "first", "second"]


def test_a_stopping_runner_that_finishes_one_wakes_who_is_next(database: Database) -> None:
    began, may_end = Event(), Event()
    ran_on: list[Any] = []

    @job(overlap=False)
    def sync() -> None:
        ran_on.append(current_job.context)
        began.set()
        may_end.wait(PATIENCE_SECONDS)

    sync.delay_many([(), ()])
    first, second = (
        Runner(context=name).register(sync).configure_queue("default", poll_interval=NEVER_SECONDS)
        for name in ("first", "second")
    )
    handle = first.start()
    assert began.wait(PATIENCE_SECONDS)
    with running.started(second):
        eventually(lambda: database.value("SELECT count(*) FROM background_waiting") >= 1, "the other does not wait")
        handle.shutdown()
        may_end.set()
        assert handle.wait_for_shutdown(PATIENCE_SECONDS)
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert ran_on == ["first", "second"]


# --- runners that die -------------------------------------------------------------------------------------------------


def hold(database: Database, connection: PlanningConnection, *, queue: str = "default") -> list[storage.ClaimedJob]:
    """Claim what a runner could that is dead since; returns the rows."""
    runner = database.value(
        "INSERT INTO background_runners (hostname, pid, version, queues, job_types)"
        " VALUES ('gone', 1, '0', '{}', '{}') RETURNING id"
    )
    return storage.claim_exclusive(connection, runner=runner, queue=queue, job_types=["sync"], limit=10)


def test_job_of_a_dead_runner_goes_on_and_those_behind_it_follow(
    database: Database, connection: PlanningConnection
) -> None:
    witness = Witness()

    @job(overlap=False)
    def sync(number: int) -> None:
        witness.attend("all", (number, current_job.row.crashes))

    sync.delay_many([(number,) for number in range(5)])
    assert len(hold(database, connection)) == 1
    with running.started(unwoken(sync)), running.started(unwoken(sync)):
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert witness.order == [(0, 1), (1, 0), (2, 0), (3, 0), (4, 0)]
    assert witness.most["all"] == 1


def test_suspect_waits_for_its_key_and_comes_before_those_behind_it(
    database: Database, connection: PlanningConnection
) -> None:
    """It is claimed apart from the others, and must neither run beside one of them nor wait for all of them."""
    order: list[int] = []
    began, may_end = Event(), Event()

    @job(overlap=False)
    def sync(number: int) -> None:
        order.append(number)
        if number == 0:
            began.set()
            may_end.wait(PATIENCE_SECONDS)

    sync.delay_many([(number,) for number in range(4)])
    with running.started(unwoken(sync)) as handle:
        assert began.wait(PATIENCE_SECONDS)
        database.rows("UPDATE background_jobs SET crashes = 1 WHERE data ->> 'number' = '1'")
        handle.claim_suspect("default")
        assert database.count("state = 'running'") == 1
        may_end.set()
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert order == [0, 1, 2, 3]


def test_job_that_has_failed_because_its_runners_died_lets_others_of_its_key_in_other_queues_go(
    database: Database, connection: PlanningConnection
) -> None:
    ran = Event()

    @job(overlap=False)
    def sync() -> None:
        ran.set()

    poison = sync.options(queue="one").delay()
    sync.options(queue="two").delay()
    with running.started(unwoken(sync, queue="two")) as handle:
        assert ran.wait(PATIENCE_SECONDS)
        eventually(lambda: database.count() == 1, "it is not acknowledged")
        ran.clear()
        held = hold(database, connection, queue="one")
        assert [row.id for row in held] == [poison.id]
        sync.options(queue="two").delay()
        database.rows("UPDATE background_jobs SET crashes = 2 WHERE id = %s", poison.id)
        assert ran.wait(PATIENCE_SECONDS)
        assert handle.runner_id is not None
    assert database.state(poison.id) == "failed"


def test_exclusive_job_of_a_killed_runner_is_run_by_another_and_never_beside_one_of_its_key(
    database: Database, tmp_path: Path
) -> None:
    """Real processes, killed as the kernel does it."""
    database.rows("CREATE TABLE notes (id serial, pid int, what text)")
    database.rows("CREATE TABLE gate (is_open boolean)")
    processes.write_application(
        tmp_path,
        """
        import os, time
        import greenjobs
        from greenjobs import config, job, pool

        def note(what):
            with pool.shared_pool(config.current()).connection() as connection, connection.cursor() as cursor:
                cursor.execute("INSERT INTO notes (pid, what) VALUES (%s, %s)", (os.getpid(), what))

        def is_open():
            with pool.shared_pool(config.current()).connection() as connection, connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM gate")
                return cursor.rowcount

        @job(overlap=False, overlap_key="customer {customer}")
        def sync(customer, number):
            note(f"{customer}: {number} began")
            while not is_open():
                time.sleep(0.02)
            note(f"{customer}: {number} ended")
        """,
    )
    enqueue = "from app import sync; sync.delay_many([(customer, n) for n in range(3) for customer in 'ab'])"
    processes.run("python", "-c", enqueue, folder=tmp_path, database_url=database.url)

    def notes(sql: str = "true") -> list[str]:
        return database.column(f"SELECT what FROM notes WHERE {sql} ORDER BY id")

    with processes.runner(tmp_path, database.url) as first:
        eventually(lambda: sorted(notes()) == ["a: 0 began", "b: 0 began"], "they do not run", seconds=60)
        with processes.runner(tmp_path, database.url) as second:
            assert len(notes()) == 2
            first.kill()
            eventually(lambda: notes(f"pid = {second.pid}"), "the other does not take over", seconds=60)
            database.rows("INSERT INTO gate VALUES (true)")
            eventually(lambda: database.count() == 0, "jobs are left", seconds=60)
    for customer in "ab":
        turns = [f"{customer}: {number} {what}" for number in range(3) for what in ("began", "ended")]
        assert notes(f"pid = {second.pid} AND starts_with(what, '{customer}')") == turns


# --- versions of an application ---------------------------------------------------------------------------------------


def test_rows_with_a_key_of_a_job_that_has_none_any_more_are_run_one_at_a_time(database: Database) -> None:
    witness = Witness()

    @job(name="sync", overlap=False)
    def of_old() -> None: ...

    of_old.delay_many([()] * 20)
    running._job_module._registry.clear()  # type: ignore[attr-defined]  # another release, in another process

    @job
    def sync() -> None:
        witness.attend("all")

    runner = Runner().register(sync).configure_queue("default", pool=5, poll_interval=0.1)
    with running.started(runner):
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert witness.most["all"] == 1
    assert len(witness.order) == 20


def test_rows_under_an_alias_are_run(database: Database) -> None:
    witness = Witness()

    @job(name="sync", overlap=False)
    def of_old() -> None: ...

    of_old.delay_many([()] * 5)
    running._job_module._registry.clear()  # type: ignore[attr-defined]

    @job(aliases=["sync"], overlap=False)
    def synchronise() -> None:
        witness.attend("all")

    running.work_off(synchronise)
    assert witness.most["all"] == 1
    assert len(witness.order) == 5


def test_worker_that_knows_no_such_jobs_asks_for_none(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hot path is as it was: no statement more for a claim or an outcome."""
    asked: list[str] = []
    for name in ("claim_exclusive", "wake_next"):
        monkeypatch.setattr(storage, name, lambda *args, **kwargs: asked.append("asked") or [])

    @job
    def mail() -> None: ...

    mail.delay_many([()] * 500)
    running.work_off(mail)
    assert database.count() == 0
    assert asked == []


def test_runner_that_stops_when_its_queues_are_empty_leaves_none_behind(database: Database) -> None:
    witness = Witness()

    @job(overlap=False)
    def sync() -> None:
        witness.attend("all")

    sync.delay_many([()] * 50)
    running.work_off(sync)
    assert database.count() == 0
    assert witness.most["all"] == 1


# --- together with other settings -------------------------------------------------------------------------------------


def test_with_unique_there_is_one_that_waits_and_one_that_runs_at_most(database: Database) -> None:
    may_end = threading.Event()
    counts: list[tuple[int, int]] = []
    began = threading.Semaphore(0)

    @job(unique=True, overlap=False)
    def sync() -> None:
        began.release()
        may_end.wait(PATIENCE_SECONDS)

    with running.started(unwoken(sync)), running.started(unwoken(sync)):
        first = sync.delay()
        assert began.acquire(timeout=PATIENCE_SECONDS)
        second = sync.delay()
        assert not second.duplicate
        for _ in range(10):
            again = sync.delay()
            assert (again.id, again.duplicate) == (second.id, True)
            counts.append((database.count("state = 'running'"), database.count("state = 'available'")))
        may_end.set()
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert set(counts) == {(1, 1)}
    assert first.id != second.id


def test_each_of_many_unique_jobs_has_its_own_key(database: Database) -> None:
    """They are inserted in the order of their unique keys, and some of them not at all."""

    @job(unique=True, overlap=False, overlap_key="{customer}", expires=60)
    def sync(customer: int, number: int) -> None: ...

    calls = [(number % 5, number % 20) for number in range(60)]
    sync.delay_many(calls[:10])
    sync.delay_many(calls)
    rows = database.rows("SELECT data ->> 'customer', exclusive_key, expires_at IS NULL FROM background_jobs")
    assert len(rows) == 20
    keys = {customer: storage.exclusive_key("sync", customer) for customer in "01234"}
    assert all(row == (row[0], keys[row[0]], False) for row in rows)


def test_job_that_is_to_be_tried_again_lets_others_of_its_key_go_first(database: Database) -> None:
    order: list[str] = []

    @job(overlap=False, max_retries=3)
    def sync(what: str) -> None:
        order.append(what)
        if len(order) == 1:
            raise Retry("once more", after=3600)

    sync.delay_many([("first",), ("second",)])
    with running.started(unwoken(sync)):
        database.wait_for("true", count=1)
        database.rows("UPDATE background_jobs SET run_at = now()")  # an hour goes by
        eventually(lambda: database.count() == 0, "jobs are left", seconds=PATIENCE_SECONDS)
    assert order == ["first", "second", "first"]


def test_job_that_waits_for_another_says_so(database: Database, connection: PlanningConnection) -> None:
    @job(overlap=False)
    def sync() -> None: ...

    first, second, later = sync.delay(), sync.delay(), sync.options(delay=60).delay()
    hold(database, connection)
    found = {id: jobs.get(id) for id in (first.id, second.id, later.id)}
    assert [each.waits_for for each in found.values() if each] == [None, first.id, None]
    shown = [
        CliRunner().invoke(main, ["jobs", "show", str(id), "--database-url", database.url]).output
        for id in (first.id, second.id)
    ]
    assert "waits for" not in shown[0]
    assert f"  waits for     job {first.id}, with the same overlap key\n" in shown[1]
