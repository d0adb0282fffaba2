"""`greenjobs jobs`, and what `greenjobs status` says of jobs that nobody runs: what they print, ask and return."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import databases
import processes
import pytest
import running
from click.testing import CliRunner, Result
from waiting import eventually

from greenjobs import job
from greenjobs.cli import main
from greenjobs.runner import Runner

LONG_AGO = "2020-01-01 00:00:00+00"


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing but rows behind: making one takes longer than most of them do."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[running.Database]:
    monkeypatch.setenv("GREENJOBS_DATABASE_URL", shared_url)
    with running.application(shared_url) as database:
        yield database
        database.rows("TRUNCATE background_jobs, background_runners")


def insert(database: running.Database, count: int = 1, **columns: Any) -> list[int]:
    given = {"job_type": "work", "data": "{}", "queue": "default", **columns}
    if given.get("state") == "failed":
        given.setdefault("last_retry", "now")
    names, values = ", ".join(given), ", ".join(["%s"] * len(given))
    return database.column(
        f"INSERT INTO background_jobs ({names}) SELECT {values} FROM generate_series(1, %s) RETURNING id",
        *given.values(),
        count,
    )


def error_of(message: str, traceback: str = "Traceback: …") -> str:
    error = {"at": LONG_AGO, "attempt": 2, "error": "ValueError", "message": message, "runner": "host:7"}
    return json.dumps([{**error, "traceback": traceback}])


def greenjobs(*arguments: object, status: int = 0) -> Result:
    """Run the command in this process, as one without a terminal."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def jobs_json(*arguments: object, status: int = 0) -> Any:
    return json.loads(greenjobs("jobs", *arguments, "--json", status=status).stdout)


# --- list and show ----------------------------------------------------------------------------------------------------


class TestList:
    def test_jobs_are_a_table_with_their_last_errors(self, database: running.Database) -> None:
        (id,) = insert(database, queue="emails", state="failed", retries=3, errors=error_of("no such\naddress"))
        header, row = greenjobs("jobs", "list").stdout.splitlines()
        assert header.split() == ["id", "type", "queue", "state", "age", "failures", "last", "error"]
        assert row.split() == f"{id} work emails failed 0 s 3 ValueError: no such address".split()

    def test_the_newest_is_the_first(self, database: running.Database) -> None:
        ids = insert(database, 3)
        assert [found["id"] for found in jobs_json("list")] == ids[::-1]

    def test_filters_are_those_of_python(self, database: running.Database) -> None:
        (one,) = insert(database, queue="emails", job_type="send", state="failed", errors=error_of("refused"))
        insert(database, queue="emails", job_type="send", state="failed", errors=error_of("other"))
        insert(database, queue="emails", job_type="note", state="failed", errors=error_of("refused"))
        insert(database, queue="emails", job_type="send", errors=error_of("refused"))
        insert(database, job_type="send", state="failed", errors=error_of("refused"))
        old = {"created_at": LONG_AGO, "last_retry": LONG_AGO, "errors": error_of("refused")}
        insert(database, queue="emails", job_type="send", state="failed", **old)
        filters = "--queue emails --queue bulk --type send --state failed --error REFUSED --newer-than 1h"
        assert [found["id"] for found in jobs_json("list", *filters.split())] == [one]

    def test_older_than_takes_durations_for_people(self, database: running.Database) -> None:
        (old,) = insert(database, created_at=LONG_AGO)
        insert(database)
        assert [found["id"] for found in jobs_json("list", "--older-than", "7 days")] == [old]

    def test_ids_are_arguments(self, database: running.Database) -> None:
        first, _, third = insert(database, 3)
        assert [found["id"] for found in jobs_json("list", first, third)] == [third, first]

    def test_it_says_how_many_there_are_beyond_the_limit(self, database: running.Database) -> None:
        insert(database, 120)
        lines = greenjobs("jobs", "list").stdout.splitlines()
        assert (len(lines), lines[-1]) == (103, "100 of 120 jobs; --limit shows more")
        assert greenjobs("jobs", "list", "--limit", 2).stdout.splitlines()[-1].startswith("2 of 120 jobs")
        assert len(greenjobs("jobs", "list", "--limit", 120).stdout.splitlines()) == 121

    def test_json_has_the_whole_row(self, database: running.Database) -> None:
        (id,) = insert(database, data='{"to": "ann"}', state="failed", created_at=LONG_AGO, errors=error_of("no"))
        (found,) = jobs_json("list")
        assert (found["id"], found["data"], found["queue"], found["state"]) == (id, {"to": "ann"}, "default", "failed")
        assert found["created_at"].startswith("2020-01-01T00:00:00")
        assert found["errors"][0]["message"] == "no"

    def test_error_cannot_steer_the_terminal(self, database: running.Database) -> None:
        insert(database, state="failed", errors=error_of("\x1b]0;owned\x07 \x1b[2J"))
        assert "\x1b" not in greenjobs("jobs", "list").stdout
        assert "\\x1b]0;owned\\x07" in greenjobs("jobs", "list").stdout


