"""Unique jobs in the database: whatever happens to the first, and however many enqueue the second at once."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import databases
import gevent
import psycopg2
import pytest
import running
from psycopg2.extensions import connection as Connection
from waiting import eventually

from greenjobs import call, inspection, job, jobs, storage
from greenjobs.errors import UniquenessError
from greenjobs.job import Job
from greenjobs.pool import connect
from greenjobs.runner import Runner
from greenjobs.storage import Failure, Fence, conflicts

_ENQUEUERS = 50

_UNTIL = ["started", "finished", 3600]
_ON_CONFLICT = ["keep", "replace", "extend", "merge"]
_ACTION = {"keep": "kept", "replace": "replaced", "extend": "extended", "merge": "merged"}

_OURS = 11


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing but rows behind."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    with running.application(shared_url, enqueue_connections=_ENQUEUERS, enqueue_timeout=60) as database:
        yield database
        database.rows("TRUNCATE background_jobs, background_unique_windows, background_runners, background_waiting")


@pytest.fixture
def connection(database: running.Database) -> Iterator[Connection]:
    """As the runner has them."""
    connection = connect(database.url, application_name="test", timeout_seconds=60)
    yield connection
    connection.close()


@pytest.fixture
def transaction(database: running.Database) -> Iterator[Connection]:
    """A connection of the caller's own."""
    connection = psycopg2.connect(database.url)
    yield connection
    connection.close()


