"""Jobs that have ended: what is kept of them, and what they returned."""

from __future__ import annotations

import dataclasses
import enum
import logging
import re
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import gevent
import processes
import psycopg2
import pytest
import running
from waiting import eventually

import greenjobs
from greenjobs import Discard, Runner, current_job, job, jobs, maintenance, storage
from greenjobs.errors import (
    JobDefinitionError,
    JobFailed,
    NoResult,
    OptionError,
    PayloadMismatch,
)
from greenjobs.pool import connect
from greenjobs.progress import Progress
from greenjobs.storage import Ended, Fence, NewJobs

_PATIENCE = running.PATIENCE_SECONDS


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        yield database


def history(database: running.Database, columns: str = "outcome") -> list[tuple[Any, ...]]:
    return database.rows(f"SELECT {columns} FROM background_history ORDER BY id")


class Gate:
    """Where jobs wait until a test lets them go on."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def pass_through(self) -> None:
        self.entered.release()
        assert self.opened.wait(_PATIENCE)

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=_PATIENCE)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_job_is_deleted_unless_it_says_otherwise(database: running.Database) -> None:
    @job
    def work() -> None: ...

    work.delay()
    running.work_off(work)
    assert database.count() == 0
    assert history(database) == []


@pytest.mark.parametrize("keep", ["7 days", 7 * 86_400, timedelta(days=7)])
def test_kept_job_moves_to_the_history_with_what_it_was_and_how_it_went(
    database: running.Database, keep: str | float | timedelta
) -> None:
    @job(queue="emails", priority=3, keep=keep)
    def work(number: int) -> None:
        gevent.sleep(0.02)

    id = work.delay(7).id
    database.rows('UPDATE background_jobs SET progress = \'{"done": 1}\', log = \'[{"message": "hi"}]\'')
    before = datetime.now(timezone.utc)
    running.work_off(work)

    (found,) = jobs.find(id)
    assert isinstance(found, jobs.FinishedJob)
    assert (found.id, found.job_type, found.queue, found.state) == (id, "work", "emails", "done")
    assert (found.data, found.priority, found.attempt, found.retries) == ({"number": 7}, 3, 1, 0)
    assert (found.crashes, found.errors, found.error) == (0, [], None)
    assert (found.has_result, found.result) == (False, None)
    assert found.progress == Progress(1)
    assert found.log == [{"message": "hi"}]
    assert found.run_seconds is not None and found.run_seconds >= 0.02
    assert found.waited_seconds is not None and found.waited_seconds >= 0
    assert found.started_at is not None and before - timedelta(seconds=5) < found.started_at < found.ended_at
    assert found.keep_until - found.ended_at == timedelta(days=7)
    assert found.runner == database.value("SELECT hostname || ':' || pid FROM background_runners")
    assert database.count() == 0


def test_call_may_be_kept_whose_job_is_not_and_the_other_way_round(database: running.Database) -> None:
    @job
    def work() -> None: ...

    @job(keep="1 day")
    def kept() -> None: ...

    id = work.options(keep="2h").delay().id
    kept.options(keep=0).delay()
    longer = kept.options(keep="3 days", max_retries=1).delay().id
    running.work_off(work, kept)
    assert history(database, "id, keep_until - ended_at") == [(id, timedelta(hours=2)), (longer, timedelta(days=3))]


@pytest.mark.parametrize("value", [Decimal("1.50"), None])
def test_result_of_a_job_that_completes_in_its_own_transaction_is_kept(
    database: running.Database, value: Decimal | None
) -> None:
    @job(keep="1 day", keep_result=True)
    def work() -> Decimal | None:
        with current_job.transaction(result=value):
            pass
        return Decimal(99)

    handle = work.delay()
    running.work_off(work)
    assert handle.result(timeout=30) == value


def test_job_that_completes_in_its_own_transaction_and_says_no_result_has_none(database: running.Database) -> None:
    @job(keep="1 day", keep_result=True)
    def work() -> int:
        with current_job.transaction():
            pass
        return 1

    handle = work.delay()
    running.work_off(work)
    with pytest.raises(NoResult):
        handle.result(timeout=30)


def test_row_that_says_nothing_is_kept_as_its_job_says(database: running.Database) -> None:
    """As the crate, a trigger, or a release that did not keep it yet have inserted it."""

    @job(keep="1 day")
    def work() -> None: ...

    database.rows("INSERT INTO background_jobs (job_type, data, options) VALUES ('work', '{}', '{\"keep\": \"soon\"}')")
    database.rows("INSERT INTO background_jobs (job_type, data) VALUES ('work', '{}')")
    running.work_off(work)
    assert history(database, "keep_until - ended_at") == [(timedelta(days=1),)] * 2


def test_discarded_and_cancelled_jobs_are_kept_with_their_outcome(database: running.Database, gate: Gate) -> None:
    @job(keep="1 day")
    def discarded() -> None:
        raise Discard("merged into another")

    @job(keep="1 day")
    def cancelled() -> None:
        gate.pass_through()

    ids = [discarded.delay().id]
    asked = cancelled.delay()
    waits = cancelled.options(delay=3600).delay()
    by_hand = [cancelled.options(delay=3600).delay().id, cancelled.options(delay=3600).delay().id]
    with running.started(Runner().register(discarded, cancelled)):
        gate.wait_entered()
        assert asked.cancel() == "asked"
        eventually(lambda: len(history(database)) == 2, "two in the history", seconds=_PATIENCE)
    assert waits.cancel() == "removed"
    assert jobs.discard(by_hand[0]).ids == (by_hand[0],)
    database.rows("UPDATE background_jobs SET cancel_asked_at = now() WHERE id = %s", by_hand[1])
    assert storage.remove_cancelled(database.connection) == 1

    assert history(database, "id, outcome, started_at IS NULL, run_seconds IS NULL, runner IS NULL") == [
        (ids[0], "discarded", False, False, False),
        (asked.id, "cancelled", False, False, False),
        (waits.id, "cancelled", True, True, True),
        (by_hand[0], "discarded", True, True, True),
        (by_hand[1], "cancelled", True, True, True),
    ]
    assert database.count() == 0
    assert jobs.find(ids[0])[0].error == "Discard: merged into another"


def test_job_that_is_cancelled_before_it_starts_in_its_runner_is_kept(database: running.Database, gate: Gate) -> None:
    """Claimed ahead, behind one that takes the only slot."""

    @job(keep="1 day")
    def work() -> None:
        gate.pass_through()

    first, second = work.delay(), work.delay()
    with running.started(Runner().register(work).configure_queue("default", pool=1)) as handle:
        gate.wait_entered()
        executor = handle.workers["default"]._executor
        runner = handle.runner_id or 0
        executor.add(storage.claim(database.connection, runner=runner, queue="default", job_types=["work"], limit=1))
        handle.cancel(second.id)
        eventually(lambda: history(database, "id, outcome") == [(second.id, "cancelled")], "kept", seconds=_PATIENCE)
        gate.opened.set()
        assert first.wait(_PATIENCE) == "done"


def test_failed_job_stays_where_it_is_and_goes_to_the_history_when_it_is_done(database: running.Database) -> None:
    broken = True

    @job(keep="1 day", max_retries=0)
    def work() -> None:
        if broken:
            raise ValueError("not yet")

    id = work.delay().id
    running.work_off(work)
    assert (database.state(id), history(database)) == ("failed", [])
    broken = False
    jobs.retry(id)
    running.work_off(work)
    assert history(database, "id, outcome, jsonb_array_length(errors)") == [(id, "done", 1)]


def test_outcome_of_a_claim_that_was_lost_moves_nothing(database: running.Database) -> None:
    connection = connect(database.url, application_name="test", timeout_seconds=60)
    storage.enqueue(connection, [NewJobs("work", ["{}"] * 3, "default")])
    rows = storage.claim(connection, runner=11, queue="default", job_types=["work"], limit=3)
    first, second, third = (Fence(row.id, row.attempt) for row in rows)
    stale = [Ended(Fence(first.id, first.attempt - 1), "done", 60.0, "1"), Ended(second, "done", 60.0, "2")]

    assert storage.end(connection, [12], stale) == set()
    assert storage.end(connection, [11], [*stale, Ended(third, "discarded")]) == {second.id, third.id}
    assert storage.end(connection, [11], stale) == set()

    assert history(database, "id, result") == [(second.id, 2)]
    assert database.column("SELECT id FROM background_jobs") == [first.id]
    connection.close()


def test_job_and_history_change_in_one_statement(database: running.Database) -> None:
    """A history that cannot be written keeps the job where it is: there is no moment between the two."""
    connection = connect(database.url, application_name="test", timeout_seconds=60)
    storage.enqueue(connection, [NewJobs("work", ["{}"], "default")])
    (row,) = storage.claim(connection, runner=11, queue="default", job_types=["work"], limit=1)
    with pytest.raises(psycopg2.errors.CheckViolation):
        storage.end(connection, [11], [Ended(Fence(row.id, row.attempt), "lost", 60.0)])
    assert database.state(row.id) == "running"
    connection.close()


DYING = """
    import os, signal
    from greenjobs import job, storage

    @job(keep="1 day", keep_result=True)
    def work():
        with open("runs", "a") as runs:
            runs.write("run\\n")
        return 7

    if os.environ.get("DIES"):
        end = storage.end

        def deadly(*args):
            if os.environ["DIES"] == "after":
                end(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        storage.end = deadly
"""


@pytest.mark.parametrize(("dies", "runs"), [("before", 2), ("after", 1)])
def test_runner_that_dies_around_the_statement_leaves_the_job_in_one_of_both_tables(
    database: running.Database, tmp_path: Path, dies: str, runs: int
) -> None:
    processes.write_application(tmp_path, DYING)
    handle = jobs.handle(1)
    with processes.runner(tmp_path, database.url, environment={"DIES": dies}) as runner:
        database.rows("INSERT INTO background_jobs (job_type, data) VALUES ('work', '{}')")
        assert runner.wait() == -9
    assert (database.count(), len(history(database))) == ((1, 0) if dies == "before" else (0, 1))
    processes.run("greenjobs", "run", "--until-empty", folder=tmp_path, database_url=database.url)
    assert (tmp_path / "runs").read_text() == "run\n" * runs
    assert handle.result(0) == 7
    assert (database.count(), len(history(database))) == (0, 1)


def test_outcome_that_is_not_written_yet_is_still_held_and_waited_for(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an audit gives the job back, nor does the runner stop without its outcome."""
    may_write, runs = threading.Event(), []
    write = storage.end

    def end_later(*args: Any) -> set[int]:
        assert may_write.wait(_PATIENCE)
        return write(*args)

    monkeypatch.setattr(storage, "end", end_later)
    monkeypatch.setattr(maintenance, "_AUDIT_AGE_SECONDS", 0.0)

    @job(keep="1 day")
    def work() -> None:
        runs.append(current_job.id)

    id = work.delay().id
    with running.started(Runner().register(work)) as handle:
        eventually(lambda: handle.finished_jobs() == 1, "it ran", seconds=_PATIENCE)
        assert handle.held_ids() == {id}
        handle._maintenance.audit()
        assert database.state(id) == "running"
        handle.shutdown()
        assert not handle.wait_for_shutdown(0.05)
        may_write.set()
    assert (runs, history(database, "id, outcome")) == ([id], [(id, "done")])


def test_newer_job_of_an_id_that_was_used_before_counts(database: running.Database) -> None:
    """After TRUNCATE background_jobs RESTART IDENTITY, as people do in development."""

    @job(keep="1 day", keep_result=True)
    def work(number: int) -> int:
        return number

    first = work.delay(1)
    running.work_off(work)
    database.rows("TRUNCATE background_jobs RESTART IDENTITY")
    second = work.delay(2)
    assert (first.id, second.status()) == (second.id, "available")
    running.work_off(work)
    assert second.result(0) == 2


def test_runner_prunes_what_was_kept_long_enough(database: running.Database) -> None:
    @job(keep="1 day")
    def work() -> None: ...

    work.delay_many([()] * 3)
    running.work_off(work)
    database.rows("UPDATE background_history SET keep_until = now() - interval '1 s' WHERE id < 3")
    with running.started(Runner().register(work)):
        eventually(lambda: len(history(database)) == 1, "two are pruned", seconds=_PATIENCE)


def test_history_is_pruned_in_batches_through_its_index(database: running.Database) -> None:
    database.rows(
        """
        INSERT INTO background_history (
            id, job_type, data, priority, attempt, retries, crashes, outcome, created_at, ended_at, keep_until
        )
        SELECT n, 'work', '{}', 0, 1, 0, 0, 'done', now(), now(), now() + make_interval(hours => n - 2500)
        FROM generate_series(1, 5000) AS n
        """
    )
    assert [storage.prune_history(database.connection, limit=1000) for _ in range(4)] == [1000, 1000, 500, 0]
    assert database.value("SELECT min(id) FROM background_history") == 2501


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "a while"}, r"work: keep is 'a while'; allowed: seconds, or a text such as"),
        ({"keep": -1}, "work: keep is -1"),
        ({"keep": True}, "work: keep is True"),
        ({"keep": float("nan")}, "work: keep is nan"),
        ({"keep_result": True}, "work: keep_result is for jobs that are kept"),
        ({"keep": 0, "keep_result": True}, "work: keep_result is for jobs that are kept"),
        ({"keep": "1 day", "keep_result": "yes"}, "work: keep_result is 'yes'; allowed: True or False"),
    ],
    ids=str,
)
def test_wrong_setting_is_refused_where_the_job_is_declared(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(JobDefinitionError, match=message):

        @job(**settings)
        def work() -> None: ...


def test_wrong_keep_of_a_call_is_refused(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with pytest.raises(OptionError, match="work: keep is 'never'; allowed: seconds"):
        work.options(keep="never")


# --- results ----------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Receipt:
    number: int
    total: Decimal
    lines: list[date]


@dataclasses.dataclass
class Lazy:
    number: int

    def __getattribute__(self, name: str) -> Any:
        raise ConnectionError("loads what is asked for, and cannot")


RESULTS: list[tuple[Any, Any]] = [
    (int, 7),
    (str, "ümläut ✓"),
    (float, 1.0),
    (bool, False),
    (None, None),
    (list[int], [1, 2]),
    (dict[str, Any], {"b": [1, None], "a": {"c": 1.5}}),
    (Any, {"plain": [1, "two", None]}),
    (datetime, datetime(2024, 2, 29, 12, tzinfo=timezone.utc)),
    (date, date(2024, 2, 29)),
    (timedelta, timedelta(seconds=1.5)),
    (Decimal, Decimal("19.990")),
    (uuid.UUID, uuid.UUID(int=7)),
    (Colour, Colour.RED),
    (set[int], {1, 2}),
    (tuple[int, str], (1, "two")),
    (Receipt, Receipt(1, Decimal("1.10"), [date(2024, 1, 1)])),
    (list[Receipt], [Receipt(1, Decimal("1.10"), [])]),
    (Receipt | None, None),
]


@pytest.mark.parametrize(("annotation", "value"), RESULTS, ids=[str(annotation) for annotation, _ in RESULTS])
def test_result_comes_back_as_what_is_annotated(database: running.Database, annotation: Any, value: Any) -> None:
    def work() -> Any:
        return value

    work.__annotations__["return"] = annotation
    declared = job(keep="1 day", keep_result=True)(work)
    handle = declared.delay()
    running.work_off(declared)
    result = handle.result(0)
    assert result == value
    assert type(result) is type(value)


def test_result_is_plain_json_where_the_job_is_not_known(database: running.Database) -> None:
    @job(keep="1 day", keep_result=True)
    def work() -> Decimal:
        return Decimal("1.50")

    id = work.delay().id
    running.work_off(work)
    sys.modules["greenjobs.keeping"].register(["work"], None)
    assert jobs.handle(id).result() == "1.50"


def test_result_under_an_alias_is_read_as_well(database: running.Database) -> None:
    @job(keep="1 day", keep_result=True, aliases=["former"])
    def work() -> Decimal:
        return Decimal("1.50")

    database.rows("INSERT INTO background_jobs (job_type, data) VALUES ('former', '{}')")
    running.work_off(work)
    assert jobs.handle(1).result() == Decimal("1.50")


def test_result_that_fits_the_annotation_no_more_is_refused(database: running.Database) -> None:
    @job(keep="1 day", keep_result=True)
    def work() -> datetime:
        return datetime.now(timezone.utc)

    handle = work.delay()
    running.work_off(work)
    database.rows("UPDATE background_history SET result = '[\"soon\"]'")
    with pytest.raises(PayloadMismatch, match="work: the result"):
        handle.result(0)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (object(), "returned a object, which is of type object"),
        ({"when": [datetime.now(timezone.utc)]}, r"returned a dict, which at \['when'\]\[0\] is of type datetime"),
        (float("nan"), "returned a float, which is nan"),
        ("nul \0", "returned a str, which contains"),
        (2**70, "returned a int, which is an integer of more than 64 bits"),
        ("x" * 3000, r"returned a str that is 3002 bytes of JSON, which max_payload_bytes limits to 2000"),
    ],
    ids=["object", "nested", "nan", "nul", "integer", "large"],
)
def test_result_that_is_no_json_is_said_once_and_the_job_is_done(
    database: running.Database, caplog: pytest.LogCaptureFixture, value: Any, complaint: str
) -> None:
    greenjobs.configure(database_url=database.url, max_payload_bytes=2000)

    @job(keep="1 day", keep_result=True)
    def work() -> Any:
        return value

    handle, _, _ = work.delay_many([()] * 3)
    with caplog.at_level(logging.WARNING):
        running.work_off(work)
    assert history(database, "outcome, result::text") == [("done", None)] * 3
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"job {handle.id} (work) " in warnings[0]
    assert re.search(complaint, warnings[0])
    with pytest.raises(NoResult, match=r"keep_result=True.*log") as raised:
        handle.result(0)
    assert raised.value.outcome == "done"