class TestShow:
    def test_all_about_a_job_is_shown(self, database: running.Database) -> None:
        (id,) = insert(
            database,
            data='{"to": "änn"}',
            state="failed",
            retries=2,
            priority=5,
            unique_key="key",
            options='{"timeout": 5.0}',
            errors=error_of("no such address", "Traceback (most recent call last):\n  File …\nValueError: no such"),
        )
        shown = greenjobs("jobs", "show", id).stdout
        assert shown.startswith(f"job {id}: work\n")
        facts = dict(line.strip().split("  ", 1) for line in shown.splitlines()[1:] if "  " in line.strip())
        facts = {name: value.strip() for name, value in facts.items()}
        assert facts["state"] == "failed"
        assert facts["priority"] == "5"
        assert facts["failures"] == "2"
        assert facts["unique key"] == "key"
        assert facts["options"] == '{"timeout": 5.0}'
        assert facts["arguments"] == '{"to": "änn"}'
        assert f"attempt 2 at {LONG_AGO} on host:7: ValueError: no such address" in shown
        assert "    Traceback (most recent call last):\n      File …\n    ValueError: no such\n" in shown

    def test_runner_of_a_running_job_is_shown(self, database: running.Database) -> None:
        runner = database.value(
            "INSERT INTO background_runners (hostname, pid, version, queues, job_types)"
            " VALUES ('web-1', 77, '1', '{}', '{}') RETURNING id"
        )
        (id,) = insert(database, state="running", claimed_by=runner, claimed_at=LONG_AGO)
        assert "running, on web-1:77 since 2020-01-01 00:00:00" in greenjobs("jobs", "show", id).stdout

    def test_several_are_shown_in_the_order_of_the_arguments(self, database: running.Database) -> None:
        first, second = insert(database, 2)
        assert [found["id"] for found in jobs_json("show", second, first, second)] == [second, first]
        heads = [line for line in greenjobs("jobs", "show", second, first).stdout.splitlines() if line[:4] == "job "]
        assert heads == [f"job {second}: work", f"job {first}: work"]

    def test_job_that_is_gone_is_named_with_status_1(self, database: running.Database) -> None:
        (id,) = insert(database)
        result = greenjobs("jobs", "show", id, id + 1, status=1)
        assert result.stdout.startswith(f"job {id}: work\n")
        assert f"there is no job {id + 1}; it is done, or was deleted" in result.stderr

    def test_an_id_is_needed(self, database: running.Database) -> None:
        assert "Missing argument" in greenjobs("jobs", "show", status=2).stderr


# --- actions ----------------------------------------------------------------------------------------------------------

ACTIONS = [
    ("retry", "failed", "retried", "available"),
    ("cancel", "available", "cancelled", None),
    ("discard", "failed", "discarded", None),
]