def joined(waiting: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {**new, "notes": [*waiting.get("notes", []), *new.get("notes", [])]}


def declare(until: Any = "started", on_conflict: Any = "keep", **settings: Any) -> Job[Any, Any]:
    """A job of which there is one for each customer."""

    @job(
        unique=("customer",),
        until=until,
        on_conflict=on_conflict,
        merge=joined if on_conflict == "merge" else None,
        **settings,
    )
    def notify(customer: int, notes: list[int]) -> None: ...

    return notify


def notes_of(database: running.Database, id: int) -> list[int]:
    notes: list[int] = database.value("SELECT data->'notes' FROM background_jobs WHERE id = %s", id)
    return notes


def claim(connection: Connection, runner: int = _OURS) -> list[Fence]:
    claimed = storage.claim(connection, runner=runner, queue="default", job_types=["notify"], limit=100)
    return [Fence(row.id, row.attempt) for row in claimed]


def wait_for_locks(database: running.Database, count: int) -> None:
    eventually(
        lambda: (
            database.value(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            == count
        ),
        f"{count} sessions wait for a lock",
        seconds=running.PATIENCE_SECONDS,
    )


# --- at once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_commits", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize("on_conflict", _ON_CONFLICT)
@pytest.mark.parametrize("until", _UNTIL)
def test_of_fifty_that_enqueue_at_once_one_has_a_row_and_the_others_act_on_it(
    database: running.Database, transaction: Connection, until: Any, on_conflict: str, first_commits: bool
) -> None:
    """All fifty wait for one that was there before them and has not committed."""
    notify = declare(until, on_conflict)
    first = notify.options(connection=transaction, delay=3600).delay(1, [0])
    numbers = range(1, _ENQUEUERS + 1)
    crowd = [gevent.spawn(notify.options(delay=7200).delay, 1, [number]) for number in numbers]
    wait_for_locks(database, _ENQUEUERS)
    transaction.commit() if first_commits else transaction.rollback()
    handles = [greenlet.get() for greenlet in gevent.joinall(crowd, raise_error=True)]

    ((id, run_in, notes),) = database.rows(
        "SELECT id, extract(epoch FROM run_at - created_at)::int, data->'notes' FROM background_jobs"
    )
    assert {handle.id for handle in handles} == {id}
    enqueued = 0 if first_commits else 1
    assert [handle.duplicate for handle in handles].count(False) == enqueued
    assert [handle.action for handle in handles].count(_ACTION[on_conflict]) == _ENQUEUERS - enqueued
    if on_conflict == "merge":
        assert sorted(notes) == ([0, *numbers] if first_commits else [*numbers])
    elif on_conflict == "replace":
        assert len(notes) == 1 and notes != [0]
    elif first_commits:
        assert (id, notes) == (first.id, [0])
    if first_commits:
        assert abs(run_in - (7200 if on_conflict in ("replace", "extend") else 3600)) < 60


@pytest.mark.parametrize("on_conflict", _ON_CONFLICT)
@pytest.mark.parametrize("until", _UNTIL)
def test_fifty_that_enqueue_and_runners_that_claim_and_finish_meanwhile_lose_nothing(
    database: running.Database, connection: Connection, until: Any, on_conflict: str
) -> None:
    """At every moment one job at most waits, until="finished" one in all; and what was merged runs in some job."""
    notify = declare(until, on_conflict)
    seen: list[int] = []
    most = {"started": 2, "finished": 1, 3600: 1}[until]
    crowd = [gevent.spawn(notify.delay, 1, [number]) for number in range(_ENQUEUERS)]
    ran = 0
    while not all(greenlet.ready() for greenlet in crowd) or database.count():
        assert database.count("state = 'available'") <= 1
        assert database.count() <= most
        fences = claim(connection)
        for fence in fences:
            seen.extend(notes_of(database, fence.id))
        gevent.sleep(0)
        if fences:
            ran += len(storage.acknowledge(connection, [_OURS], fences))
    handles = [greenlet.get() for greenlet in gevent.joinall(crowd, raise_error=True)]

    assert ran == len({handle.id for handle in handles}) == sum(not handle.duplicate for handle in handles)
    if until == 3600:
        assert ran == 1
    kept = [number for number, handle in enumerate(handles) if handle.action == "kept"]
    if on_conflict == "merge":
        assert sorted([*seen, *kept]) == list(range(_ENQUEUERS))


@pytest.mark.parametrize("batch_size", [1000, 7])
@pytest.mark.parametrize("on_conflict", _ON_CONFLICT)
@pytest.mark.parametrize("until", _UNTIL)
def test_bulks_of_the_same_keys_in_any_order_do_not_deadlock(
    database: running.Database, monkeypatch: pytest.MonkeyPatch, until: Any, on_conflict: str, batch_size: int
) -> None:
    """In one statement each, or in several."""
    monkeypatch.setattr(call, "BATCH_SIZE", batch_size)
    monkeypatch.setattr(sys.modules["greenjobs.storage.enqueuing"], "_DEADLOCK_ROUNDS", 0)
    notify = declare(until, on_conflict)
    customers = list(range(20))
    orders = [random.Random(seed).sample(customers, len(customers)) for seed in range(10)]
    bulks = [
        gevent.spawn(notify.delay_many, [(customer, [number]) for customer in order])
        for number, order in enumerate(orders)
    ]
    gevent.joinall(bulks, raise_error=True)

    assert database.count() == len(customers)
    if on_conflict == "merge":
        found = database.column("SELECT data->'notes' FROM background_jobs")
        assert all(sorted(notes) == list(range(10)) for notes in found)


@pytest.mark.parametrize("claim_commits", [True, False], ids=["claimed", "not claimed"])
@pytest.mark.parametrize("on_conflict", ["replace", "extend", "merge"])
@pytest.mark.parametrize("until", _UNTIL)
def test_job_that_is_claimed_while_another_is_about_to_change_it_is_not_changed(
    database: running.Database, transaction: Connection, until: Any, on_conflict: str, claim_commits: bool
) -> None:
    notify = declare(until, on_conflict)
    first = notify.delay(1, [0])
    claim(transaction)
    change = gevent.spawn(notify.options(delay=3600).delay, 1, [1])
    if until == "started" or not claim_commits:
        wait_for_locks(database, 1)
    transaction.commit() if claim_commits else transaction.rollback()
    second = change.get(timeout=running.PATIENCE_SECONDS)

    if claim_commits:
        assert notes_of(database, first.id) == [0]
        assert second.action == ("enqueued" if until == "started" else "kept")
        assert (second.id == first.id) == (until != "started")
    else:
        assert (second.id, second.action) == (first.id, _ACTION[on_conflict])
        assert notes_of(database, first.id) == {"replace": [1], "extend": [0], "merge": [0, 1]}[on_conflict]


@contextlib.contextmanager
def slow_inserts(database: running.Database, table: str) -> Iterator[None]:
    """Every row takes 20 ms before it is there, and 20 ms more in its statement."""
    for name, when in (("slow_before", "BEFORE"), ("slow_after", "AFTER")):
        database.rows(
            f"""
            CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM pg_sleep(0.02);
                RETURN NEW;
            END $$;
            CREATE TRIGGER {name} {when} INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()
            """
        )
    try:
        yield
    finally:
        database.rows("DROP FUNCTION slow_before() CASCADE; DROP FUNCTION slow_after() CASCADE")


@pytest.mark.parametrize("until", _UNTIL)
def test_bulks_in_opposite_order_wait_for_one_another_in_the_middle_of_their_statements(
    database: running.Database, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    monkeypatch.setattr(sys.modules["greenjobs.storage.enqueuing"], "_DEADLOCK_ROUNDS", 0)
    notify = declare(until, "replace")
    calls = [(customer, [customer]) for customer in range(10)]
    with slow_inserts(database, "background_unique_windows" if until == 3600 else "background_jobs"):
        bulks = [gevent.spawn(notify.delay_many, each) for each in (calls, calls[::-1])]
        gevent.joinall(bulks, raise_error=True)

    assert database.count() == len(calls)


@pytest.mark.parametrize("change", ["replace", "extend", "merge"])
@pytest.mark.parametrize("loss", ["key", "life", "wait"])
def test_holder_that_has_moved_on_since_it_was_looked_at_is_left_alone(
    database: running.Database, connection: Connection, change: str, loss: str
) -> None:
    """It lost its key to another when it came back, was cancelled while it ran in between, or runs."""
    first = declare("started").delay(1, [0])
    key = database.value("SELECT unique_key FROM background_jobs")
    database.rows(
        {
            "key": "UPDATE background_jobs SET unique_key = NULL",
            "life": "UPDATE background_jobs SET cancel_asked_at = now()",
            "wait": "UPDATE background_jobs SET state = 'running', claimed_by = 1",
        }[loss]
    )
    before = database.rows("SELECT * FROM background_jobs")
    parameters = {"queue": "default", "priority": 0, "options": None, "run_at": None, "delay": 60.0}
    parameters |= {"expires": None, "expires_at": None}
    new = conflicts.New(parameters, lambda data: [None] * len(data))
    with connection.cursor() as cursor:
        changed: Any
        if change == "replace":
            changed = conflicts.replace(cursor, {first.id: key}, ["{}"], new)
        elif change == "extend":
            changed = conflicts.extend(cursor, {first.id: key}, new)
        else:
            changed = conflicts.merge(cursor, {first.id: key}, lambda id, data: "{}", new)

    assert changed == []
    assert database.rows("SELECT * FROM background_jobs") == before


# --- what happens to the first ----------------------------------------------------------------------------------------

_ERROR = {"error": "ValueError", "message": "broken"}


def _dead_runner(database: running.Database) -> int:
    runner = connect(database.url, application_name="dead", timeout_seconds=60)
    id = storage.register_runner(runner, hostname="here", pid=1, version="0", queues={}, job_types=["notify"])
    runner.close()
    eventually(lambda: "dead" not in database.sessions(), "the session did not end")
    return id


def _rescue(database: running.Database, connection: Connection, *, most_crashes: int) -> None:
    runner = _dead_runner(database)
    claim(connection, runner)
    assert len(storage.rescue(connection, [runner], most_crashes=most_crashes)) == 1


def _fail(connection: Connection, retry_in: float | None) -> None:
    assert storage.fail(connection, [_OURS], [Failure(each, retry_in, _ERROR) for each in claim(connection)])


def _run_again(connection: Connection) -> None:
    _fail(connection, 0.0)
    assert storage.promote(connection, limit=1)
    assert len(claim(connection)) == 1


def _end_cancelled(connection: Connection) -> None:
    fences = claim(connection)
    assert storage.cancel(connection, [fences[0].id]) == ([], [fences[0].id])
    assert storage.acknowledge(connection, [_OURS], fences)


def _prune(database: running.Database, connection: Connection) -> None:
    _fail(connection, None)
    database.rows("UPDATE background_jobs SET last_retry = now() - interval '1 day', created_at = '2020-01-01'")
    assert storage.prune(connection, age_seconds=60, limit=10) == 1


def _discard_failed(connection: Connection, id: int) -> None:
    _fail(connection, None)
    assert jobs.discard(id).ids == (id,)


_EVENTS: dict[str, tuple[Callable[..., object], str]] = {
    "waits": (lambda database, connection, id: None, "started finished 3600"),
    "runs": (lambda database, connection, id: claim(connection), "finished 3600"),
    "waits for its retry": (lambda database, connection, id: _fail(connection, 60.0), "started finished 3600"),
    "is snoozed": (
        lambda database, connection, id: storage.snooze(
            connection, [_OURS], [storage.Snoozed(each, 60.0) for each in claim(connection)]
        ),
        "started finished 3600",
    ),
    "was given back": (
        lambda database, connection, id: storage.give_back(connection, [_OURS], claim(connection)),
        "started finished 3600",
    ),
    "was rescued": (
        lambda database, connection, id: _rescue(database, connection, most_crashes=3),
        "started finished 3600",
    ),
    "runs for its retry": (lambda database, connection, id: _run_again(connection), "finished 3600"),
    "is done": (
        lambda database, connection, id: storage.acknowledge(connection, [_OURS], claim(connection)),
        "3600",
    ),
    "was cancelled while it ran": (lambda database, connection, id: _end_cancelled(connection), "3600"),
    "has failed": (lambda database, connection, id: _fail(connection, None), ""),
    "has failed because its runners died": (
        lambda database, connection, id: _rescue(database, connection, most_crashes=1),
        "",
    ),
    "has failed and was discarded": (lambda database, connection, id: _discard_failed(connection, id), ""),
    "has failed and was pruned": (lambda database, connection, id: _prune(database, connection), ""),
    "was cancelled": (lambda database, connection, id: jobs.cancel(id), ""),
    "was cancelled by its handle": (lambda database, connection, id: storage.cancel(connection, [id]), ""),
    "was discarded": (lambda database, connection, id: jobs.discard(id), ""),
}


@pytest.mark.parametrize("event", _EVENTS)
@pytest.mark.parametrize("until", _UNTIL)
def test_key_is_taken_for_as_long_as_its_job_is_to_hold_it(
    database: running.Database, connection: Connection, until: Any, event: str
) -> None:
    notify = declare(until)
    first = notify.delay(1, [0])
    happens, taken = _EVENTS[event]
    happens(database, connection, first.id)

    second = notify.delay(1, [1])
    other = notify.delay(2, [1])

    is_taken = str(until) in taken.split()
    assert (second.duplicate, second.id == first.id) == (is_taken, is_taken), event
    assert not other.duplicate
    third = notify.delay(1, [2])
    assert third.duplicate and third.id == second.id


@pytest.mark.parametrize("on_conflict", ["replace", "extend", "merge"])
@pytest.mark.parametrize(
    "until, event",
    [
        *[
            (until, event)
            for until in ("finished", 3600)
            for event in ("runs", "waits for its retry", "was given back")
        ],
        *[("started", event) for event in ("waits for its retry", "was rescued")],
        *[(3600, event) for event in ("is done", "was cancelled while it ran")],
    ],
)
def test_what_runs_or_is_gone_is_kept_and_what_waits_again_is_changed(
    database: running.Database, connection: Connection, until: Any, event: str, on_conflict: str
) -> None:
    notify = declare(until, on_conflict)
    first = notify.delay(1, [0])
    _EVENTS[event][0](database, connection, first.id)
    before = database.rows("SELECT * FROM background_jobs")
    second = notify.options(delay=7200, priority=9).delay(1, [1])

    assert (second.id, second.duplicate) == (first.id, True)
    if event in ("runs", "is done", "was cancelled while it ran"):
        assert second.action == "kept"
        assert database.rows("SELECT * FROM background_jobs") == before
    else:
        assert second.action == _ACTION[on_conflict]
        assert notes_of(database, first.id) == {"replace": [1], "extend": [0], "merge": [0, 1]}[on_conflict]


def test_replaced_job_has_all_that_the_new_one_would_and_its_retries_before_it(
    database: running.Database, connection: Connection
) -> None:
    notify = declare(on_conflict="replace")
    first = notify.options(max_retries=7, queue="default").delay(1, [0])
    _fail(connection, 60.0)
    notify.options(priority=5, queue="other", timeout=9).delay(1, [1])

    assert database.rows(
        "SELECT id, state, run_at <= now(), priority, queue, options, retries, data->'notes',"
        " jsonb_array_length(errors) FROM background_jobs"
    ) == [(first.id, "available", True, 5, "other", {"timeout": 9.0}, 0, [1], 1)]


def test_extended_job_changes_in_nothing_but_when_it_runs(database: running.Database) -> None:
    notify = declare(on_conflict="extend")
    notify.delay(1, [0])
    columns = "id, data, priority, queue, options, retries, created_at, attempt"
    before = database.rows(f"SELECT {columns} FROM background_jobs")
    later = notify.options(delay=3600, priority=5, queue="other").delay(1, [1])

    assert later.action == "extended"
    assert database.rows(f"SELECT {columns} FROM background_jobs") == before
    assert database.value("SELECT state = 'scheduled' AND run_at > now() + interval '59 min' FROM background_jobs")
    notify.delay(1, [2])
    assert database.value("SELECT state = 'available' AND run_at <= now() FROM background_jobs")


@pytest.mark.parametrize("on_conflict", ["replace", "extend"])
def test_job_that_comes_to_be_due_wakes_the_runner_at_once(database: running.Database, on_conflict: Any) -> None:
    ran = gevent.event.Event()

    @job(unique=("customer",), on_conflict=on_conflict)
    def notify(customer: int) -> None:
        ran.set()

    notify.options(delay=3600).delay(1)
    with running.started(Runner().register(notify).configure_queue("default", poll_interval=3600)):
        eventually(lambda: database.value("SELECT count(*) FROM background_waiting") == 1, "the worker waits")
        assert notify.delay(1).duplicate
        assert ran.wait(running.PATIENCE_SECONDS)


@pytest.mark.parametrize("until", ["started", "finished"])
def test_job_that_only_waits_to_be_removed_keeps_nobody_out(
    database: running.Database, connection: Connection, until: str
) -> None:
    """It was cancelled while it ran, and its runner died, or gave it back."""
    notify = declare(until)
    first = notify.delay(1, [0])
    fences = claim(connection)
    storage.cancel(connection, [first.id])
    storage.give_back(connection, [_OURS], fences)

    second = notify.delay(1, [1])

    assert not second.duplicate
    assert database.column("SELECT id FROM background_jobs") == [second.id]


@pytest.mark.parametrize("until", ["started", "finished"])
def test_failed_job_is_not_retried_while_another_has_its_key(
    database: running.Database, connection: Connection, until: str
) -> None:
    notify = declare(until)
    first = notify.delay(1, [0])
    _fail(connection, None)
    second = notify.delay(1, [1])

    assert jobs.retry(first.id).left_alone == {first.id: "another job has its unique key"}
    fences = claim(connection)
    outcome = jobs.retry(first.id)
    assert bool(outcome.ids) == (until == "started")
    storage.acknowledge(connection, [_OURS], fences)
    assert until == "started" or jobs.retry(first.id).ids == (first.id,)
    assert second.id != first.id and database.state(first.id) == "available"


def test_job_until_finished_comes_back_beside_one_that_was_enqueued_until_started(
    database: running.Database, connection: Connection
) -> None:
    """As after a release that changed it: nobody is lost, and the one that waits has the key."""
    first = declare("finished").delay(1, [0])
    fences = claim(connection)
    second = declare("started").delay(1, [1])
    assert not second.duplicate

    assert storage.fail(connection, [_OURS], [Failure(fences[0], 60.0, _ERROR)]) == {first.id}

    key = database.value("SELECT unique_key FROM background_jobs WHERE id = %s", second.id)
    assert key and database.rows("SELECT id, unique_key FROM background_jobs ORDER BY id") == [
        (first.id, None),
        (second.id, key),
    ]
    assert declare("finished").delay(1, [2]).id == second.id


# --- windows ----------------------------------------------------------------------------------------------------------


def test_window_ends_after_its_time_though_the_job_waits_still(database: running.Database) -> None:
    notify = declare(60)
    first = notify.delay(1, [0])
    assert database.value("SELECT abs(extract(epoch FROM ends_at - now()) - 60) < 30 FROM background_unique_windows")
    database.rows("UPDATE background_unique_windows SET ends_at = clock_timestamp()")

    second = notify.delay(1, [1])

    assert not second.duplicate and database.state(first.id) == "available"
    assert notify.delay(1, [2]).id == second.id


def test_window_that_is_over_is_taken_by_one_of_fifty(database: running.Database) -> None:
    notify = declare(60)
    first = notify.delay(1, [0])
    database.rows("UPDATE background_unique_windows SET ends_at = clock_timestamp()")
    crowd = [gevent.spawn(notify.delay, 1, [number]) for number in range(_ENQUEUERS)]
    handles = [greenlet.get() for greenlet in gevent.joinall(crowd, raise_error=True)]

    assert [handle.duplicate for handle in handles].count(False) == 1
    (id,) = {handle.id for handle in handles}
    assert id != first.id and database.count() == 2


def test_window_is_over_for_a_transaction_that_began_before(
    database: running.Database, transaction: Connection
) -> None:
    """Its now() stands still."""
    notify = declare(60)
    transaction.cursor().execute("SELECT now()")
    first = notify.delay(1, [0])
    database.rows("UPDATE background_unique_windows SET ends_at = clock_timestamp()")

    assert notify.options(connection=transaction).delay(1, [1]).id != first.id


def test_runner_deletes_windows_that_are_over_and_no_others(database: running.Database) -> None:
    notify = declare(60)
    notify.delay_many([(number, []) for number in range(5)])
    database.rows(
        "UPDATE background_unique_windows SET ends_at = now() - interval '2 minutes'"
        " WHERE unique_key <> (SELECT min(unique_key) FROM background_unique_windows)"
    )
    with running.started(Runner().register(notify)):
        eventually(lambda: database.value("SELECT count(*) FROM background_unique_windows") == 1, "four are deleted")
    assert database.value("SELECT ends_at > now() FROM background_unique_windows")


def test_windows_are_pruned_in_batches_around_what_others_hold(
    database: running.Database, connection: Connection, transaction: Connection
) -> None:
    declare(60).delay_many([(number, []) for number in range(5)])
    database.rows("UPDATE background_unique_windows SET ends_at = now()")
    transaction.cursor().execute("SELECT FROM background_unique_windows LIMIT 1 FOR UPDATE")

    assert [storage.prune_windows(connection, limit=3) for _ in range(3)] == [3, 1, 0]


def test_chores_say_whether_windows_have_been_over_for_a_while(
    database: running.Database, connection: Connection
) -> None:
    declare(60).delay(1, [0])
    assert not inspection.chores(connection, [_OURS]).has_past_windows
    database.rows("UPDATE background_unique_windows SET ends_at = now() - interval '61 seconds'")
    assert inspection.chores(connection, [_OURS]).has_past_windows


# --- bulks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1000, 2])
@pytest.mark.parametrize("is_waiting", [False, True], ids=["new", "waiting"])
@pytest.mark.parametrize("on_conflict", _ON_CONFLICT)
@pytest.mark.parametrize("until", _UNTIL)
def test_later_items_of_a_bulk_act_on_the_earlier_ones(
    database: running.Database,
    monkeypatch: pytest.MonkeyPatch,
    until: Any,
    on_conflict: str,
    is_waiting: bool,
    batch_size: int,
) -> None:
    monkeypatch.setattr(call, "BATCH_SIZE", batch_size)
    notify = declare(until, on_conflict)
    waiting = [notify.delay(1, [0]).id] if is_waiting else []
    handles = notify.delay_many([(1, [1]), (2, [2]), (1, [3]), (3, [4]), (1, [5])])

    assert database.column("SELECT id FROM background_jobs ORDER BY id") == sorted(
        {*waiting, *(each.id for each in handles)}
    )
    assert handles[0].id == handles[2].id == handles[4].id
    assert len({handle.id for handle in handles}) == 3
    done = _ACTION[on_conflict]
    first = done if is_waiting else "enqueued"
    assert [handle.action for handle in handles] == [first, "enqueued", done, "enqueued", done]
    assert [handle.duplicate for handle in handles] == [is_waiting, False, True, False, True]
    assert (
        notes_of(database, handles[0].id)
        == {
            "keep": [0] if is_waiting else [1],
            "extend": [0] if is_waiting else [1],
            "replace": [5],
            "merge": [0, 1, 3, 5] if is_waiting else [1, 3, 5],
        }[on_conflict]
    )


@pytest.mark.parametrize("batch_size", [1000, 2])
@pytest.mark.parametrize("until", _UNTIL)
def test_bulk_keeps_its_order_and_items_without_a_key_are_all_enqueued(
    database: running.Database, monkeypatch: pytest.MonkeyPatch, until: Any, batch_size: int
) -> None:
    monkeypatch.setattr(call, "BATCH_SIZE", batch_size)

    @job(unique_key=lambda number: None if number == 0 else f"n{number}", until=until)
    def work(number: int) -> None: ...

    handles = work.delay_many([(number,) for number in (3, 0, 1, 0, 2, 3, 0)])

    assert [handle.duplicate for handle in handles] == [False] * 5 + [True, False]
    own = [handle.id for handle in handles if not handle.duplicate]
    assert own == sorted(own) and handles[5].id == handles[0].id
    assert database.column("SELECT data->'number' FROM background_jobs ORDER BY id") == [3, 0, 1, 0, 2, 0]
    assert work.delay(0).duplicate is False


def _refuse_three(waiting: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if 3 in new["notes"]:
        raise LookupError("three")
    return joined(waiting, new)


@pytest.mark.parametrize("kind", ["own", "transaction", "autocommit", "with-block"])
def test_bulk_of_which_one_cannot_be_merged_changes_nothing(
    database: running.Database, transaction: Connection, kind: str
) -> None:
    @job(unique=("customer",), on_conflict="merge", merge=_refuse_three)
    def notify(customer: int, notes: list[int]) -> None: ...

    notify.delay_many([(1, [0]), (2, [0])])
    before = database.rows("SELECT * FROM background_jobs ORDER BY id")
    transaction.autocommit = kind in ("autocommit", "with-block")
    calls = [(3, [1]), (1, [2]), (2, [3])]
    with pytest.raises(UniquenessError, match="notify: merge failed: LookupError: three"):
        if kind == "with-block":
            with transaction:
                notify.options(connection=transaction).delay_many(calls)
        else:
            notify.options(connection=None if kind == "own" else transaction).delay_many(calls)
    if kind == "transaction":
        transaction.rollback()

    assert database.rows("SELECT * FROM background_jobs ORDER BY id") == before


# --- in the caller's transaction --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_bulk", [False, True], ids=["one", "bulk"])
@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize("on_conflict", _ON_CONFLICT)
@pytest.mark.parametrize("until", _UNTIL)
def test_all_is_in_the_callers_transaction(
    database: running.Database, transaction: Connection, until: Any, on_conflict: str, commits: bool, is_bulk: bool
) -> None:
    notify = declare(until, on_conflict)
    first = notify.delay(1, [0])
    everything = [
        "SELECT * FROM background_jobs ORDER BY id",
        "SELECT * FROM background_unique_windows ORDER BY job_id",
    ]
    before = [database.rows(each) for each in everything]
    call = notify.options(connection=transaction, delay=3600)
    calls = [(1, [1]), (2, [2]), (2, [3])]
    handles = call.delay_many(calls) if is_bulk else [call.delay(*each) for each in calls]

    done = _ACTION[on_conflict]
    assert [handle.action for handle in handles] == [done, "enqueued", done]
    assert [database.rows(each) for each in everything] == before
    if not commits:
        transaction.rollback()
        assert [database.rows(each) for each in everything] == before
        return
    transaction.commit()
    assert notes_of(database, first.id) == {"replace": [1], "merge": [0, 1]}.get(on_conflict, [0])
    assert notes_of(database, handles[1].id) == {"replace": [3], "merge": [2, 3]}.get(on_conflict, [2])
    assert database.count() == 2


@pytest.mark.parametrize("on_conflict", _ON_CONFLICT)
@pytest.mark.parametrize("until", _UNTIL)
@pytest.mark.parametrize("in_block", [False, True], ids=["autocommit", "with-block"])
def test_connection_in_autocommit_is_left_so(
    database: running.Database, transaction: Connection, until: Any, on_conflict: str, in_block: bool
) -> None:
    transaction.autocommit = True
    notify = declare(until, on_conflict)
    notify.delay(1, [0])
    call = notify.options(connection=transaction)
    with transaction if in_block else contextlib.nullcontext():
        call.delay(1, [1])
        call.delay_many([(1, [2]), (2, [2])])
        assert database.count() == (1 if in_block else 2)
    assert transaction.autocommit
    assert database.count() == 2


def test_enqueuer_in_a_repeatable_read_transaction_is_told_that_it_came_too_late(
    database: running.Database, transaction: Connection
) -> None:
    """It cannot see the job that has the key."""
    transaction.set_session(isolation_level="REPEATABLE READ")
    notify = declare()
    transaction.cursor().execute("SELECT count(*) FROM background_jobs")
    notify.delay(1, [0])
    with pytest.raises(psycopg2.errors.SerializationFailure):
        notify.options(connection=transaction).delay(1, [1])


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_no_statement_of_unique_jobs_scans_the_table(database: running.Database) -> None:
    database.rows(
        "INSERT INTO background_jobs (job_type, data, queue, unique_key, unique_until_finished)"
        " SELECT 'notify', '{}', 'default', 'k' || n, n % 2 = 0 FROM generate_series(1, 20000) AS n"
    )
    database.rows(
        "INSERT INTO background_unique_windows"
        " SELECT 'k' || n, n, now() + interval '1 day' FROM generate_series(1, 9999) AS n"
    )
    database.rows("ANALYZE background_jobs, background_unique_windows")
    held = {"ids": [1, 2], "keys": ["k1", "k2"]}
    new = {"run_at": None, "delay": 0.0, "data": "[{}, {}]", "queue": "default", "priority": 0, "options": None}
    new |= {"expires": None, "expires_at": None, "exclusive_keys": [None, None]}
    with running.pool.shared_pool(running.greenjobs.config.current()).connection() as connection:
        for name in ("_HOLDERS", "_WINDOWS", "_END_WINDOWS", "_REPLACE", "_EXTEND", "_READ_WAITING", "_WRITE_DATA"):
            with connection.cursor() as cursor:
                cursor.execute(f"EXPLAIN {getattr(conflicts, name)}", {**held, **new, "until_finished": True})
                plan = "\n".join(row[0] for row in cursor.fetchall())
            assert "Seq Scan on background_" not in plan, f"{name}:\n{plan}"


# --- beside what bounds jobs in time ----------------------------------------------------------------------------------


def test_job_that_replaces_another_brings_its_own_bounds(database: running.Database) -> None:
    @job(unique=("n",), on_conflict="replace", overlap=False, overlap_key="customer-{customer}", expires=60)
    def report(n: int, customer: int) -> None: ...

    first = report.options(delay=10).delay(1, 1)
    before = database.rows("SELECT exclusive_key, expires_at FROM background_jobs")
    assert report.options(delay=3600).delay(1, 2).id == first.id
    ((key, expires_at),) = database.rows("SELECT exclusive_key, expires_at FROM background_jobs")
    assert key not in (None, before[0][0])
    assert expires_at - before[0][1] > timedelta(seconds=3500)


def test_merged_job_excludes_those_of_its_merged_arguments(database: running.Database) -> None:
    @job(
        unique=("n",),
        on_conflict="merge",
        merge=lambda waiting, new: {**waiting, **new},
        overlap=False,
        overlap_key="customer-{customer}",
    )
    def report(n: int, customer: int) -> None: ...

    report.delay_many([(1, 1), (2, 2)])
    report.delay(1, 2)
    assert len(database.rows("SELECT DISTINCT exclusive_key FROM background_jobs")) == 1


def test_key_of_a_job_that_has_expired_is_free(database: running.Database) -> None:
    @job(unique=True, expires=60)
    def report(n: int) -> None: ...

    first = report.delay(1)
    database.rows("UPDATE background_jobs SET expires_at = now()")
    second = report.delay(1)
    assert not second.duplicate and second.id != first.id
    assert report.delay(1).id == second.id
