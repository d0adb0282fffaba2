"""The statements that change rows, one by one: what they take, what they leave alone, and what they say about it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import databases
import gevent
import psycopg2
import psycopg2.errors
import pytest
import running
from psycopg2.extensions import connection as Connection
from waiting import eventually

from greenjobs import inspection, storage
from greenjobs.pool import connect
from greenjobs.storage import ClaimCursor, Failure, Fence, NewJobs
from greenjobs.storage.transaction import undone_alone

_OURS = 11
_OTHERS = 12

_ERROR = {"error": "ValueError", "message": "broken"}


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing but rows behind."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    database = running.Database(shared_url)
    yield database
    database.rows("TRUNCATE background_jobs, background_runners, background_waiting")
    database.connection.close()


@pytest.fixture
def connection(database: running.Database) -> Iterator[Connection]:
    """As the runner has them."""
    connection = connect(database.url, application_name="test", timeout_seconds=60)
    yield connection
    connection.close()


def _new(*data: str, **options: Any) -> NewJobs:
    return NewJobs(**{"job_type": "work", "queue": "default", "data": data or ("{}",), **options})


def _enqueue(connection: Connection, *data: str, **options: Any) -> list[int]:
    return [enqueued.id for enqueued in storage.enqueue(connection, [_new(*data, **options)])]


def _claim(connection: Connection, limit: int = 100, **options: Any) -> list[storage.ClaimedJob]:
    return storage.claim(
        connection, **{"runner": _OURS, "queue": "default", "job_types": ["work"], "limit": limit, **options}
    )


def _fences(claimed: Sequence[storage.ClaimedJob]) -> list[Fence]:
    return [Fence(row.id, row.attempt) for row in claimed]


def _register(connection: Connection) -> int:
    return storage.register_runner(connection, hostname="here", pid=1, version="0", queues={}, job_types=["work"])


def _dead_runner(database: running.Database) -> int:
    runner = connect(database.url, application_name="dead", timeout_seconds=60)
    id = _register(runner)
    runner.close()
    eventually(lambda: "dead" not in database.sessions(), "the session did not end")
    return id


# --- enqueue ----------------------------------------------------------------------------------------------------------


def test_order_of_ids_is_the_order_of_the_jobs(connection: Connection, database: running.Database) -> None:
    ids = _enqueue(connection, *(f'{{"number": {number}}}' for number in range(1000)))

    assert ids == sorted(ids)
    assert database.column("SELECT (data->'number')::int FROM background_jobs ORDER BY id") == list(range(1000))


def test_batches_on_an_autocommit_connection_are_one_transaction(
    connection: Connection, database: running.Database
) -> None:
    broken = _new("{}", priority=99_999)

    with pytest.raises(psycopg2.Error):
        storage.enqueue(connection, [_new("{}"), broken])

    assert database.count() == 0
    assert connection.autocommit


def test_enqueue_wakes_a_worker_that_waits_there(connection: Connection, database: running.Database) -> None:
    runner = _register(connection)
    storage.say_waiting(connection, runner, ["default", "other"])
    heard = _listen(database)

    _enqueue(connection)

    assert heard() == [f"{runner}:default"]
    assert database.rows("SELECT queue, runner FROM background_waiting") == [("other", runner)]


def test_enqueue_notifies_nobody_when_nobody_waits(connection: Connection, database: running.Database) -> None:
    heard = _listen(database)

    _enqueue(connection)

    assert heard() == []


def test_enqueue_in_a_transaction_notifies_everybody_when_it_commits(database: running.Database) -> None:
    heard = _listen(database)
    transaction = psycopg2.connect(database.url)

    for _ in range(3):
        storage.enqueue_inside(transaction, [_new("{}")])
    before = heard()
    transaction.commit()
    transaction.close()

    assert (before, heard()) == ([], ["*:default"])


def test_enqueue_for_soon_notifies_the_promoters(connection: Connection, database: running.Database) -> None:
    heard = _listen(database)

    _enqueue(connection, delay_seconds=0.5)

    assert heard() == ["due"]


def test_enqueue_for_much_later_notifies_nobody(connection: Connection, database: running.Database) -> None:
    storage.say_waiting(connection, _register(connection), ["default"])
    heard = _listen(database)

    _enqueue(connection, delay_seconds=3600)

    assert heard() == []


def _listen(database: running.Database) -> Callable[[], list[str]]:
    """Listen from now on; the result tells what was heard since it was last asked."""
    database.rows("LISTEN greenjobs")

    def heard() -> list[str]:
        # Notifications arrive in the order of their commits: with this one, all before it are here.
        database.rows("NOTIFY greenjobs, 'the end'")
        payloads: list[str] = []

        def has_ended() -> bool:
            database.connection.poll()
            payloads.extend(notify.payload for notify in database.connection.notifies)
            database.connection.notifies.clear()
            return "the end" in payloads

        eventually(has_ended, "no notification arrived")
        return payloads[:-1]

    return heard


def test_unique_key_is_blind_to_order_and_sees_everything_else() -> None:
    keys = [
        storage.unique_key("work", '{"a": 1, "b": {"c": [1, 2], "d": null}}'),
        storage.unique_key("work", '{"b": {"d": null, "c": [1, 2]}, "a": 1}'),
        storage.unique_key("work", '{"a": 1, "b": {"c": [2, 1], "d": null}}'),
        storage.unique_key("work", '{"a": "1", "b": {"c": [1, 2], "d": null}}'),
        storage.unique_key("other", '{"a": 1, "b": {"c": [1, 2], "d": null}}'),
    ]

    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


# --- claim ------------------------------------------------------------------------------------------------------------


def test_claim_takes_the_highest_priorities_then_the_oldest(connection: Connection, database: running.Database) -> None:
    ids = [_enqueue(connection, priority=priority)[0] for priority in (0, 7, -7, 7)]

    assert [row.id for row in _claim(connection, 3)] == [ids[1], ids[3], ids[0]]


def test_claimed_row_has_owner_and_attempt(connection: Connection, database: running.Database) -> None:
    _enqueue(connection)
    (row,) = _claim(connection)

    assert row.attempt == 1
    assert database.rows("SELECT state, claimed_by, attempt, claimed_at IS NOT NULL FROM background_jobs") == [
        ("running", _OURS, 1, True)
    ]


def test_claimed_row_is_not_claimed_again(connection: Connection) -> None:
    _enqueue(connection)

    assert len(_claim(connection)) == 1
    assert _claim(connection, runner=_OTHERS) == []


@pytest.mark.parametrize("options", [{"job_types": ["other"]}, {"queue": "other"}, {"job_types": []}], ids=repr)
def test_claim_leaves_what_it_was_not_asked_for(connection: Connection, options: dict[str, Any]) -> None:
    _enqueue(connection)

    assert _claim(connection, **options) == []


def test_claim_leaves_jobs_for_later(connection: Connection) -> None:
    _enqueue(connection, delay_seconds=3600)

    assert _claim(connection) == []


def test_claims_at_once_take_each_job_once(database: running.Database, connection: Connection) -> None:
    ids = _enqueue(connection, *["{}"] * 1000)
    claimed: list[int] = []

    def claim_all(runner: int) -> None:
        own = connect(database.url, application_name="test", timeout_seconds=60)
        while rows := _claim(own, 7, runner=runner):
            claimed.extend(row.id for row in rows)
        own.close()

    gevent.joinall([gevent.spawn(claim_all, runner) for runner in range(10)], raise_error=True)

    assert sorted(claimed) == ids


def test_claim_behind_a_place_takes_only_what_comes_after_it(connection: Connection) -> None:
    ids = [_enqueue(connection, priority=priority)[0] for priority in (5, 5, 5, 1, 9)]

    rows = _claim(connection, after=ClaimCursor(-5, ids[1]))

    assert [row.id for row in rows] == [ids[2], ids[3]]


def test_suspects_are_claimed_only_when_asked_for(connection: Connection, database: running.Database) -> None:
    innocent, suspect = _enqueue(connection, "{}", "{}")
    database.rows("UPDATE background_jobs SET crashes = 1 WHERE id = %s", suspect)

    assert [row.id for row in _claim(connection)] == [innocent]
    assert [row.id for row in _claim(connection, suspects=True)] == [suspect]


def test_claimed_job_says_how_long_it_has_waited_since_it_was_due(
    connection: Connection, database: running.Database
) -> None:
    _enqueue(connection)
    database.rows("UPDATE background_jobs SET created_at = now() - interval '1 day', run_at = now() - interval '1 min'")
    (row,) = _claim(connection)

    assert 60 <= row.waited < 120


# --- outcomes ---------------------------------------------------------------------------------------------------------


def _stale(connection: Connection, database: running.Database, how: str) -> tuple[list[int], list[Fence]]:
    """Ids of runners and a fence that do not fit the one claimed row any more, each in its own way."""
    _enqueue(connection)
    (row,) = _claim(connection)
    if how == "another runner":
        return [_OTHERS], _fences([row])
    if how == "no runner":
        return [], _fences([row])
    if how == "an earlier attempt":
        return [_OURS], [Fence(row.id, row.attempt - 1)]
    if how == "claimed again":
        storage.give_back(connection, [_OURS], _fences([row]))
        _claim(connection)
    elif how == "claimed by another":
        storage.give_back(connection, [_OURS], _fences([row]))
        _claim(connection, runner=_OTHERS)
    elif how == "given back":
        storage.give_back(connection, [_OURS], _fences([row]))
    elif how == "failed":
        storage.fail(connection, [_OURS], [Failure(_fences([row])[0], None, _ERROR)])
    return [_OURS], _fences([row])


_STALE = [
    "another runner",
    "no runner",
    "an earlier attempt",
    "claimed again",
    "claimed by another",
    "given back",
    "failed",
]


@pytest.mark.parametrize("outcome", ["done", "failed", "unfinished"])
@pytest.mark.parametrize("how", _STALE)
def test_outcome_of_a_claim_that_is_none_any_more_changes_nothing(
    connection: Connection, database: running.Database, how: str, outcome: str
) -> None:
    runners, fences = _stale(connection, database, how)
    before = database.rows("SELECT * FROM background_jobs")

    if outcome == "done":
        held = storage.acknowledge(connection, runners, fences)
    elif outcome == "failed":
        held = storage.fail(connection, runners, [Failure(fence, 60.0, _ERROR) for fence in fences])
    else:
        held = storage.give_back(connection, runners, fences)

    assert held == set()
    assert database.rows("SELECT * FROM background_jobs") == before


def test_acknowledged_jobs_are_gone_and_the_others_stay(connection: Connection, database: running.Database) -> None:
    _enqueue(connection, *["{}"] * 4)
    first, second, third, fourth = _claim(connection)

    held = storage.acknowledge(connection, [_OURS], [*_fences([first, third]), Fence(fourth.id, 99), Fence(0, 1)])

    assert held == {first.id, third.id}
    assert database.column("SELECT id FROM background_jobs ORDER BY id") == [second.id, fourth.id]


def test_claim_under_a_former_id_of_the_process_is_its_own(connection: Connection, database: running.Database) -> None:
    _enqueue(connection)
    claimed = _claim(connection)

    assert storage.acknowledge(connection, [1, _OURS, 99], _fences(claimed)) == {claimed[0].id}


def test_failed_job_waits_for_its_time(connection: Connection, database: running.Database) -> None:
    _enqueue(connection)
    (row,) = _claim(connection)

    storage.fail(connection, [_OURS], [Failure(Fence(row.id, 1), 90.0, _ERROR)])

    assert database.rows("SELECT state, retries, claimed_by, run_at - last_retry, errors FROM background_jobs") == [
        ("scheduled", 1, None, timedelta(seconds=90), [_ERROR])
    ]


def test_failures_of_many_jobs_go_together(connection: Connection, database: running.Database) -> None:
    _enqueue(connection, *["{}"] * 3)
    rows = _claim(connection)

    held = storage.fail(
        connection,
        [_OURS],
        [Failure(Fence(row.id, 1), retry_in, _ERROR) for row, retry_in in zip(rows, [0.0, 60.0, None], strict=True)],
    )

    assert held == {row.id for row in rows}
    assert database.column("SELECT state FROM background_jobs ORDER BY id") == ["scheduled", "scheduled", "failed"]


def test_job_given_back_has_counted_nothing(connection: Connection, database: running.Database) -> None:
    _enqueue(connection)
    storage.give_back(connection, [_OURS], _fences(_claim(connection)))

    assert database.rows("SELECT state, retries, crashes, claimed_by, errors FROM background_jobs") == [
        ("available", 0, 0, None, None)
    ]


def _unique(*keys: str) -> NewJobs:
    return _new(*["{}"] * len(keys))._replace(unique_keys=keys)


def test_unique_jobs_are_numbered_in_the_order_of_the_calls(connection: Connection) -> None:
    enqueued = storage.enqueue(connection, [_unique("c", "a", "b")])

    assert [row.id for row in enqueued] == sorted(row.id for row in enqueued)


def test_job_given_back_regains_its_unique_key(connection: Connection) -> None:
    ((id, _),) = storage.enqueue(connection, [_unique("k")])
    storage.give_back(connection, [_OURS], _fences(_claim(connection)))

    assert storage.enqueue(connection, [_unique("k")]) == [(id, "kept")]


@pytest.mark.parametrize("outcome", ["failed", "unfinished", "rescued", "ended"])
def test_job_that_goes_back_to_waiting_leaves_its_key_to_the_one_that_has_it_by_now(
    connection: Connection, database: running.Database, outcome: str
) -> None:
    runner = _dead_runner(database)
    ((first, _),) = storage.enqueue(connection, [_unique("k")])
    claimed = _claim(connection, runner=runner)
    ((second, _),) = storage.enqueue(connection, [_unique("k")])

    if outcome == "failed":
        assert storage.fail(connection, [runner], [Failure(_fences(claimed)[0], 60.0, _ERROR)]) == {first}
    elif outcome == "unfinished":
        assert storage.give_back(connection, [runner], _fences(claimed)) == {first}
    elif outcome == "rescued":
        assert [job.id for job in storage.rescue(connection, [runner], most_crashes=3)] == [first]
    else:
        assert storage.end_runners(connection, [runner]) == ["default"]

    assert database.rows("SELECT id, unique_key FROM background_jobs ORDER BY id") == [(first, None), (second, "k")]
    assert database.count("state IN ('available', 'scheduled')") == 2


def test_two_of_a_key_that_go_back_together_both_wait_and_one_has_the_key(
    connection: Connection, database: running.Database
) -> None:
    storage.enqueue(connection, [_unique("k")])
    first = _claim(connection)
    storage.enqueue(connection, [_unique("k")])
    second = _claim(connection)

    held = storage.give_back(connection, [_OURS], _fences(first + second))

    assert len(held) == 2
    assert database.column("SELECT unique_key FROM background_jobs WHERE state = 'available' ORDER BY id") in (
        ["k", None],
        [None, "k"],
    )


def test_last_failure_of_a_job_takes_no_notice_of_its_key(connection: Connection, database: running.Database) -> None:
    storage.enqueue(connection, [_unique("k")])
    claimed = _claim(connection)
    storage.enqueue(connection, [_unique("k")])

    assert len(storage.fail(connection, [_OURS], [Failure(_fences(claimed)[0], None, _ERROR)])) == 1


# --- promote and route ------------------------------------------------------------------------------------------------


def test_promote_makes_due_jobs_available_and_says_where(connection: Connection, database: running.Database) -> None:
    now = datetime.now(timezone.utc)
    _enqueue(connection, "{}", "{}", run_at=now + timedelta(hours=1))
    _enqueue(connection, queue="other", run_at=now + timedelta(hours=1))
    _enqueue(connection, run_at=now + timedelta(hours=2))
    database.rows("UPDATE background_jobs SET run_at = run_at - interval '1 hour 1 minute'")

    assert storage.promote(connection, limit=100) == {"default": 2, "other": 1}
    assert database.count("state = 'scheduled'") == 1


def test_promote_takes_no_more_than_asked(connection: Connection, database: running.Database) -> None:
    _enqueue(connection, *["{}"] * 5, delay_seconds=3600)
    database.rows("UPDATE background_jobs SET run_at = now()")

    assert storage.promote(connection, limit=2) == {"default": 2}


def test_promoters_at_once_promote_each_job_once(connection: Connection, database: running.Database) -> None:
    _enqueue(connection, *["{}"] * 500, delay_seconds=3600)
    database.rows("UPDATE background_jobs SET run_at = now()")
    promoted: list[int] = []

    def promote_all() -> None:
        own = connect(database.url, application_name="test", timeout_seconds=60)
        while counts := storage.promote(own, limit=20):
            promoted.extend(counts.values())
        own.close()

    gevent.joinall([gevent.spawn(promote_all) for _ in range(5)], raise_error=True)

    assert sum(promoted) == 500


def test_route_puts_homeless_jobs_where_their_type_is_at_home(
    connection: Connection, database: running.Database
) -> None:
    database.rows(
        "INSERT INTO background_jobs (job_type, data) VALUES ('work', '{}'), ('send', '{}'), ('unknown', '{}')"
    )

    assert sorted(storage.route(connection, {"work": "default", "send": "emails"})) == ["default", "emails"]
    assert database.rows("SELECT job_type, queue FROM background_jobs ORDER BY id") == [
        ("work", "default"),
        ("send", "emails"),
        ("unknown", None),
    ]


# --- runners ----------------------------------------------------------------------------------------------------------


def test_runner_is_alive_while_its_session_is(database: running.Database) -> None:
    session = connect(database.url, application_name="test", timeout_seconds=60)
    runner = _register(session)

    assert inspection.dead_runners(database.connection) == []
    assert [each.id for each in inspection.live_runners(database.connection)] == [runner]
    session.close()


def test_runner_whose_session_was_killed_is_dead(database: running.Database) -> None:
    runner = _dead_runner(database)

    assert inspection.dead_runners(database.connection) == [runner]
    assert inspection.live_runners(database.connection) == []


def test_jobs_of_a_dead_runner_are_taken_back_and_blamed(connection: Connection, database: running.Database) -> None:
    runner = _dead_runner(database)
    ids = _enqueue(connection, "{}", "{}")
    _claim(connection, runner=runner)

    rescued = storage.rescue(connection, [runner], most_crashes=3)

    assert sorted((job.id, job.crashes, job.has_failed) for job in rescued) == [(id, 1, False) for id in ids]
    assert (
        database.rows("SELECT state, crashes, retries, claimed_by FROM background_jobs")
        == [("available", 1, 0, None)] * 2
    )


def test_runner_that_held_a_suspect_is_blamed_on_that_alone(connection: Connection, database: running.Database) -> None:
    runner = _dead_runner(database)
    innocent, suspect = _enqueue(connection, "{}", "{}")
    database.rows("UPDATE background_jobs SET crashes = 1 WHERE id = %s", suspect)
    _claim(connection, runner=runner)
    _claim(connection, runner=runner, suspects=True)

    storage.rescue(connection, [runner], most_crashes=3)

    assert database.rows("SELECT id, crashes FROM background_jobs ORDER BY id") == [(innocent, 0), (suspect, 2)]


def test_job_whose_runners_died_too_often_has_failed_and_says_so(
    connection: Connection, database: running.Database
) -> None:
    runner = _dead_runner(database)
    (id,) = _enqueue(connection)
    database.rows("UPDATE background_jobs SET crashes = 2")
    _claim(connection, runner=runner, suspects=True)

    (rescued,) = storage.rescue(connection, [runner], most_crashes=3)

    assert (rescued.id, rescued.crashes, rescued.has_failed) == (id, 3, True)
    ((state, error),) = database.rows("SELECT state, errors->-1 FROM background_jobs")
    assert state == "failed"
    assert (error["error"], error["message"], error["runner"]) == ("RunnerDied", "its runner died 3 times", "here:1")


def test_runner_is_blamed_for_its_death_once(connection: Connection, database: running.Database) -> None:
    """A claim of the dead one that reaches the server late never started."""
    runner = _dead_runner(database)
    storage.rescue(connection, [runner], most_crashes=3)
    _enqueue(connection)
    _claim(connection, runner=runner)

    storage.rescue(connection, [runner], most_crashes=3)

    assert database.rows("SELECT state, crashes FROM background_jobs") == [("available", 0)]


def test_rescuers_at_once_count_one_death(connection: Connection, database: running.Database) -> None:
    runner = _dead_runner(database)
    _enqueue(connection, *["{}"] * 50)
    _claim(connection, runner=runner)

    def rescue() -> int:
        own = connect(database.url, application_name="test", timeout_seconds=60)
        try:
            return len(storage.rescue(own, [runner], most_crashes=3))
        finally:
            own.close()

    rescuers = [gevent.spawn(rescue) for _ in range(8)]
    gevent.joinall(rescuers, raise_error=True)

    assert sum(rescuer.value for rescuer in rescuers) == 50
    assert database.count("crashes = 1 AND state = 'available'") == 50


def test_jobs_of_the_living_are_left_alone(connection: Connection, database: running.Database) -> None:
    dead = _dead_runner(database)
    session = connect(database.url, application_name="test", timeout_seconds=60)
    alive = _register(session)
    _enqueue(connection)
    _claim(connection, runner=alive)

    storage.rescue(connection, [dead], most_crashes=3)

    assert database.rows("SELECT state, claimed_by FROM background_jobs") == [("running", alive)]
    session.close()


def test_runner_that_registers_again_keeps_what_nobody_took(connection: Connection, database: running.Database) -> None:
    former = _dead_runner(database)
    _enqueue(connection)
    _claim(connection, runner=former)
    session = connect(database.url, application_name="test", timeout_seconds=60)

    runner = storage.register_runner(
        session, hostname="here", pid=1, version="0", queues={}, job_types=[], former=[former]
    )

    assert database.rows("SELECT state, claimed_by, attempt, crashes FROM background_jobs") == [
        ("running", runner, 1, 0)
    ]
    assert storage.rescue(connection, [former], most_crashes=3) == []
    session.close()


def test_runner_that_registers_again_waits_under_its_former_id_no_more(
    connection: Connection, database: running.Database
) -> None:
    """A wake-up for that one would be heard by nobody, and another runner would not get it."""
    former = _register(connection)
    storage.say_waiting(connection, former, ["default"])
    with contextlib.closing(connect(database.url, application_name="test", timeout_seconds=60)) as session:
        runner = storage.register_runner(
            session, hostname="here", pid=1, version="0", queues={}, job_types=[], former=[former]
        )
        storage.say_waiting(connection, former, ["default"])  # which was tried again until the database was back

        assert database.rows("SELECT * FROM background_waiting") == []
        storage.say_waiting(connection, runner, ["default"])
        assert database.rows("SELECT queue, runner FROM background_waiting") == [("default", runner)]


def test_runner_that_ends_gives_back_what_it_still_holds(connection: Connection, database: running.Database) -> None:
    runner = _dead_runner(database)
    _enqueue(connection)
    _claim(connection, runner=runner)
    storage.say_waiting(connection, runner, ["default"])

    assert storage.end_runners(connection, [runner]) == ["default"]
    assert database.rows("SELECT state, crashes FROM background_jobs") == [("available", 0)]
    assert database.rows("SELECT * FROM background_waiting") == []


def test_runners_that_ended_long_ago_are_forgotten(connection: Connection, database: running.Database) -> None:
    recent, old, holding = (_dead_runner(database) for _ in range(3))
    storage.end_runners(connection, [recent, old, holding])
    database.rows("UPDATE background_runners SET ended_at = now() - interval '2 days' WHERE id <> %s", recent)
    _enqueue(connection)
    _claim(connection, runner=holding)

    assert storage.forget_runners(connection, age_seconds=86_400) == 1
    assert database.column("SELECT id FROM background_runners ORDER BY id") == [recent, holding]


def test_wake_tells_every_worker_that_waits_there_once(connection: Connection, database: running.Database) -> None:
    runners = [_register(connection) for _ in range(2)]
    for runner in runners:
        storage.say_waiting(connection, runner, ["default", "other"])
    heard = _listen(database)

    storage.wake(connection, ["default"])
    storage.wake(connection, ["default"])

    assert sorted(heard()) == sorted(f"{runner}:default" for runner in runners)


# --- rows that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        "state = 'done'",
        "state = NULL",
        "state = 'running'",
        "claimed_by = 5",
        "priority = -32768",
        "data = NULL",
        "job_type = NULL",
        "retries = NULL",
    ],
)
def test_wrong_rows_are_refused_by_the_table(connection: Connection, database: running.Database, wrong: str) -> None:
    _enqueue(connection)

    with pytest.raises(psycopg2.errors.IntegrityError):
        database.rows(f"UPDATE background_jobs SET {wrong}")


# --- looking ----------------------------------------------------------------------------------------------------------


def test_failed_count_counts_jobs_that_failed_at_least_once(connection: Connection, database: running.Database) -> None:
    _enqueue(connection, *["{}"] * 3)
    database.rows("UPDATE background_jobs SET retries = 1 WHERE id = (SELECT min(id) FROM background_jobs)")
    database.rows("UPDATE background_jobs SET state = 'failed' WHERE id = (SELECT max(id) FROM background_jobs)")

    assert inspection.failed_count(connection) == 2


def test_queue_statuses_count_by_state(connection: Connection, database: running.Database) -> None:
    _enqueue(connection, *["{}"] * 3)
    _claim(connection, 1)
    _enqueue(connection, "{}", "{}", queue="other", delay_seconds=60)
    database.rows("INSERT INTO background_jobs (job_type, data, state) VALUES ('work', '{}', 'failed')")

    def counts(status: inspection.QueueStatus) -> tuple[Any, ...]:
        return status.queue, status.available, status.running, status.scheduled, status.failed

    assert [counts(status) for status in inspection.queue_statuses(connection)] == [
        ("default", 2, 1, 0, 0),
        ("other", 0, 0, 2, 0),
        (None, 0, 0, 0, 1),
    ]


def test_oldest_waiting_is_counted_from_when_the_job_was_due(
    connection: Connection, database: running.Database
) -> None:
    _enqueue(connection, "{}", "{}")
    database.rows("UPDATE background_jobs SET created_at = now() - interval '1 day', run_at = now() - interval '1 min'")

    (status,) = inspection.queue_statuses(connection)
    assert status.oldest_waiting_seconds is not None
    assert 60 <= status.oldest_waiting_seconds < 120


def test_queue_without_waiting_jobs_has_no_oldest(connection: Connection) -> None:
    _enqueue(connection, delay_seconds=60)

    assert inspection.queue_statuses(connection)[0].oldest_waiting_seconds is None


@pytest.mark.parametrize(("delay", "expected"), [(None, None), (100.0, 100.0)])
def test_seconds_until_due(connection: Connection, delay: float | None, expected: float | None) -> None:
    if delay is not None:
        _enqueue(connection, delay_seconds=delay)
        _enqueue(connection, delay_seconds=delay * 2)

    seconds = inspection.seconds_until_due(connection)

    assert seconds == expected if expected is None else seconds is not None and expected - 30 < seconds <= expected


@pytest.mark.parametrize("block", [storage.atomic, undone_alone])
def test_end_of_a_greenlet_within_a_transaction_is_nothing_but_that(block: Any, database: running.Database) -> None:
    """Taken for an error of the database it would be tried again, and the runner that waits for it never end."""
    raised: list[BaseException] = []

    def work() -> None:
        connection = connect(database.url, application_name="killed", timeout_seconds=60)
        connection.autocommit = block is storage.atomic
        try:
            with block(connection), connection.cursor() as cursor:
                cursor.execute("SELECT pg_sleep(600)")
        except BaseException as error:
            raised.append(error)
            raise

    greenlet = gevent.spawn(work)
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'killed' AND state = 'active'"
    of_here = " AND datname = current_database() AND query LIKE '%pg_sleep%'"  # and not yet what connecting asks
    eventually(lambda: database.value(sleeping + of_here) == 1, "not under way", seconds=running.PATIENCE_SECONDS)
    greenlet.kill(timeout=running.PATIENCE_SECONDS)
    assert [type(error) for error in raised] == [gevent.GreenletExit]
    eventually(lambda: database.value(sleeping + of_here) == 0, "goes on", seconds=running.PATIENCE_SECONDS)