@pytest.mark.parametrize(("action", "state", "done", "becomes"), ACTIONS)
class TestActions:
    def test_one_job_needs_no_confirmation(
        self, database: running.Database, action: str, state: str, done: str, becomes: str | None
    ) -> None:
        (id,) = insert(database, state=state)
        assert greenjobs("jobs", action, id).stdout == f"{done} 1 job: {id}\n"
        assert database.state(id) == becomes

    def test_several_need_yes_where_nobody_can_be_asked(
        self, database: running.Database, action: str, state: str, done: str, becomes: str | None
    ) -> None:
        ids = insert(database, 2, state=state)
        result = greenjobs("jobs", action, "--state", state, status=2)
        assert f"this would {action} 2 jobs" in result.stderr
        assert "--yes" in result.stderr
        assert database.count("state = %s", state) == 2
        assert greenjobs("jobs", action, "--state", state, "--yes").stdout == f"{done} 2 jobs: {ids[1]}, {ids[0]}\n"
        assert {database.state(id) for id in ids} == {becomes}

    def test_dry_run_says_which_and_changes_nothing(
        self, database: running.Database, action: str, state: str, done: str, becomes: str | None
    ) -> None:
        ids = insert(database, 12, state=state)
        listed = ", ".join(str(id) for id in ids[:1:-1])
        result = greenjobs("jobs", action, "--queue", "default", "--dry-run")
        assert result.stdout == f"would {action} 12 jobs: {listed}, …\n"
        assert database.count("state = %s", state) == 12

    def test_json_says_which(
        self, database: running.Database, action: str, state: str, done: str, becomes: str | None
    ) -> None:
        (id,) = insert(database, state=state)
        assert jobs_json(action, id, id + 1, status=1) == {
            "action": action,
            "dry_run": False,
            "ids": [id],
            "asked": [],
            "left_alone": {str(id + 1): "is gone"},
        }

    def test_limit_bounds_it(
        self, database: running.Database, action: str, state: str, done: str, becomes: str | None
    ) -> None:
        insert(database, 5, state=state)
        greenjobs("jobs", action, "--type", "work", "--limit", 3, "--yes")
        assert database.count("state = %s", state) == 2

    def test_nothing_that_matches_is_no_mistake(
        self, database: running.Database, action: str, state: str, done: str, becomes: str | None
    ) -> None:
        assert greenjobs("jobs", action, "--queue", "empty").stdout == f"{done} no jobs\n"

    def test_some_job_must_be_named(
        self, database: running.Database, action: str, state: str, done: str, becomes: str | None
    ) -> None:
        assert f"{action} which jobs?" in greenjobs("jobs", action, "--yes", status=2).stderr


class TestLeftAlone:
    def test_job_in_another_state_is_named_with_status_1(self, database: running.Database) -> None:
        (id,) = insert(database, state="running", claimed_by=1)
        result = greenjobs("jobs", "discard", id, status=1)
        assert result.stdout == f"discarded no jobs\nleft alone 1 job: {id}\n  {id}: is running\n"

    def test_what_filters_met_and_could_not_take_is_named_with_status_0(self, database: running.Database) -> None:
        first, second = insert(database, 2, state="failed", unique_key="key")
        lines = greenjobs("jobs", "retry", "--state", "failed", "--yes").stdout.splitlines()
        assert lines[0] in (f"retried 1 job: {first}", f"retried 1 job: {second}")
        assert lines[2].endswith("another job has its unique key")

    def test_running_job_is_asked_to_end(self, database: running.Database) -> None:
        (id,) = insert(database, state="running", claimed_by=1)
        assert greenjobs("jobs", "cancel", id).stdout == f"asked 1 job: {id} to end\n"
        assert database.count("cancel_asked_at IS NOT NULL") == 1