def test_result_that_cannot_be_read_costs_the_job_nothing(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    @job(keep="1 day", keep_result=True)
    def work() -> Lazy:
        return Lazy(1)

    handle = work.delay()
    running.work_off(work)
    assert handle.wait(0) == "done"
    assert "returned a Lazy, which cannot be written as Lazy: ConnectionError" in caplog.text


def test_return_annotation_that_json_cannot_carry_is_refused_where_the_job_is_declared() -> None:
    with pytest.raises(JobDefinitionError, match=r"work.*what it returns, and keep_result keeps, is annotated as"):

        @job(keep="1 day", keep_result=True)
        def work() -> threading.Thread:
            raise NotImplementedError

    @job(keep="1 day")
    def other() -> threading.Thread:
        raise NotImplementedError


def test_large_results_go_in_several_statements(database: running.Database) -> None:
    @job(keep="1 day", keep_result=True)
    def work(letter: str) -> str:
        return letter * 900_000

    handles = work.delay_many([(letter,) for letter in "abcdefghijklmnop"])
    running.work_off(work, pool=16)
    assert [handle.result(0)[:1] for handle in handles] == list("abcdefghijklmnop")
    assert database.value("SELECT min(length(result::text)) FROM background_history") == 900_002


def test_result_of_a_job_that_failed_is_its_error(database: running.Database) -> None:
    @job(max_retries=0, keep="1 day", keep_result=True)
    def work() -> int:
        raise ValueError("out of stock")

    handle = work.delay()
    running.work_off(work)
    with pytest.raises(JobFailed, match=r"\(work\) failed: ValueError: out of stock") as raised:
        handle.result(_PATIENCE)
    assert (raised.value.id, raised.value.error, raised.value.message) == (handle.id, "ValueError", "out of stock")


def test_result_of_a_job_that_keeps_none_says_what_to_declare(database: running.Database) -> None:
    @job
    def gone() -> int:
        return 1

    @job(keep="1 day")
    def done() -> int:
        return 1

    @job(keep="1 day", keep_result=True)
    def discarded() -> int:
        raise Discard

    handles = [each.delay() for each in (gone, done, discarded)]
    running.work_off(gone, done, discarded)
    outcomes = []
    for handle in handles[:2]:
        with pytest.raises(NoResult, match="keep_result=True") as raised:
            handle.result(0)
        outcomes.append(raised.value.outcome)
    assert outcomes == ["gone", "done"]
    with pytest.raises(NoResult, match="was discarded, and so has no result"):
        handles[2].result(0)


def test_finished_job_keeps_what_it_said_last_of_itself(database: running.Database) -> None:
    @job(keep="1 day", keep_log=True)
    def work(way: str) -> None:
        current_job.progress(1, 10, "begun")
        current_job.progress(10, 10, way)
        current_job.log.info("all of it: %s", way)
        if way == "discarded":
            raise Discard("no use")

    handles = [work.delay(way) for way in ("done", "discarded")]
    running.work_off(work)
    for handle, way in zip(handles, ("done", "discarded"), strict=True):
        found = jobs.get(handle.id)
        assert found is not None and found.progress is not None
        assert (found.state, found.progress.done, found.progress.message) == (way, 10, way)
        assert [line["message"] for line in found.log] == [f"all of it: {way}"]
