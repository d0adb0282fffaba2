"""Jobs with executor="process": what they see, how they end, and what becomes of their processes."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import databases
import process_jobs
import processes
import pytest
import running
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from waiting import eventually

from greenjobs import config, events, health, job
from greenjobs.contrib.opentelemetry import GreenjobsInstrumentor
from greenjobs.errors import ConfigError, JobFailed, JobProcessDied, JobProcessError
from greenjobs.http_server import Request
from greenjobs.processes import Origin, Processes
from greenjobs.runner import Runner, RunnerHandle

JOBS = [job for job in vars(process_jobs).values() if hasattr(job, "delay")]


@pytest.fixture(scope="module")
def url(server_url: str, migrated_template: str) -> Iterator[str]:
    with databases.fresh(server_url, template=migrated_template) as url:
        with databases.administration(url) as cursor:
            cursor.execute("CREATE TABLE notes (text text)")
        yield url


@pytest.fixture(scope="module")
def handle(url: str) -> Iterator[RunnerHandle]:
    """One runner for all tests here, so that one process, once started, serves most of them."""
    settings = {"app": "process_jobs", "job_processes": 1, "max_payload_bytes": 4 * 1024 * 1024}
    with (
        pytest.MonkeyPatch.context() as patch,
        running.application(url, **settings),
        running.started(Runner().register(*JOBS)) as handle,
    ):
        # No process that merely has to wait for the processor is given up.
        patch.setattr("greenjobs.processes._TIDY_SECONDS", processes.PATIENCE_SECONDS)
        patch.setattr("greenjobs.processes._STACK_SECONDS", processes.PATIENCE_SECONDS)
        yield handle


@pytest.fixture
def database(url: str, handle: RunnerHandle) -> Iterator[running.Database]:
    database = running.Database(url)
    yield database
    # No event of what this test leaves running is to reach the next one.
    eventually(
        lambda: not (handle.running_jobs() or handle.held_ids()), "jobs go on", seconds=processes.PATIENCE_SECONDS
    )
    database.rows("TRUNCATE background_jobs, background_history, notes")
    database.connection.close()


@pytest.fixture
def ended() -> Iterator[list[events.AttemptEnded]]:
    """What the runner is told of attempts that end."""
    seen: list[events.AttemptEnded] = []
    events.subscribe(seen.append)
    yield seen
    events.unsubscribe(seen.append)


def result(handle: Any) -> Any:
    return handle.result(timeout=processes.PATIENCE_SECONDS)


def error_of(handle: Any) -> str:
    """The last error of a job that fails for good."""
    with pytest.raises(JobFailed) as failed:
        result(handle)
    return f"{failed.value.error}: {failed.value.message}"


def wait_until_begun(handle: RunnerHandle, folder: Path) -> int:
    """Block until the one job runs in its process, which the runner has heard; returns the number of that."""
    begun = folder / "begun"
    eventually(begun.exists, "not begun", seconds=60)

    def is_heard() -> bool:
        return [getattr(attempt.elsewhere, "has_begun", False) for attempt in handle.attempts()] == [True]

    eventually(is_heard, "not heard of", seconds=60)
    return int(begun.read_text())


# --- what a job sees --------------------------------------------------------------------------------------------------


def test_job_runs_in_another_process_that_is_not_patched(database: running.Database) -> None:
    seen = result(process_jobs.look.delay("here"))
    assert seen["pid"] != os.getpid()
    assert not seen["is_patched"]


def test_arguments_and_results_arrive_as_they_are(database: running.Database) -> None:
    text = 'ü\u2028\x7f "\\' + "x" * 3_000_000
    assert result(process_jobs.look.delay(text))["text"] == text


def test_current_job_is_that_of_the_runner(database: running.Database) -> None:
    handle = process_jobs.look.delay("here")
    seen = result(handle)
    assert seen["job"] == [handle.id, "look", "default", 1]
    assert seen["context"] == "process_jobs"


def test_headers_are_there(database: running.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = process_jobs.look.options(delay=3600).delay("here")
    database.rows("""UPDATE background_jobs SET options = options || '{"headers": {"trace": "t1"}}'""")
    database.rows("UPDATE background_jobs SET run_at = now(), state = 'available'")
    assert result(handle)["headers"] == {"trace": "t1"}


def test_surroundings_of_the_application_are_entered_there(database: running.Database) -> None:
    assert result(process_jobs.look.delay("here"))["around"] == ["begun"]
    assert process_jobs.around == []


def test_span_of_an_attempt_has_the_outcome(database: running.Database, ended: list[events.AttemptEnded]) -> None:
    process_jobs.fail_once.delay()
    eventually(lambda: [each.outcome for each in ended] == ["retried", "done"], "it has not ended twice")
    assert result(process_jobs.spans_of.delay("fail_once")) == [["retried", "ERROR"], ["done", "UNSET"]]


def test_one_process_serves_one_job_after_the_other(database: running.Database) -> None:
    handles = process_jobs.look.delay_many([("a",), ("b",), ("c",)])
    assert len({result(handle)["pid"] for handle in handles}) == 1


def test_database_url_is_not_on_the_command_line(database: running.Database) -> None:
    pid = result(process_jobs.look.delay("here"))["pid"]
    assert "postgresql" not in Path(f"/proc/{pid}/cmdline").read_text()


def test_job_enqueues_from_there(database: running.Database) -> None:
    process_jobs.enqueue_another.delay("from there")
    database_rows = "SELECT result ->> 'text' FROM background_history"
    eventually(lambda: database.column(database_rows) == ["from there"], "not enqueued", seconds=60)


def test_copy_works_there(database: running.Database) -> None:
    process_jobs.copy.delay("copied")
    eventually(lambda: database.column("SELECT text FROM notes") == ["copied"], "not copied", seconds=60)


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_transaction_completes_the_job_there(database: running.Database, ended: list[events.AttemptEnded]) -> None:
    process_jobs.complete.delay("once")
    eventually(lambda: [each.outcome for each in ended] == ["done", "done"], "not done", seconds=60)
    assert database.column("SELECT text FROM notes") == ["once"]


def test_job_that_was_taken_away_writes_nothing(database: running.Database, ended: list[events.AttemptEnded]) -> None:
    process_jobs.lose.delay("never")
    eventually(lambda: [each.outcome for each in ended] == ["interrupted"], "not ended", seconds=60)
    assert database.count() == 1
    assert database.column("SELECT text FROM notes") == []


def test_transaction_completes_the_job_after_the_runner_has_got_another_session(
    database: running.Database, ended: list[events.AttemptEnded], handle: RunnerHandle, tmp_path: Path
) -> None:
    enqueued = process_jobs.complete_when_told.delay(str(tmp_path))
    eventually((tmp_path / "begun").exists, "not begun", seconds=60)
    former = handle.runner_id
    database.terminate_sessions("greenjobs session")
    database.wait_for("id = %s AND claimed_by <> %s", enqueued.id, former)
    (tmp_path / "go").touch()
    eventually(lambda: {each.outcome for each in ended if each.id == enqueued.id} == {"done"}, "not done", seconds=60)
    assert database.column("SELECT text FROM notes") == ["told"]


def test_error_is_recorded_with_its_traceback(database: running.Database) -> None:
    assert error_of(process_jobs.speak.delay("fail")) == "PartnerDown: partner is down since 7"
    (errors,) = database.column("SELECT errors FROM background_jobs")
    assert 'raise PartnerDown("partner", since=7)' in errors[0]["traceback"]
    assert errors[0]["runner"] == f"{os.uname().nodename}:{os.getpid()}"


def test_handler_gets_an_error_of_its_class(database: running.Database, ended: list[events.AttemptEnded]) -> None:
    """Also where its own constructor would not take these arguments."""
    error_of(process_jobs.speak.delay("fail"))
    error_of(process_jobs.fail_with_a_number.delay())
    first, second = [each.error for each in ended]
    assert isinstance(first, process_jobs.PartnerDown)
    assert (str(first), first.since) == ("partner is down since 7", 7)
    assert isinstance(second, KeyError)
    assert second.args == (404,)
    assert "fail_with_a_number" in str(second.__cause__)


def test_error_of_a_class_that_is_unknown_here_is_stood_for() -> None:
    from greenjobs.processes import _rebuilt

    described = {"module": "nowhere", "type": "Error", "message": "of old", "traceback": "", "args": [], "state": {}}
    error = _rebuilt(described)
    assert isinstance(error, JobProcessError)
    assert str(error) == "Error: of old"


def test_error_that_cannot_be_shown_ends_no_process(database: running.Database) -> None:
    assert error_of(process_jobs.fail_with_the_unspeakable.delay()).startswith("ValueError: ")


def test_error_whose_code_fails_is_recorded_all_the_same(database: running.Database) -> None:
    assert error_of(process_jobs.fail_obstinately.delay()).startswith("Obstinate: <")  # each Python says it otherwise


def test_policy_of_the_job_decides_there(database: running.Database, ended: list[events.AttemptEnded]) -> None:
    process_jobs.be_discarded.delay()
    eventually(lambda: [each.outcome for each in ended] == ["discarded"], "not discarded", seconds=60)


def test_progress_and_log_come_back(database: running.Database) -> None:
    error_of(process_jobs.speak.delay("fail"))
    progress, lines = database.rows("SELECT progress, log FROM background_jobs")[0]
    assert (progress["done"], progress["total"], progress["message"]) == (999, 1000, "on it")
    assert [(line["level"], line["message"]) for line in lines] == [("INFO", "begun")]


# --- ended from outside -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sleep", "compute", "sql"])
def test_timeout_is_raised_there(database: running.Database, how: str) -> None:
    handle = process_jobs.take_too_long.delay(how)
    assert error_of(handle) == "JobTimeout: take_too_long ran for more than 0.3 s"


def test_timeout_reaches_a_job_that_went_to_sleep_just_when_it_came(database: running.Database) -> None:
    error = error_of(process_jobs.sleep_through_the_first_signal.delay())
    assert error == "JobTimeout: sleep_through_the_first_signal ran for more than 0.3 s"


def test_statement_of_a_job_that_timed_out_is_cancelled(database: running.Database) -> None:
    error_of(process_jobs.take_too_long.delay("sql"))
    statements = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND query LIKE 'SELECT pg_sleep%%' AND state = 'active'"
    )
    eventually(lambda: database.value(statements) == 0, "the statement goes on", seconds=60)


def test_timeout_that_comes_too_late_is_nobody_elses(database: running.Database, handle: RunnerHandle) -> None:
    result(process_jobs.look.delay("before"))
    (child,) = handle._blocking._processes._children
    child._say({"do": "raise", "claim": [1, 1], "error": "JobTimeout", "text": "too late"})
    process_jobs.sleep_in_the_database.delay()
    database.wait_for("job_type = 'sleep_in_the_database' AND state <> 'failed'", count=0)
    assert database.count("state = 'failed'") == 0


def test_timeout_can_be_caught_to_end_well(database: running.Database) -> None:
    assert result(process_jobs.end_well.delay()) == "end_well ran for more than 0.3 s"


def test_job_that_does_not_obey_is_killed(database: running.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenjobs.processes._TIDY_SECONDS", 0.1)
    assert error_of(process_jobs.ignore.delay()) == "JobHardTimeout: ignore ran for more than 0.3 s"
    assert result(process_jobs.look.delay("afterwards"))["text"] == "afterwards"


def test_running_job_is_cancelled(database: running.Database, tmp_path: Path, ended: list[events.AttemptEnded]) -> None:
    handle = process_jobs.sleep.delay(str(tmp_path))
    eventually((tmp_path / "begun").exists, "not begun", seconds=60)
    assert handle.cancel() == "asked"
    eventually(lambda: [each.outcome for each in ended] == ["cancelled"], "not cancelled", seconds=60)


def test_stack_of_a_running_job_is_shown(database: running.Database, handle: RunnerHandle, tmp_path: Path) -> None:
    waiting = process_jobs.sleep.delay(str(tmp_path))
    wait_until_begun(handle, tmp_path)
    (shown,) = json.loads(health.jobs(handle, Request("/jobs", is_from_here=True)).body)["jobs"]
    assert shown["id"] == waiting.id
    assert re.search(r"process_jobs\.py:\d+ sleep$", shown["stack"][-1])
    assert waiting.cancel() == "asked"
    database.wait_for("true", count=0)  # else nobody is asked any more, and it goes on


def test_stack_of_a_job_in_a_process_that_does_not_answer_is_stood_for(
    database: running.Database, handle: RunnerHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greenjobs.processes._STACK_SECONDS", 0.1)
    waiting = process_jobs.sleep.delay(str(tmp_path))
    pid = wait_until_begun(handle, tmp_path)
    os.kill(pid, signal.SIGSTOP)
    (attempt,) = handle.attempts()
    assert attempt.lines() == [f"(in process {pid}, which prints it on SIGQUIT)"]
    os.kill(pid, signal.SIGCONT)
    assert waiting.cancel() == "asked"
    database.wait_for("true", count=0)


# --- what a job forks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("then", "status"), [("return", 0), ("exit", 3), ("raise", 1)])
def test_child_that_leaves_the_function_of_the_job_ends_there(
    database: running.Database, ended: list[events.AttemptEnded], then: str, status: int
) -> None:
    assert result(process_jobs.fork.delay(then)) == ["parent", status]
    assert [each.outcome for each in ended] == ["done"]


def test_child_can_be_terminated(database: running.Database) -> None:
    assert result(process_jobs.terminate_a_child.delay()) == -signal.SIGTERM


# --- death ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "told"), [("exit", "ended with status 7"), ("segfault", "by SIGSEGV"), ("kill", "by SIGKILL")]
)
def test_death_of_a_process_fails_only_the_attempt_in_it(
    database: running.Database, tmp_path: Path, ended: list[events.AttemptEnded], how: str, told: str
) -> None:
    process_jobs.die.delay(how, str(tmp_path))
    eventually(lambda: len(ended) == 2, "not run again", seconds=60)
    assert [each.outcome for each in ended] == ["retried", "done"]
    assert isinstance(ended[0].error, JobProcessDied)
    assert told in str(ended[0].error)
    first, second = ((tmp_path / number).read_text() for number in "12")
    assert first != second


def test_death_is_a_failed_attempt_up_to_max_retries(database: running.Database) -> None:
    assert re.fullmatch(
        r"JobProcessDied: its process \d+ ended with status 9", error_of(process_jobs.die_for_good.delay())
    )


def test_job_that_closes_the_line_to_the_runner_fails(database: running.Database) -> None:
    assert re.fullmatch(
        r"JobProcessDied: its process \d+ ended with status 1", error_of(process_jobs.close_everything.delay())
    )


def test_process_that_waits_and_is_killed_is_replaced_and_named(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    pid = result(process_jobs.look.delay("before"))["pid"]
    os.kill(pid, signal.SIGKILL)
    assert result(process_jobs.look.delay("after"))["pid"] != pid
    named = f"job process {pid} was ended by SIGKILL while it waited for a job"
    eventually(lambda: named in caplog.text, "nobody was told", seconds=running.PATIENCE_SECONDS)


def test_process_takes_no_notice_of_sigterm_whatever_the_application_has_set_up(database: running.Database) -> None:
    pid = result(process_jobs.look.delay("before"))["pid"]
    os.kill(pid, signal.SIGTERM)
    assert result(process_jobs.look.delay("after"))["pid"] == pid


def test_death_of_a_process_has_a_span_of_its_runner_in_the_trace_of_the_enqueue(
    database: running.Database, tmp_path: Path, ended: list[events.AttemptEnded]
) -> None:
    """What ran to its end there has had one there; it is not told twice."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    GreenjobsInstrumentor().instrument(tracer_provider=provider)
    try:
        process_jobs.die.delay("kill", str(tmp_path))
        eventually(lambda: len(ended) == 2, "not run again", seconds=60)
    finally:
        GreenjobsInstrumentor().uninstrument()
        provider.shutdown()
    published, processed = exporter.get_finished_spans()
    assert processed.parent is not None and published.context is not None
    assert (processed.parent.trace_id, processed.parent.span_id) == (
        published.context.trace_id,
        published.context.span_id,
    )
    assert dict(processed.attributes or {}).items() >= {"greenjobs.outcome": "retried", "greenjobs.attempt": 1}.items()
    assert "SIGKILL" in str(processed.status.description)
    assert (processed.end_time or 0) - (processed.start_time or 0) >= ended[0].run_seconds * 1e9