class TestPrune:
    def test_only_old_failed_jobs_are_deleted(self, database: running.Database) -> None:
        insert(database, 3, state="failed", created_at=LONG_AGO, last_retry=LONG_AGO)
        (recent,) = insert(database, state="failed", created_at=LONG_AGO)
        assert "this would prune 3 jobs" in greenjobs("jobs", "prune", status=2).stderr
        assert greenjobs("jobs", "prune", "--yes").stdout.startswith("pruned 3 jobs: ")
        assert database.column("SELECT id FROM background_jobs") == [recent]

    def test_age_and_filters_say_which(self, database: running.Database) -> None:
        (bulk,) = insert(database, queue="bulk", state="failed", created_at=LONG_AGO, last_retry=LONG_AGO)
        insert(database, state="failed", created_at=LONG_AGO, last_retry=LONG_AGO)
        insert(database, queue="bulk", state="failed", created_at=LONG_AGO)
        assert jobs_json("prune", "--older-than", "1w", "--queue", "bulk", "--dry-run")["ids"] == [bulk]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("list --state over", "greenjobs: state is 'over'; allowed: scheduled, available, running, failed, done, "),
        ("list --older-than soon", "greenjobs: older_than is 'soon'; allowed: seconds, or a text such as"),
        ("list --limit 0", "greenjobs: limit is 0"),
        ("list --error=", "greenjobs: error is ''"),
        ("list 0", "greenjobs: 0 is not the id of a job"),
        ("show 99999999999999999999", "is not the id of a job"),
        ("show seventeen", "'seventeen' is not a valid integer"),
        ("retry --state running", "greenjobs: retry does not take running jobs"),
        ("cancel --quue emails", "No such option"),
        ("prune 17", "unexpected extra argument"),
        ("list --database-url nowhere", "greenjobs: database_url is 'nowhere'"),
        ("list --database-url postgresql://127.0.0.1:1/nowhere", "greenjobs: cannot connect to"),
    ],
)
def test_mistake_is_one_line_with_status_2(database: running.Database, arguments: str, message: str) -> None:
    result = greenjobs("jobs", *arguments.split(), status=2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_database_without_tables_says_what_to_type(empty_database_url: str) -> None:
    result = greenjobs("jobs", "list", "--database-url", empty_database_url, status=2)
    assert "greenjobs migrate" in result.stderr


# --- on a terminal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_terminal(database: running.Database) -> Iterator[Callable[[str, str], tuple[int, str]]]:
    """Types an answer to a command that asks; returns the status, and what stands on the terminal."""
    ours, theirs = pty.openpty()
    started: list[subprocess.Popen[bytes]] = []

    def answer(command: str, text: str) -> tuple[int, str]:
        process = subprocess.Popen(
            command.split(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=processes.make_environment(database.url),
            start_new_session=True,
        )
        started.append(process)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(ours, 1024)
        os.write(ours, text.encode())
        status = process.wait(processes.PATIENCE_SECONDS)
        os.set_blocking(ours, False)
        shown += os.read(ours, 4096)
        return status, shown.decode()

    yield answer
    for process in started:
        process.kill()
        process.wait()
    os.close(ours)
    os.close(theirs)


def test_who_says_yes_on_a_terminal_has_it_done(
    database: running.Database, on_a_terminal: Callable[[str, str], tuple[int, str]]
) -> None:
    insert(database, 2, state="failed")
    status, shown = on_a_terminal("greenjobs jobs retry --state failed", "y\n")
    assert "retry 2 jobs? [y/N]" in shown
    assert "retried 2 jobs" in shown
    assert (status, database.count("state = 'available'")) == (0, 2)


def test_who_says_no_on_a_terminal_has_nothing_done(
    database: running.Database, on_a_terminal: Callable[[str, str], tuple[int, str]]
) -> None:
    insert(database, 2, state="failed")
    status, _ = on_a_terminal("greenjobs jobs discard --state failed", "n\n")
    assert (status, database.count("state = 'failed'")) == (1, 2)


# --- status -----------------------------------------------------------------------------------------------------------


class TestUnknownJobTypes:
    def test_waiting_types_that_no_live_runner_knows_are_listed(self, database: running.Database) -> None:
        @job(aliases=["former"])
        def known() -> None: ...

        insert(database, 2, job_type="nobodys", run_at="2099-01-01 00:00+00", state="scheduled")
        insert(database, 1, job_type="nobodys", queue="unserved")
        insert(database, job_type="known", queue="unserved")
        insert(database, job_type="former", queue="unserved")
        insert(database, job_type="nobodys", state="failed")
        with running.started(Runner().register(known)):
            status = json.loads(greenjobs("status", "--json").stdout)
            text = greenjobs("status").stdout
        assert status["unknown_job_types"] == [{"job_type": "nobodys", "count": 3}]
        assert text.endswith("waiting, and no live runner knows the job type:\n  nobodys: 3\n")

    def test_dead_runner_knows_nothing(self, database: running.Database) -> None:
        database.rows(
            "INSERT INTO background_runners (hostname, pid, version, queues, job_types)"
            " VALUES ('web-1', 77, '1', '{}', '{work}')"
        )
        insert(database)
        assert json.loads(greenjobs("status", "--json").stdout)["unknown_job_types"] == [
            {"job_type": "work", "count": 1}
        ]

    def test_nothing_is_said_where_all_types_are_known(self, database: running.Database) -> None:
        @job
        def work() -> None: ...

        insert(database, queue="unserved")
        with running.started(Runner().register(work)):
            assert "knows" not in greenjobs("status").stdout
            assert json.loads(greenjobs("status", "--json").stdout)["unknown_job_types"] == []


# --- a rolling deploy, in processes -----------------------------------------------------------------------------------


def test_payload_that_no_longer_fits_is_shown_with_what_does_not_fit(tmp_path: Path, database_url: str) -> None:
    where: dict[str, Any] = {"folder": tmp_path, "database_url": database_url}
    processes.write_application(tmp_path, "from greenjobs import job\n@job\ndef send(to): ...")
    processes.run("python", "-c", "from app import send; print(send.delay('ann').id)", **where)
    processes.write_application(tmp_path, "from greenjobs import job\n@job\ndef send(to, subject): print(subject)")
    processes.run("greenjobs", "run", "--until-empty", **where)

    shown = processes.run("greenjobs", "jobs", "show", "1", **where)
    assert "PayloadMismatch: send: the stored payload lacks the argument 'subject'" in shown

    processes.write_application(
        tmp_path, "from greenjobs import job\n@job\ndef send(to, subject='news'): print(f'{subject} to {to}')"
    )
    processes.run("greenjobs", "jobs", "retry", "--error", "lacks the argument", **where)
    assert "news to ann" in processes.run("greenjobs", "run", "--until-empty", **where)


def test_job_that_is_discarded_under_load_is_run_or_discarded_and_never_both(tmp_path: Path, database_url: str) -> None:
    """Somebody discards what waits while it is claimed: each job is either run or discarded."""
    where: dict[str, Any] = {"folder": tmp_path, "database_url": database_url}
    processes.write_application(
        tmp_path,
        """
        import os, time
        from greenjobs import job

        @job
        def note(number):
            time.sleep(0.1)
            os.close(os.open(f"done/{number}", os.O_CREAT | os.O_EXCL))
        """,
    )
    (tmp_path / "done").mkdir()
    # Few at a time, for many to be left when the command comes to it, however long that takes to start.
    with processes.runner(tmp_path, database_url, "--pool", "10"):
        code = "from app import note; note.delay_many([(number,) for number in range(3000)])"
        processes.run("python", "-c", code, **where)
        command = ("greenjobs", "jobs", "discard", "--state", "available", "--yes", "--json")
        outcome = json.loads(processes.run(*command, **where))
        with databases.administration(database_url) as cursor:

            def left() -> int:
                cursor.execute("SELECT count(*) FROM background_jobs")
                return sum(row[0] for row in cursor.fetchall())

            eventually(lambda: not left(), "jobs are left", seconds=processes.PATIENCE_SECONDS)
        assert outcome["ids"]
        assert len(list((tmp_path / "done").iterdir())) + len(outcome["ids"]) == 3000
