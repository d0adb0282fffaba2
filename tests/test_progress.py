"""What running jobs say of themselves: how far they are, and their log; when it is written, and what becomes of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any

import databases
import gevent
import psycopg2
import pytest
import running
from click.testing import CliRunner
from gevent.event import Event
from waiting import eventually

from greenjobs import current_job, job, jobs, reporter, storage
from greenjobs.cli import main
from greenjobs.control import Snooze
from greenjobs.errors import JobDefinitionError, NoCurrentJob, OptionError
from greenjobs.progress import (
    KEPT_LINES,
    LARGEST_COUNT,
    LONGEST_LINE,
    LONGEST_MESSAGE,
    MOST_KEPT_LINES,
    Progress,
)
from greenjobs.runner import Runner

PATIENCE_SECONDS = running.PATIENCE_SECONDS


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests here: making one takes longer than most of them do."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    with running.application(shared_url) as database:
        yield database
        database.rows("TRUNCATE background_jobs, background_runners, background_waiting, background_counts")


class Writings:
    """What storage.report was asked to write, statement by statement, and what it wrote."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, Any]]] = []
        self.written: list[set[int]] = []


@pytest.fixture
def writings(monkeypatch: pytest.MonkeyPatch) -> Writings:
    seen, write = Writings(), storage.report

    def report(connection: Any, runners: Sequence[int], reports: Sequence[Any], *, skip_locked: bool) -> set[int]:
        seen.asked.append(list(reports))
        seen.written.append(write(connection, runners, reports, skip_locked=skip_locked))
        return seen.written[-1]

    monkeypatch.setattr(storage, "report", report)
    return seen


def progress_of(id: int) -> tuple[float, float | None, str | None] | None:
    found = jobs.get(id)
    assert found is not None
    said = found.progress
    return None if said is None else (said.done, said.total, said.message)


def log_of(id: int) -> list[tuple[int, str, str]]:
    found = jobs.get(id)
    assert found is not None
    return [(line["attempt"], line["level"], line["message"]) for line in found.log]


# --- progress, while the job runs -------------------------------------------------------------------------------------


def test_progress_is_seen_while_the_job_runs(database: running.Database) -> None:
    may_end = Event()

    @job
    def convert() -> None:
        current_job.progress(3, 10, "page 3")
        may_end.wait(PATIENCE_SECONDS)

    id = convert.delay().id
    with running.started(Runner().register(convert)):
        eventually(lambda: progress_of(id), "no progress was written")
        found = jobs.get(id)
        assert found is not None
        assert found.state == "running"
        assert progress_of(id) == (3, 10, "page 3")
        assert found.progress is not None
        assert found.progress.at is not None
        assert abs(datetime.now(timezone.utc) - found.progress.at) < timedelta(minutes=5)
        may_end.set()


def test_a_million_calls_are_few_statements_and_the_last_one_gets_there(
    database: running.Database, writings: Writings
) -> None:
    may_end = Event()

    @job
    def count() -> None:
        for done in range(1_000_001):
            current_job.progress(done, 1_000_000)
            if done % 10_000 == 0:
                gevent.sleep(0)
        may_end.wait(PATIENCE_SECONDS)

    id = count.delay().id
    with running.started(Runner().register(count)):
        eventually(lambda: progress_of(id) == (1_000_000, 1_000_000, None), "the last call was not written", seconds=60)
        # About one for each second that the loop takes on this machine.
        assert len(writings.asked) < 60
        may_end.set()


def test_jobs_of_a_runner_are_written_together(database: running.Database, writings: Writings) -> None:
    may_say, may_end = Event(), Event()

    @job
    def say(number: int) -> None:
        may_say.wait(PATIENCE_SECONDS)
        current_job.progress(number)
        may_end.wait(PATIENCE_SECONDS)

    ids = [handle.id for handle in say.delay_many([(number,) for number in range(30)])]
    with running.started(Runner().register(say).configure_queue("default", pool=30)) as handle:
        eventually(lambda: handle.running_jobs() == 30, "not all of them started")
        may_say.set()
        eventually(lambda: all(progress_of(id) is not None for id in ids), "not all of them were written")
        assert [progress_of(id) for id in ids] == [(number, None, None) for number in range(30)]
        assert len(writings.asked) <= 3
        may_end.set()