def test_other_jobs_of_the_runner_go_on_meanwhile(database: running.Database, tmp_path: Path) -> None:
    handle = process_jobs.sleep.delay(str(tmp_path))
    eventually((tmp_path / "begun").exists, "not begun", seconds=60)
    process_jobs.in_the_loop.delay_many([()] * 20)
    database.wait_for("job_type = 'in_the_loop'", count=0)
    assert database.state(handle.id) == "running"
    handle.cancel()
    database.wait_for("true", count=0)


def test_jobs_for_which_there_is_no_process_are_left_to_others(database: running.Database, tmp_path: Path) -> None:
    first = process_jobs.sleep.delay(str(tmp_path))
    eventually((tmp_path / "begun").exists, "not begun", seconds=60)
    process_jobs.look.delay_many([("a",), ("b",)])
    process_jobs.in_the_loop.delay_many([()] * 5)
    database.wait_for("job_type = 'in_the_loop'", count=0)
    assert database.count("state = 'available'") == 2
    first.cancel()
    database.wait_for("true", count=0)


def test_job_whose_process_dies_before_it_begins_goes_to_one_that_waits(database_url: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    settings = {"app": "process_jobs", "job_processes": 2}
    with running.application(database_url, **settings) as database, running.started(Runner().register(*JOBS)) as handle:
        for folder in folders:
            folder.mkdir()
            process_jobs.sleep_until_told.delay(str(folder))
        for folder in folders:
            eventually((folder / "begun").exists, "not begun", seconds=60)
            (folder / "go").touch()
        database.wait_for("true", count=0)
        idle = handle._blocking._processes._idle
        eventually(lambda: len(idle) == 2, "not idle", seconds=60)
        pid = idle[-1].pid
        os.kill(pid, signal.SIGSTOP)
        enqueued = process_jobs.look.delay("given to one that stands still")
        eventually(lambda: len(idle) == 1, "not given out", seconds=60)
        os.kill(pid, signal.SIGKILL)
        assert result(enqueued)["pid"] != pid


def test_process_that_is_to_end_and_does_not_is_killed(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenjobs.processes._END_SECONDS", 0.5)
    settings = {"app": "process_jobs", "job_processes": 1, "max_jobs": 1}
    with running.application(database_url, **settings) as database, running.started(Runner().register(*JOBS)):
        process_jobs.leave_a_thread.delay_many([()] * 2)
        database.wait_for("true", count=0)


# --- the life of the processes ----------------------------------------------------------------------------------------


def test_runner_without_an_application_says_what_is_missing(database_url: str) -> None:
    with running.application(database_url):

        @job(executor="process")
        def work() -> None: ...

        with pytest.raises(ConfigError, match=r"the job 'work' runs in processes .* greenjobs.configure\(app="):
            Runner().register(work).start()


APPLICATION = """
    import json, os, sys, time
    from greenjobs import job

    if "greenjobs.job_process" in sys.modules:
        if "unloadable" in os.environ:
            raise RuntimeError("not here")
        if "deaf" in os.environ:
            json.loads = None

    def say(line):
        os.write(1, f"{line}\\n".encode())  # in one piece, as others write there, too

    def note(kind):
        say(f"begun {kind} {os.getpid()}")
        if os.path.exists("sleep"):
            time.sleep(60)
        say(f"ended {kind}")

    @job(executor="process")
    def in_process():
        note("process")

    @job(executor="thread")
    def in_thread():
        note("thread")
"""

ENQUEUE = "from app import *; in_process.delay(); in_thread.delay()"


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_killed_runner_takes_its_processes_along_and_its_jobs_run_again(database_url: str, tmp_path: Path) -> None:
    processes.write_application(tmp_path, APPLICATION)
    (tmp_path / "sleep").touch()
    processes.run("python", "-c", ENQUEUE, folder=tmp_path, database_url=database_url)
    with processes.runner(tmp_path, database_url, "--job-processes", "2") as runner:
        pid = int(runner.wait_for_line(r"begun process (\d+)")[1])
        runner.wait_for_line("begun thread")
        runner.kill()
    eventually(lambda: has_ended(pid), "the process of the job outlives its runner", seconds=60)
    (tmp_path / "sleep").unlink()
    output = processes.run("greenjobs", "run", "--until-empty", folder=tmp_path, database_url=database_url)
    assert "ended process" in output
    assert "ended thread" in output
    with databases.administration(database_url) as cursor:
        cursor.execute("SELECT count(*) FROM background_jobs")
        assert cursor.fetchone() == (0,)


def test_runner_that_is_to_stop_gives_back_what_does_not_end(database_url: str, tmp_path: Path) -> None:
    processes.write_application(tmp_path, APPLICATION)
    (tmp_path / "sleep").touch()
    processes.run("python", "-c", ENQUEUE, folder=tmp_path, database_url=database_url)
    with processes.runner(tmp_path, database_url, "--grace", "0") as runner:
        pid = int(runner.wait_for_line(r"begun process (\d+)")[1])
        runner.wait_for_line("begun thread")
        runner.terminate()
        assert runner.wait() == 3
        assert has_ended(pid)
        assert runner.output.count("was interrupted and is given back") == 2
    with databases.administration(database_url) as cursor:
        cursor.execute("SELECT state, retries, crashes FROM background_jobs")
        assert cursor.fetchall() == [("available", 0, 0)] * 2


def test_process_that_does_not_start_fails_no_job(database_url: str, tmp_path: Path) -> None:
    processes.write_application(tmp_path, APPLICATION)
    processes.run("python", "-c", ENQUEUE, folder=tmp_path, database_url=database_url)
    with processes.runner(tmp_path, database_url, environment={"unloadable": "yes"}) as runner:
        runner.wait_for_line("RuntimeError: not here")
        runner.wait_for_line("ended with status 2 and did not come up; jobs for it wait")
        runner.wait_for_line("ended thread")
    with databases.administration(database_url) as cursor:
        cursor.execute("SELECT job_type, state, retries FROM background_jobs")
        assert cursor.fetchall() == [("in_process", "available", 0)]


def test_job_that_ends_process_after_process_before_it_begins_fails(database_url: str, tmp_path: Path) -> None:
    processes.write_application(tmp_path, APPLICATION)
    processes.run("python", "-c", ENQUEUE, folder=tmp_path, database_url=database_url)
    options = ("--job-processes", "1", "--max-retries", "0")
    with processes.runner(tmp_path, database_url, *options, environment={"deaf": "yes"}) as runner:
        runner.wait_for_line(r"JobProcessDied: its process \d+ ended with status 1 before it began, as 2 others had")
        runner.wait_for_line("ended thread")


def test_process_that_cannot_be_made_is_made_later(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("greenjobs.processes._FIRST_PAUSE_SECONDS", 0.1)
    with running.application(database_url, app="process_jobs"):
        origin = Origin("process_jobs", config.current(), database_url, "runner", [])
        made = Processes(1, origin)
        few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, most))
        try:
            made.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
        assert "no process for jobs can be made: [Errno 24] Too many open files; jobs for it wait" in caplog.text
        eventually(lambda: made.free == 1, "none was made", seconds=60)
        made.close()


PATCHED = """
    from gevent import monkey
    monkey.patch_all()

    import time
    from greenjobs import current_job, job

    @job(executor="process")
    def wait(seconds):
        current_job.progress(1, 2)
        time.sleep(seconds)
        print("waited", flush=True)
"""


def test_application_that_patches_by_itself_is_served(database_url: str, tmp_path: Path) -> None:
    processes.write_application(tmp_path, PATCHED)
    enqueue = "from app import wait; wait.delay(0.01); wait.options(timeout=0.1, max_retries=0).delay(600)"
    processes.run("python", "-c", enqueue, folder=tmp_path, database_url=database_url)
    options = ("--job-processes", "1", "--until-empty")
    output = processes.run("greenjobs", "run", *options, folder=tmp_path, database_url=database_url)
    assert "waited" in output
    assert "JobTimeout: wait ran for more than 0.1 s" in output


def test_process_that_has_finished_max_jobs_is_replaced(database_url: str) -> None:
    with running.application(database_url, app="process_jobs", job_processes=1, max_jobs=1):
        handles = process_jobs.look.delay_many([("a",), ("b",)])
        with running.started(Runner().register(process_jobs.look)):
            assert len({result(handle)["pid"] for handle in handles}) == 2
