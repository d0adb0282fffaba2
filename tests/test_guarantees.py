"""The guarantees of the README. The docstring of a test is the sentence that it holds true, word by word.

Everything runs in processes of its own: runners are `greenjobs run`, jobs are enqueued by a plain `python`, in which
gevent patches nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import databases
import processes
import pytest
from processes import Process
from waiting import eventually

APPLICATION = """
    import os, signal, time
    import gevent.monkey, psycopg2
    from greenjobs import config, current_job, job

    def write(what):
        connection = psycopg2.connect(config.current().require_database_url())
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO notes VALUES (%s, %s, %s)", (current_job.id, what, os.getpid()))
        connection.close()

    @job
    def note(what):
        write(what)

    @job
    def wait_at_gate(what):
        write(f"{what} began")
        while not os.path.exists("gate"):
            time.sleep(0.01)
        write(f"{what} ended")

    @job
    def block_the_event_loop():
        write("began")
        while not os.path.exists("gate"):
            gevent.monkey.get_original("time", "sleep")(0.01)
        write("ended")

    @job(queue="others")
    def note_elsewhere(what):
        write(what)

    @job
    def kill_the_runner():
        os.kill(os.getpid(), signal.SIGKILL)

    @job(max_retries=2)
    def fail():
        write("tried")
        raise ValueError(f"attempt {current_job.attempt}")

    @job(unique=True)
    def note_once(what):
        write(what)

    @job
    def transfer(*places_to_die_at):
        die_once("before", places_to_die_at)
        with current_job.transaction() as connection, connection.cursor() as cursor:
            cursor.execute("INSERT INTO notes VALUES (%s, 'transfer', %s)", (current_job.id, os.getpid()))
            note.delay("receipt")
            die_once("inside", places_to_die_at)
        die_once("after", places_to_die_at)

    def die_once(place, places):
        if place in places and not os.path.exists(place):
            open(place, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

    @job
    def wait_without_a_database(name):
        open(name, "w").close()
        while not os.path.exists("gate"):
            time.sleep(0.05)
"""


class Site:
    """An application in a folder, with a database; its jobs write notes: (job, what, pid)."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.folder = folder
        self.database_url = database_url
        processes.write_application(folder, APPLICATION)
        self.execute("CREATE TABLE notes (job bigint, what text, pid int)")

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        with databases.administration(self.database_url) as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def column(self, sql: str) -> list[Any]:
        return [row[0] for row in self.execute(sql)]

    def notes(self) -> list[str]:
        return self.column("SELECT what FROM notes ORDER BY what")

    def jobs(self, condition: str = "true") -> int:
        return int(self.column(f"SELECT count(*) FROM background_jobs WHERE {condition}")[0])

    def enqueue(self, *statements: str) -> str:
        """Run statements, in which the jobs of the application are known by name, in a plain Python; its output."""
        code = "\n".join(["from app import *", *statements])
        return processes.run("python", "-c", code, folder=self.folder, database_url=self.database_url)

    def runner(self, *arguments: str) -> contextlib.AbstractContextManager[Process]:
        """A runner that is up."""
        return processes.runner(self.folder, self.database_url, *arguments)

    def start_runner(self, *arguments: str) -> contextlib.AbstractContextManager[Process]:
        """A runner that may die before it says that it is up."""
        return processes.start("greenjobs", "run", *arguments, folder=self.folder, database_url=self.database_url)

    def work_off(self, *arguments: str) -> str:
        """Run what can run now."""
        command = ("greenjobs", "run", "--until-empty", *arguments)
        return processes.run(*command, folder=self.folder, database_url=self.database_url)

    def open_gate(self) -> None:
        (self.folder / "gate").touch()

    def wait_for_notes(self, *what: str) -> None:
        eventually(lambda: set(what) <= set(self.notes()), f"no notes {what}", seconds=processes.PATIENCE_SECONDS)

    def wait_until_no_jobs_are_left(self) -> None:
        eventually(lambda: not self.jobs(), "there still are jobs", seconds=processes.PATIENCE_SECONDS)


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Site:
    return Site(tmp_path, database_url)


def test_jobs_of_a_killed_runner_are_run_by_one_that_starts_later(site: Site) -> None:
    """Every committed job runs at least once."""
    names = [f"job {number:02}" for number in range(12)]
    site.enqueue(*[f"wait_at_gate.delay({name!r})" for name in names])
    with site.runner("--pool", "5") as runner:
        eventually(lambda: len(site.notes()) == 5, "not five at once", seconds=processes.PATIENCE_SECONDS)
        runner.kill()
    assert site.jobs() == 12
    site.open_gate()
    with site.runner("--pool", "5"):
        site.wait_until_no_jobs_are_left()
    assert {note for note in site.notes() if note.endswith("ended")} == {f"{name} ended" for name in names}


def test_three_runners_never_run_a_job_twice(site: Site) -> None:
    """It runs exactly once unless the process or machine running it dies, or loses its database session, before the
    outcome is written.
    """
    with site.runner("--pool", "20"), site.runner("--pool", "20"), site.runner("--pool", "20"):
        site.enqueue("note.delay_many([(f'{number:03}',) for number in range(300)])")
        site.wait_until_no_jobs_are_left()
    assert site.notes() == [f"{number:03}" for number in range(300)]


def test_transfer_is_made_once_wherever_its_runner_is_killed(site: Site) -> None:
    """What a job writes in a block of `current_job.transaction()`, the jobs that it enqueues there, and its own end
    happen together, exactly once.
    """
    site.enqueue("transfer.delay('before', 'inside', 'after')")
    for place in ("before", "inside", "after"):
        with site.start_runner("--max-crashes", "9") as runner:
            assert runner.wait() == -signal.SIGKILL
        assert (site.folder / place).exists()
        assert (site.jobs("job_type = 'transfer'"), site.notes()) == (
            (0, ["transfer"]) if place == "after" else (1, [])
        )
    site.work_off()
    assert site.notes() == ["receipt", "transfer"]


def test_job_shares_the_fate_of_the_transaction(site: Site) -> None:
    """A job enqueued in your transaction is there when that commits, and gone when it rolls back."""
    site.enqueue(
        "connection = psycopg2.connect(config.current().require_database_url())",
        "note.options(connection=connection).delay('rolled back')",
        "connection.rollback()",
        "note.options(connection=connection).delay('committed')",
        "connection.commit()",
    )
    assert site.jobs() == 1
    site.work_off()
    assert site.notes() == ["committed"]


def test_job_of_a_runner_that_was_killed_is_run_by_the_other(site: Site) -> None:
    """What a killed runner held is run by another one, without anybody's doing."""
    site.enqueue("wait_at_gate.delay('job')")
    with site.runner() as first:
        site.wait_for_notes("job began")
        with site.runner() as second:
            first.kill()
            began = "SELECT pid FROM notes WHERE what = 'job began'"
            eventually(lambda: set(site.column(began)) == {first.pid, second.pid}, "not begun anew", seconds=60)
            site.open_gate()
            site.wait_until_no_jobs_are_left()
            assert site.column("SELECT pid FROM notes WHERE what = 'job ended'") == [second.pid]


def test_job_that_blocks_its_runner_is_left_there(site: Site) -> None:
    """A runner that is merely busy is never taken for dead."""
    site.enqueue("block_the_event_loop.delay()")
    with site.runner("--queue", "default"):
        site.wait_for_notes("began")
        with site.runner("--queue", "others"):
            # One that looks for dead runners every second has looked, when it has run what was due in three.
            site.enqueue("note_elsewhere.options(delay=3).delay('looked')")
            site.wait_for_notes("looked")
            # Of that job alone: the other one may have to be acknowledged yet.
            assert site.column("SELECT crashes FROM background_jobs WHERE job_type LIKE 'block%'") == [0]
        site.open_gate()
        site.wait_until_no_jobs_are_left()
    assert site.notes() == ["began", "ended", "looked"]


def test_poison_job_convicts_itself_and_nobody_else(site: Site) -> None:
    """A job that kills its runner three times is failed, and those that ran beside it still run."""
    names = [f"innocent {number}" for number in range(5)]
    site.enqueue(*[f"wait_at_gate.delay({name!r})" for name in names])
    with site.start_runner() as runner:
        site.wait_for_notes(*[f"{name} began" for name in names])
        site.enqueue("kill_the_runner.delay()")
        assert runner.wait() == -signal.SIGKILL
    site.open_gate()
    for _ in range(2):
        with site.start_runner() as runner:
            assert runner.wait() == -signal.SIGKILL
    with site.runner():
        failed = "state = 'failed' AND job_type = 'kill_the_runner' AND crashes = 3"
        eventually(lambda: site.jobs(failed) == 1, "it is not failed", seconds=processes.PATIENCE_SECONDS)
        eventually(lambda: site.jobs() == 1, "an innocent is left", seconds=processes.PATIENCE_SECONDS)
    assert {f"{name} ended" for name in names} <= set(site.notes())


def test_failing_job_is_tried_three_times_with_two_retries(site: Site) -> None:
    """A job that fails is tried again `max_retries` times; then it stays as failed, with its errors."""
    site.enqueue("fail.delay()")
    for retries in (1, 2):
        site.work_off()
        # 1 minute × 2^retries, a tenth more or less.
        (delay,) = site.column("SELECT extract(epoch FROM run_at - last_retry)::float8 FROM background_jobs")
        assert delay == pytest.approx(60 * 2**retries, rel=0.1)
        assert site.jobs(f"state = 'scheduled' AND retries = {retries}") == 1
        site.execute("UPDATE background_jobs SET run_at = now()")
    site.work_off()
    site.work_off()  # which finds nothing to try any more
    assert site.notes() == ["tried"] * 3
    (errors,) = site.column("SELECT errors FROM background_jobs WHERE state = 'failed'")
    assert [(each["error"], each["message"]) for each in errors] == [
        ("ValueError", f"attempt {number}") for number in (1, 2, 3)
    ]
    assert all('raise ValueError(f"attempt {current_job.attempt}")' in each["traceback"] for each in errors)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_runner_that_gets_a_signal_drains(site: Site, number: signal.Signals) -> None:
    """A runner that is told to stop claims no more, gives back what has not started, and finishes what runs; what takes
    longer than `grace` seconds is interrupted and given back, and counts as no attempt.
    """
    site.enqueue(
        "note.delay_many([('quick',)] * 100)",  # while jobs are quick, some are claimed ahead
        "wait_at_gate.delay('slow')",
        "note.delay_many([('too late',)] * 50)",
    )
    with site.runner("--pool", "1") as runner:
        site.wait_for_notes("slow began")
        runner.send(number)
        runner.wait_for_line("claims no more")
        site.enqueue("note.options(priority=1).delay('too late')")
        site.open_gate()
        assert runner.wait() == 0
    assert site.notes() == ["quick"] * 100 + ["slow began", "slow ended"]
    assert site.jobs() == site.jobs("state = 'available' AND retries = 0 AND crashes = 0") == 51


def test_runner_that_has_no_time_to_drain_gives_back_what_it_interrupts(site: Site) -> None:
    """A runner that is told to stop claims no more, gives back what has not started, and finishes what runs; what takes
    longer than `grace` seconds is interrupted and given back, and counts as no attempt.
    """
    site.enqueue("wait_at_gate.delay('slow')")
    with site.runner("--grace", "0") as runner:
        site.wait_for_notes("slow began")
        runner.terminate()
        assert runner.wait() == 3
    assert site.jobs("state = 'available' AND retries = 0 AND crashes = 0") == 1
    site.open_gate()
    site.work_off()
    assert site.notes() == ["slow began", "slow began", "slow ended"]


def test_unique_job_that_many_enqueue_at_once_is_one(site: Site) -> None:
    """Of a unique job, no two with the same arguments wait at the same time."""
    code = """
from app import note_once
from concurrent.futures import ThreadPoolExecutor

with ThreadPoolExecutor(5) as threads:
    handles = list(threads.map(note_once.delay, ["the same"] * 50))
print(len({handle.id for handle in handles}), sum(not handle.duplicate for handle in handles))
"""
    with contextlib.ExitStack() as stack:
        where: Any = {"folder": site.folder, "database_url": site.database_url}
        enqueuers = [stack.enter_context(processes.start("python", "-c", code, **where)) for _ in range(3)]
        assert [each.wait() for each in enqueuers] == [0, 0, 0]
        assert sorted(each.output.strip() for each in enqueuers) == ["1 0", "1 0", "1 1"]
    assert site.jobs() == 1
    site.work_off()
    assert site.notes() == ["the same"]


def test_job_that_the_only_runner_does_not_know_is_left_alone(site: Site) -> None:
    """A job that no running process knows waits for one that does."""
    processes.write_application(
        site.folder,
        """
        from greenjobs import job

        @job
        def known():
            open("known has run", "w").close()
        """,
        name="elsewhere.py",
    )
    site.enqueue("note.options(priority=9).delay('unknown')", "import elsewhere; elsewhere.known.delay()")
    with site.runner("--app", "elsewhere"):
        eventually((site.folder / "known has run").exists, "the known job did not run", seconds=60)
    assert site.jobs("job_type = 'note' AND state = 'available' AND attempt = 0 AND retries = 0") == 1
    site.work_off()
    assert site.notes() == ["unknown"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("note.delay()", "TypeError"),
        ("note.delay('a', 'b')", "TypeError"),
        ("note.delay(waht='a')", "TypeError"),
        ("note.delay_many([('a',), ()])", "TypeError"),
        ("note.delay(object())", "PayloadError"),
        ("note.delay({'to': [b'a']})", "PayloadError"),
        ("note.delay(float('nan'))", "PayloadError"),
        ("note.delay('\\0')", "PayloadError"),
        ("note.delay('a' * 2**20)", "PayloadError"),
        ("note.options(delay=-1).delay('a')", "OptionError"),
        ("note.options(queue='two words').delay('a')", "OptionError"),
        ("note.options(priority=-32768).delay('a')", "OptionError"),
        ("note.options(run_at='tomorrow').delay('a')", "OptionError"),
    ],
)
def test_wrong_call_raises_where_it_is_made(site: Site, call: str, error: str) -> None:
    """A call that could not be stored or run is refused where it is made, and enqueues nothing."""
    printed = site.enqueue("try:", f"    {call}", "except Exception as error:", "    print(type(error).__name__)")
    assert (printed.strip(), site.jobs()) == (error, 0)


