"""The stress test in examples/, played small, as a real process: its table, its verdict, and what it leaves behind.

Where a test needs something to go wrong, it does it where things go wrong: in the tables of greenjobs, while the game
goes on.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import databases
import gevent.os
import processes
import psycopg2
import pytest
from processes import ROOT, Process
from waiting import eventually

KINDS = ("catch", "train", "heal", "battle", "explore")
COLUMNS = (*KINDS, "all")
POOLS = {"wild": 3, "training": 3, "journey": 6}  # of 12 workers

# In seconds, by the docstrings of the jobs.
SHORTEST_RUNS = {"catch": 0.2, "train": 0.5, "heal": 0.1, "battle": 0.6, "explore": 0.4}

JOBS = 60
SEED = 3

# With this, the game goes on for longer than any test looks at it.
ENDLESS = ("--jobs", "100000", "--duration", "600")

Table = dict[str, dict[str, str]]


@contextlib.contextmanager
def game(*flags: str, database_url: str | None = None, folder: Path = ROOT) -> Iterator[Process]:
    """The stress test as a process; on the embedded server of the folder unless there is a URL."""
    where = () if database_url is None else ("--database-url", database_url)
    # What the environment names must not be played on: nobody listens there.
    environment = {"PYTHONPATH": str(ROOT), "GREENJOBS_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nowhere"}
    command = ("python", "-W", "error", "-m", "examples.stress_test", *flags, *where)
    with processes.start(*command, folder=folder, environment=environment) as process:
        yield process


def end(process: Process, *, status: int = 0) -> str:
    """Wait for its end; its output."""
    assert process.wait() == status, process.output
    return process.output


def read_table(output: str) -> Table:
    """The cells by heading and column."""
    lines = output.splitlines()
    start = next(place for place, line in enumerate(lines) if tuple(line.split()) == COLUMNS)
    table = {}
    for line in lines[start + 1 :]:
        heading, *cells = re.split(r"\s{2,}", line.strip())
        if not line.strip() and "peak concurrency" in table:
            break
        table[heading] = dict(zip(COLUMNS, cells, strict=False))
    return table


def numbers(table: Table, heading: str) -> dict[str, int]:
    return {column: int(table[heading][column]) for column in COLUMNS}


def seconds(table: Table, heading: str) -> dict[str, float]:
    return {column: float(cell.removesuffix(" s")) for column, cell in table[heading].items()}


@pytest.fixture(scope="module")
def arena_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """A database with tables of greenjobs that somebody else uses."""
    with databases.fresh(server_url, template=migrated_template) as url:
        with databases.administration(url) as cursor:
            cursor.execute(
                "INSERT INTO background_jobs (job_type, data, queue) VALUES ('catch', '{}', 'wild') RETURNING id"
            )
        yield url


@pytest.fixture(scope="module")
def output(arena_url: str) -> str:
    """What a small game printed, which ended well."""
    with game("--jobs", str(JOBS), "--workers", "12", "--seed", str(SEED), database_url=arena_url) as process:
        return end(process)


@pytest.fixture(scope="module")
def table(output: str) -> Table:
    return read_table(output)


@pytest.fixture
def cursor(database_url: str) -> Iterator[psycopg2.extensions.cursor]:
    """In the schema that the game is played in."""
    with databases.administration(database_url) as cursor:
        cursor.execute("SET search_path TO greenjobs_stress")
        yield cursor


def first(cursor: psycopg2.extensions.cursor, query: str) -> tuple[object, ...] | None:
    """The first row, None while there is none, or not even a table."""
    with contextlib.suppress(psycopg2.errors.UndefinedTable):
        cursor.execute(query)
        return cursor.fetchone()
    return None


# --- the table --------------------------------------------------------------------------------------------------------


def test_verdict_of_a_good_game_is_that_no_job_was_lost_and_none_ran_twice(output: str) -> None:
    assert output.rstrip().endswith("No job was lost and none ran twice: so says the ledger in the database.")


def test_every_move_enqueues_a_job_or_is_deduplicated(table: Table) -> None:
    assert numbers(table, "enqueued")["all"] + numbers(table, "deduplicated")["all"] == JOBS


def test_only_training_is_deduplicated(table: Table) -> None:
    deduplicated = numbers(table, "deduplicated")
    assert deduplicated["train"] == deduplicated["all"]


@pytest.mark.parametrize(
    "heading",
    ["enqueued", "deduplicated", "done", "failed attempts", "retried", "awaiting retry", "given up", "not started"],
)
def test_last_column_is_the_sum_of_all_kinds(table: Table, heading: str) -> None:
    row = numbers(table, heading)
    assert row["all"] == sum(row[kind] for kind in KINDS)


@pytest.mark.parametrize("column", COLUMNS)
def test_every_enqueued_job_has_one_fate(table: Table, column: str) -> None:
    fates = ("done", "awaiting retry", "given up", "not started", "lost", "ran twice")
    assert numbers(table, "enqueued")[column] == sum(numbers(table, fate)[column] for fate in fates)


def test_every_kind_is_done_in_a_game_with_time_enough(table: Table) -> None:
    assert min(numbers(table, "done").values()) > 0


def test_every_failed_attempt_is_followed_by_another(table: Table) -> None:
    assert numbers(table, "retried") == numbers(table, "failed attempts")
    assert numbers(table, "done") == numbers(table, "enqueued")


def test_some_jobs_fail_on_purpose(table: Table) -> None:
    assert numbers(table, "failed attempts")["all"] > 0


def test_mishaps_on_purpose_are_not_logged(output: str) -> None:
    assert "Mishap" not in output


@pytest.mark.parametrize("kind", KINDS)
def test_runs_last_as_long_as_the_game_says(table: Table, kind: str) -> None:
    assert SHORTEST_RUNS[kind] <= seconds(table, "run p50")[kind] <= seconds(table, "run p95")[kind]


@pytest.mark.parametrize("column", COLUMNS)
def test_half_of_the_waits_are_no_longer_than_the_95th_percentile(table: Table, column: str) -> None:
    assert 0 <= seconds(table, "wait p50")[column] <= seconds(table, "wait p95")[column]


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_jobs_run_at_a_time_than_their_queue_allows(table: Table, kind: str) -> None:
    assert 1 <= numbers(table, "peak concurrency")[kind] <= POOLS[table["queue"][kind]]


def test_jobs_overlap(table: Table) -> None:
    assert 1 < numbers(table, "peak concurrency")["all"] <= sum(POOLS.values())


def test_rate_is_that_of_the_jobs_done(table: Table) -> None:
    rate, done = seconds(table, "jobs/s"), numbers(table, "done")
    whole = done["all"] / rate["all"]  # the seconds that the game took
    for kind in KINDS:
        assert rate[kind] == pytest.approx(done[kind] / whole, abs=0.1)


def test_healing_and_battles_go_before_exploring_in_one_queue(table: Table) -> None:
    priority, queue = table["priority"], table["queue"]
    assert queue["heal"] == queue["battle"] == queue["explore"]
    assert int(priority["heal"]) > int(priority["battle"]) > int(priority["explore"])


def test_every_queue_has_a_pool_of_its_own(table: Table) -> None:
    assert {table["queue"][kind]: int(table["at a time"][kind]) for kind in KINDS} == POOLS


# --- where it plays ---------------------------------------------------------------------------------------------------


def test_schema_is_gone_after_the_game(output: str, arena_url: str) -> None:
    with databases.administration(arena_url) as cursor:
        assert first(cursor, "SELECT FROM pg_namespace WHERE nspname = 'greenjobs_stress'") is None


def test_jobs_of_others_in_the_database_are_left_alone(output: str, arena_url: str) -> None:
    with databases.administration(arena_url) as cursor:
        cursor.execute("SELECT job_type, state, attempt FROM background_jobs")
        assert cursor.fetchall() == [("catch", "available", 0)]


@pytest.fixture
def project() -> Iterator[Path]:
    """A folder of a project; not below pytest's, which the account of an embedded server of root's cannot reach."""
    folder = Path(tempfile.mkdtemp(prefix="greenjobs-stress-")).resolve()
    folder.chmod(0o755)
    yield folder
    lock = folder / ".greenjobs" / "stress" / "guard.lock"
    eventually(lambda: not is_held(lock), "the embedded server goes on without users", seconds=60)
    shutil.rmtree(folder)


def is_held(lock: Path) -> bool:
    import fcntl

    with lock.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_without_a_url_it_plays_twice_on_the_embedded_server_the_same_game_each_time(
    project: Path, table: Table
) -> None:
    """The same, as the seed is: also the same as on another database."""
    for _ in range(2):
        with game("--jobs", str(JOBS), "--workers", "24", "--seed", str(SEED), folder=project) as process:
            again = read_table(end(process))
        assert (project / ".greenjobs" / "stress" / "data").is_dir()
        assert moves_by_kind(again) == moves_by_kind(table)


def moves_by_kind(table: Table) -> dict[str, int]:
    enqueued, deduplicated = numbers(table, "enqueued"), numbers(table, "deduplicated")
    return {kind: enqueued[kind] + deduplicated[kind] for kind in KINDS}


def test_second_game_in_the_same_database_is_refused_while_the_first_goes_on(database_url: str) -> None:
    with game(*ENDLESS, database_url=database_url) as going_on:
        going_on.wait_for_line("running")
        with game(database_url=database_url) as second:
            assert "another stress test is running in this database" in end(second, status=2)
        going_on.send(signal.SIGINT)
        assert "No job was lost" in end(going_on)


def test_game_after_one_that_was_killed_begins_anew(database_url: str, cursor: psycopg2.extensions.cursor) -> None:
    with game(*ENDLESS, database_url=database_url) as killed:
        killed.wait_for_line("[1-9]\\d* enqueued")
        killed.kill()
    eventually(
        lambda: not first(cursor, "SELECT FROM pg_stat_activity WHERE application_name = 'greenjobs stress test'"),
        "the server goes on with the session of a process that is gone",
    )
    with game("--jobs", "6", database_url=database_url) as process:
        table = read_table(end(process))
    assert numbers(table, "enqueued")["all"] + numbers(table, "deduplicated")["all"] == 6


def test_schema_of_that_name_that_somebody_else_made_is_left_alone(
    database_url: str, cursor: psycopg2.extensions.cursor
) -> None:
    cursor.execute("CREATE SCHEMA greenjobs_stress CREATE TABLE precious ()")
    with game(database_url=database_url) as process:
        assert "a schema greenjobs_stress that the stress test did not make" in end(process, status=2)
    assert first(cursor, "SELECT FROM pg_tables WHERE tablename = 'precious'") == ()


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_exit_status_is_1_when_a_job_was_lost(database_url: str, cursor: psycopg2.extensions.cursor) -> None:
    with game(*ENDLESS, database_url=database_url) as process:
        lost = eventually(
            lambda: first(
                cursor,
                """
                DELETE FROM background_jobs
                WHERE id = (
                    SELECT max(id)
                    FROM background_jobs
                    WHERE state = 'available'
                )
                    AND state = 'available'  -- still, once a claim that had it locked is through
                RETURNING id
                """,
            ),
            "no job waits",
        )
        process.send(signal.SIGINT)
        output = end(process, status=1)
    assert f"LOST: job {lost[0]}\n" in output
    assert numbers(read_table(output), "lost")["all"] == 1


def test_exit_status_is_1_when_a_job_ran_twice(database_url: str, cursor: psycopg2.extensions.cursor) -> None:
    with game(*ENDLESS, database_url=database_url) as process:
        done = eventually(
            lambda: first(
                cursor,
                """
                SELECT job_id
                FROM ledger_runs
                WHERE kind = 'heal'
                    AND outcome = 'done'
                    AND job_id NOT IN (SELECT id FROM background_jobs)
                """,
            ),
            "no job is done",
        )
        cursor.execute(
            """
            INSERT INTO background_jobs (id, job_type, data, queue, priority)
            VALUES (%s, 'heal', '{"player": "Ada", "monsters": ["Dewdrake"], "turn": 1}', 'journey', 100)
            """,
            done,
        )
        eventually(
            lambda: (
                first(cursor, f"SELECT WHERE (SELECT count(*) FROM ledger_runs WHERE job_id = {done[0]}) > 1")
                is not None
            ),
            "the job does not run again",
        )
        process.send(signal.SIGINT)
        output = end(process, status=1)
    assert f"RAN TWICE: job {done[0]}\n" in output
    assert numbers(read_table(output), "ran twice")["heal"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_game_with_the_table(database_url: str, number: int) -> None:
    with game(*ENDLESS, database_url=database_url) as process:
        process.wait_for_line("[1-9]\\d* done")
        process.send(number)
        table = read_table(end(process))
    assert numbers(table, "done")["all"] > 0


def test_second_signal_interrupts_what_runs_and_nothing_is_lost(database_url: str) -> None:
    with game(*ENDLESS, database_url=database_url) as process:
        process.wait_for_line("12 running")
        process.send(signal.SIGINT)
        process.send(signal.SIGTERM)  # another one, as two of the same may arrive as one
        output = end(process)
    assert "was interrupted and is given back" in output
    assert "No job was lost" in output


def test_what_has_not_started_when_the_time_is_up_is_not_lost(database_url: str) -> None:
    with game("--jobs", "100000", "--duration", "2", "--workers", "3", database_url=database_url) as process:
        table = read_table(end(process))
    assert numbers(table, "not started")["all"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jobs", "0"], "Invalid value for '--jobs': 0 is not in the range 1<=x<=1000000."),
        (["--jobs", "many"], "Invalid value for '--jobs': 'many' is not a valid integer range."),
        (["--workers", "2"], "Invalid value for '--workers': 2 is not in the range 3<=x<=1000."),
        (["--duration", "0"], "Invalid value for '--duration': 0 is not in the range 1<=x<=3600."),
        (["--seed", "lucky"], "Invalid value for '--seed': 'lucky' is not a valid integer."),
        (["--monsters"], "No such option"),
        (["--database-url", "mysql://here"], "database_url is 'mysql://here' (an argument); the value must be"),
        (["--database-url", "postgresql://127.0.0.1:1/x"], "cannot connect to postgresql://127.0.0.1:1/x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flag_is_refused_by_name(flags: list[str], message: str) -> None:
    with game(*flags) as process:
        output = end(process, status=2)
    assert message in output
    assert "Traceback" not in output


# --- what it shows meanwhile ------------------------------------------------------------------------------------------


def test_not_on_a_terminal_it_prints_lines_without_control_characters(output: str) -> None:
    assert re.search(r"^ *\d+\.\d s: \d+ enqueued, \d+ deduplicated, \d+ running, ", output, re.MULTILINE)
    assert "\x1b" not in output


def test_quiet_game_prints_the_table_only(database_url: str) -> None:
    with game("--jobs", "6", "--quiet", database_url=database_url) as process:
        output = end(process)
    assert tuple(output.split()[: len(COLUMNS)]) == COLUMNS


def test_on_a_terminal_it_draws_a_picture_and_then_the_table(database_url: str) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "examples.stress_test", "--jobs", "6", "--database-url", database_url]
    environment = processes.make_environment(more={"TERM": "xterm", "COLUMNS": "80", "LINES": "24"})
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", read_until_closed(ours))
            assert process.wait() == 0, shown
        finally:
            process.kill()
            os.close(ours)
    picture, _, table = shown.partition("peak concurrency")
    assert re.search(r"job +queue +done +running +waiting", picture)
    assert "No job was lost" in table


def read_until_closed(fd: int) -> str:
    os.set_blocking(fd, False)
    read = b""
    with gevent.Timeout(processes.PATIENCE_SECONDS), contextlib.suppress(OSError):  # EIO: the other end is closed
        while part := gevent.os.nb_read(fd, 65536):
            read += part
    return read.decode()