def test_job_goes_on_while_the_database_does_not_take_its_progress(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_asked, may_answer, went_on = Event(), Event(), Event()

    def report(*arguments: Any, **more: Any) -> set[int]:
        was_asked.set()
        assert may_answer.wait(PATIENCE_SECONDS)
        return set()

    monkeypatch.setattr(storage, "report", report)

    @job
    def convert() -> None:
        current_job.progress(1)
        assert was_asked.wait(PATIENCE_SECONDS)
        current_job.progress(2)
        current_job.log.info("on it goes")
        went_on.set()

    convert.delay()
    with running.started(Runner().register(convert)):
        assert went_on.wait(PATIENCE_SECONDS)
        database.wait_for("true", count=0)
        may_answer.set()


def test_row_that_is_locked_by_another_session_has_its_progress_later(
    database: running.Database, writings: Writings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is being cancelled; the jobs that are written with it do not wait for it."""
    monkeypatch.setattr(reporter, "_PAUSE_SECONDS", 0.01)
    may_say, may_end = Event(), Event()

    @job
    def say() -> None:
        may_say.wait(PATIENCE_SECONDS)
        current_job.progress(1)
        may_end.wait(PATIENCE_SECONDS)

    locked, free = (say.delay().id for _ in range(2))
    with running.started(Runner().register(say)) as handle:
        eventually(lambda: handle.running_jobs() == 2, "they did not start")
        database.rows("BEGIN")
        database.rows("SELECT FROM background_jobs WHERE id = %s FOR UPDATE", locked)
        may_say.set()
        eventually(lambda: {free} in writings.written, "the free row was not written")
        eventually(lambda: writings.written.count(set()) > 1, "the locked row was not tried again")
        assert progress_of(locked) is None
        database.rows("COMMIT")
        eventually(lambda: progress_of(locked) == (1, None, None), "the row was not written when it was free")
        may_end.set()


def test_runner_that_lost_the_job_changes_nothing(
    database: running.Database, writings: Writings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "_PAUSE_SECONDS", 0.01)
    was_lost, may_fail = Event(), Event()

    @job(keep_log=True, max_retries=0)
    def convert() -> None:
        current_job.progress(1)
        was_lost.wait(PATIENCE_SECONDS)
        current_job.progress(2)
        current_job.log.info("stale")
        may_fail.wait(PATIENCE_SECONDS)
        current_job.progress(3)
        raise ValueError

    id = convert.delay().id
    with running.started(Runner().register(convert)):
        eventually(lambda: progress_of(id) == (1, None, None), "no progress was written")
        # Another runner has it now, and has said how far it is.
        database.rows(
            """UPDATE background_jobs SET claimed_by = 2000000000, attempt = attempt + 1, progress = '{"done": 70}'"""
        )
        was_lost.set()
        eventually(lambda: writings.written[-1] == set(), "the lost runner did not try to write")
        may_fail.set()
        eventually(lambda: any(r.get("progress", {}).get("done") == 3 for r in writings.asked[-1]), "no last try")
        eventually(lambda: len(writings.written) == len(writings.asked), "the last try was not answered")
        assert writings.written[-1] == set()
        assert (progress_of(id), log_of(id)) == ((70, None, None), [])
        assert database.state(id) == "running"


def test_progress_gets_there_although_the_connections_break(database: running.Database) -> None:
    may_end = Event()

    @job
    def convert() -> None:
        current_job.progress(1)
        eventually(lambda: progress_of(current_job.id) == (1, None, None), "the first progress was not written")
        database.terminate_sessions("greenjobs runner")
        current_job.progress(2)
        may_end.wait(PATIENCE_SECONDS)

    id = convert.delay().id
    with running.started(Runner().register(convert)):
        eventually(lambda: progress_of(id) == (2, None, None), "the progress was not written", seconds=PATIENCE_SECONDS)
        may_end.set()


def test_job_that_is_done_is_not_written_any_more(database: running.Database, writings: Writings) -> None:
    @job(keep_log=True)
    def convert(number: int) -> None:
        current_job.progress(number)
        current_job.log.info("converted")

    convert.delay_many([(number,) for number in range(50)])
    running.work_off(convert, pool=1)
    assert sum(len(reports) for reports in writings.asked) < 50
    assert database.count() == 0


# --- progress, over attempts ------------------------------------------------------------------------------------------


def test_retried_job_sees_what_the_attempt_before_reached_and_goes_on_there(database: running.Database) -> None:
    lines, seen = [], []

    @job(backoff=0, max_retries=5)
    def import_lines() -> None:
        last = current_job.last_progress
        seen.append(None if last is None else (last.done, last.total, last.message))
        for number in range(int(last.done) if last else 0, 10):
            if number == {1: 4, 2: 7}.get(current_job.attempt):
                raise ConnectionError
            lines.append(number)
            current_job.progress(number + 1, 10, f"line {number}")

    import_lines.delay()
    with running.started(Runner().register(import_lines)):
        database.wait_for("true", count=0)
    assert lines == list(range(10))
    assert seen == [None, (4, 10, "line 3"), (7, 10, "line 6")]


@pytest.mark.parametrize("end", ["fail", "snooze", "interrupt"])
def test_what_was_said_right_before_an_attempt_ended_is_there_with_its_outcome(
    database: running.Database, end: str
) -> None:
    has_said = Event()

    @job(keep_log=True, max_retries=0)
    def convert() -> None:
        current_job.progress(1)
        eventually(lambda: progress_of(current_job.id) is not None, "the first progress was not written")
        current_job.progress(2)
        current_job.log.warning("now")
        has_said.set()
        if end == "fail":
            raise ValueError
        if end == "snooze":
            raise Snooze(3600)
        Event().wait(PATIENCE_SECONDS)

    id = convert.delay().id
    with running.started(Runner().register(convert)) as handle:
        assert has_said.wait(PATIENCE_SECONDS)
        if end == "interrupt":
            handle.shutdown(urgency=2)
        state = {"fail": "failed", "snooze": "scheduled", "interrupt": "available"}[end]
        database.wait_for("state = %s", state)
        assert (progress_of(id), log_of(id)) == ((2, None, None), [(1, "WARNING", "now")])


def test_last_progress_is_asked_for_once_and_not_in_the_first_attempt(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ask = [], storage.last_progress

    def last_progress(connection: Any, id: int) -> Any:
        asked.append(id)
        return ask(connection, id)

    monkeypatch.setattr(storage, "last_progress", last_progress)
    seen = []

    @job(backoff=0)
    def convert() -> None:
        for _ in range(3):
            seen.append(current_job.last_progress)
        if current_job.attempt == 1:
            raise ValueError
        current_job.progress(5, 6)
        seen.append(current_job.last_progress)

    id = convert.delay().id
    with running.started(Runner().register(convert)):
        database.wait_for("true", count=0)
    assert asked == [id]
    assert seen[:6] == [None] * 6
    assert seen[6] is not None
    assert (seen[6].done, seen[6].total) == (5, 6)


@pytest.mark.parametrize("stored", ["{}", '{"done": "many"}', '{"done": true, "total": 3}'])
def test_progress_that_somebody_wrote_by_hand_and_that_is_none_is_left_out(
    database: running.Database, stored: str
) -> None:
    id = database.value(
        "INSERT INTO background_jobs (job_type, data, progress) VALUES ('x', '{}', %s) RETURNING id", stored
    )
    assert progress_of(id) is None


def test_columns_take_no_other_kinds_of_json(database: running.Database) -> None:
    for column, value in (("progress", "[]"), ("log", "{}")):
        with pytest.raises(psycopg2.errors.CheckViolation):
            database.rows(f"INSERT INTO background_jobs (job_type, data, {column}) VALUES ('x', '{{}}', '{value}')")


# --- what progress may be ---------------------------------------------------------------------------------------------


def said(*arguments: Any) -> tuple[float, float | None, str | None]:
    """What is on the row when a job said this and failed."""

    @job(max_retries=0)
    def convert() -> None:
        current_job.progress(*arguments)
        raise ValueError

    id = convert.delay().id
    running.work_off(convert)
    result = progress_of(id)
    assert result is not None, jobs.get(id)
    return result


@pytest.mark.parametrize(
    ("arguments", "stored"),
    [
        ((0,), (0, None, None)),
        ((0, 0), (0, 0, None)),
        ((12, 10), (12, 10, None)),
        ((0.5, 1.0, "half"), (0.5, 1.0, "half")),
        ((Fraction(1, 4), LARGEST_COUNT), (0.25, LARGEST_COUNT, None)),
        ((1, None, "x" * (LONGEST_MESSAGE + 5)), (1, None, "x" * LONGEST_MESSAGE)),
        ((1, None, "NUL \0, half a character \ud83d, 100 %"), (1, None, "NUL \\0, half a character \\ud83d, 100 %")),
    ],
    ids=str,
)
def test_progress_that_may_be(database: running.Database, arguments: Any, stored: Any) -> None:
    assert said(*arguments) == stored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "convert: done of its progress is -1; allowed: a number from 0 to 9,223,372,036,854,775,807"),
        (("5",), "convert: done of its progress is '5'; allowed: a number"),
        ((None,), "convert: done of its progress is None"),
        ((True,), "convert: done of its progress is True"),
        ((float("nan"),), "convert: done of its progress is nan"),
        ((float("inf"),), "convert: done of its progress is inf"),
        ((LARGEST_COUNT + 1,), "convert: done of its progress is 9223372036854775808"),
        ((Decimal(1),), r"convert: done of its progress is Decimal\('1'\)"),
        ((1, -1), "convert: total of its progress is -1; allowed: a number"),
        ((1, "2"), "convert: total of its progress is '2'"),
        ((1, False), "convert: total of its progress is False"),
        ((1, 2, 3), "convert: the message of its progress is 3; allowed: a text"),
    ],
    ids=str,
)
def test_progress_that_cannot_be_is_refused_and_changes_nothing(
    database: running.Database, arguments: Any, message: str
) -> None:
    refused = []

    @job(max_retries=0)
    def convert() -> None:
        current_job.progress(7)
        with pytest.raises(OptionError, match=message) as caught:
            current_job.progress(*arguments)
        refused.append(caught.value)
        raise ValueError("on purpose")

    id = convert.delay().id
    running.work_off(convert)
    assert len(refused) == 1
    assert progress_of(id) == (7, None, None)


def test_outside_a_job_there_is_nothing_to_say() -> None:
    for say in (lambda: current_job.progress(1), lambda: current_job.last_progress, lambda: current_job.log):
        with pytest.raises(NoCurrentJob):
            say()


# --- the log ----------------------------------------------------------------------------------------------------------


def test_lines_go_through_the_logger_of_the_jobs_module_with_its_ids(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    for keep_log in (False, True):

        @job(name=f"convert_{keep_log}", queue="pages", keep_log=keep_log, max_retries=0)
        def convert() -> None:
            current_job.log.warning("page %s is %s", 3, "empty", extra={"page": 3, "job_id": "not this"})

        with caplog.at_level(logging.WARNING):
            id = convert.delay().id
            running.work_off(convert)
        (record,) = [record for record in caplog.records if record.name == __name__]
        assert record.getMessage() == "page 3 is empty"
        assert (record.funcName, record.filename) == ("convert", "test_progress.py")
        assert vars(record)["page"] == 3
        keys = ("job_id", "job_type", "queue", "attempt")
        assert [vars(record)[key] for key in keys] == [id, f"convert_{keep_log}", "pages", 1]
        caplog.clear()


def test_kept_lines_are_there_with_the_failure_and_those_of_all_attempts_in_order(database: running.Database) -> None:
    @job(keep_log=True, backoff=0, max_retries=1)
    def convert() -> None:
        current_job.log.info("begins %s", current_job.attempt)
        try:
            raise KeyError("page")
        except KeyError:
            current_job.log.exception("page is missing")
        raise ValueError("on purpose")

    id = convert.delay().id
    with running.started(Runner().register(convert)):
        database.wait_for("state = 'failed'")
    assert log_of(id) == [
        (1, "INFO", "begins 1"),
        (1, "ERROR", "page is missing (KeyError: 'page')"),
        (2, "INFO", "begins 2"),
        (2, "ERROR", "page is missing (KeyError: 'page')"),
    ]


def test_kept_lines_are_seen_while_the_job_runs(database: running.Database) -> None:
    may_end = Event()

    @job(keep_log=True)
    def convert() -> None:
        current_job.log.info("begins")
        may_end.wait(PATIENCE_SECONDS)

    id = convert.delay().id
    with running.started(Runner().register(convert)):
        eventually(lambda: log_of(id) == [(1, "INFO", "begins")], "the line was not written")
        may_end.set()


def test_the_newest_lines_are_kept_over_all_attempts(database: running.Database) -> None:
    @job(keep_log=3, backoff=0, max_retries=1)
    def convert() -> None:
        for number in range(2 if current_job.attempt == 2 else 10):
            current_job.log.info("line %s", number)
        raise ValueError

    id = convert.delay().id
    with running.started(Runner().register(convert)):
        database.wait_for("state = 'failed'")
    assert log_of(id) == [(1, "INFO", "line 9"), (2, "INFO", "line 0"), (2, "INFO", "line 1")]


def test_lines_of_an_attempt_that_is_written_several_times_are_there_once(
    database: running.Database, writings: Writings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "_PAUSE_SECONDS", 0.01)

    @job(keep_log=True, max_retries=0)
    def convert() -> None:
        said: list[str] = []
        for number in range(5):
            current_job.log.info("%s", number)
            said.append(str(number))
            eventually(lambda: [line[2] for line in log_of(current_job.id)] == said, "the line was not written")
        raise ValueError

    id = convert.delay().id
    running.work_off(convert)
    assert len(writings.asked) >= 5
    assert [message for _, _, message in log_of(id)] == ["0", "1", "2", "3", "4"]


def test_lines_of_an_interrupted_attempt_stay_beside_those_of_the_next_which_has_the_same_number(
    database: running.Database,
) -> None:
    begun = Event()

    @job(keep_log=True, max_retries=0)
    def convert() -> None:
        current_job.log.info("claim")
        if not begun.is_set():
            begun.set()
            Event().wait(PATIENCE_SECONDS)
        raise ValueError

    id = convert.delay().id
    with running.started(Runner().register(convert)) as handle:
        assert begun.wait(PATIENCE_SECONDS)
        handle.shutdown(urgency=2)
        assert handle.wait_for_shutdown(PATIENCE_SECONDS)
    running.work_off(convert)
    assert log_of(id) == [(1, "INFO", "claim")] * 2


def test_lines_are_bounded_and_storable_and_a_wrong_one_breaks_nothing(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # it would print the wrong one's traceback

    class Rude:
        def __str__(self) -> str:
            raise ValueError

    @job(keep_log=True, max_retries=0)
    def convert() -> None:
        current_job.log.info("x" * (LONGEST_LINE + 1))
        current_job.log.info("NUL \0 and \ud83d")
        current_job.log.info(Rude())
        current_job.log.debug("not kept: logging lets INFO through, and above")
        current_job.log.info("%s of %s", 5)
        raise ValueError

    id = convert.delay().id
    running.work_off(convert)
    assert [message for _, _, message in log_of(id)] == [
        "x" * LONGEST_LINE,
        "NUL \\0 and \\ud83d",
        "a line that cannot be shown: ValueError",
        "a line that cannot be shown: TypeError",
    ]


def test_lines_are_kept_whatever_logging_does_with_them(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    @job(keep_log=True, max_retries=0)
    def convert() -> None:
        current_job.log.info("quiet")
        raise ValueError

    id = convert.delay().id
    with caplog.at_level(logging.ERROR, logger=__name__):
        running.work_off(convert)
    assert log_of(id) == [(1, "INFO", "quiet")]
    assert "quiet" not in caplog.messages


def test_nothing_is_kept_unless_it_is_asked_for(database: running.Database, writings: Writings) -> None:
    @job(max_retries=0)
    def convert() -> None:
        current_job.log.info("a line")
        raise ValueError

    id = convert.delay().id
    running.work_off(convert)
    assert (log_of(id), writings.asked) == ([], [])


@pytest.mark.parametrize("keep_log", [0, -1, MOST_KEPT_LINES + 1, 2.5, "yes", None])
def test_keep_log_that_cannot_be_is_refused_where_it_is_declared(database: running.Database, keep_log: Any) -> None:
    with pytest.raises(JobDefinitionError, match=r"convert: keep_log is .*; allowed: True for 100 lines, a number"):

        @job(keep_log=keep_log)
        def convert() -> None: ...


@pytest.mark.parametrize(
    ("keep_log", "lines"), [(True, KEPT_LINES), (False, 0), (1, 1), (MOST_KEPT_LINES, MOST_KEPT_LINES)]
)
def test_keep_log_is_a_number_of_lines(database: running.Database, keep_log: Any, lines: int) -> None:
    @job(keep_log=keep_log)
    def convert() -> None: ...

    assert convert.policy.keep_log == lines


# --- what people see --------------------------------------------------------------------------------------------------


def test_show_has_progress_and_log(database: running.Database) -> None:
    @job(keep_log=True, max_retries=0)
    def convert() -> None:
        current_job.progress(250, 1000, "page\x1b 250")
        current_job.log.warning("page 249 is\x1b[31m empty")
        raise ValueError

    id = convert.delay().id
    running.work_off(convert)
    result = CliRunner().invoke(main, ["jobs", "show", str(id), "--database-url", database.url])
    assert "  progress      250 of 1,000 (25 %): page\\x1b 250, at 20" in result.stdout
    assert "\n  log:\n    attempt 1 at 20" in result.stdout
    assert ": WARNING page 249 is\\x1b[31m empty" in result.stdout

    result = CliRunner().invoke(main, ["jobs", "show", str(id), "--json", "--database-url", database.url])
    (shown,) = json.loads(result.stdout)
    assert (shown["progress"]["done"], shown["progress"]["total"]) == (250, 1000)
    assert datetime.fromisoformat(shown["progress"]["at"]).tzinfo is not None
    assert [line["message"] for line in shown["log"]] == ["page 249 is\x1b[31m empty"]


def test_progress_without_a_total_is_shown_as_it_is(database: running.Database) -> None:
    database.rows(
        """INSERT INTO background_jobs (job_type, data, progress) VALUES ('x', '{}', '{"done": 3, "total": 0}')"""
    )
    (found,) = jobs.find()
    assert found.progress == Progress(3, 0)
    result = CliRunner().invoke(main, ["jobs", "show", str(found.id), "--database-url", database.url])
    assert "  progress      3\n" in result.stdout