def test_two_hundred_running_jobs_need_five_connections(site: Site) -> None:
    """A runner uses at most five connections of its own, however many jobs it runs."""
    (site.folder / "started").mkdir()
    site.enqueue("wait_without_a_database.delay_many([(f'started/{number}',) for number in range(200)])")
    with site.runner("--pool", "200"):
        started = site.folder / "started"
        eventually(lambda: len(list(started.iterdir())) == 200, "not 200 at once", seconds=processes.PATIENCE_SECONDS)
        connections = site.column(
            "SELECT application_name FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        site.open_gate()
    assert set(connections) == {"greenjobs runner", "greenjobs session"}
    assert len(connections) <= 5


def sentences_of_the_readme() -> list[str]:
    """The items of the box, each on one line."""
    text = (processes.ROOT / "README.md").read_text(encoding="utf-8")
    box = text[text.index("> **Guarantees.**") :].partition("\n\n")[0]
    lines = re.sub(r"\n> {3}", " ", box).splitlines()
    return [line.removeprefix("> - ") for line in lines if line.startswith("> - ")]


def docstrings_of_the_tests() -> Iterator[str]:
    for name, function in vars(sys.modules[__name__]).items():
        if name.startswith("test_") and function.__doc__:
            yield " ".join(inspect.cleandoc(function.__doc__).split())


def test_every_sentence_of_the_box_has_its_test() -> None:
    assert set(sentences_of_the_readme()) == set(docstrings_of_the_tests())
