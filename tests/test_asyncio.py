"""Enqueuing from coroutines: in processes that nothing has patched, as those of asyncio are; and docs/asyncio.md."""

from __future__ import annotations

from pathlib import Path

import databases
import pages
import processes
import psycopg2
import pytest

APPLICATION = """
import asyncio, contextvars, threading
from dataclasses import dataclass
import psycopg2
import greenjobs
from greenjobs import GreenjobsError, config, job, testing
from greenjobs.errors import DatabaseUnavailable, OptionError, PayloadError

URL = config.current().database_url

@job
def note(value=None):
    return value

def rows(sql="SELECT count(*) FROM background_jobs"):
    connection = psycopg2.connect(URL)
    with connection, connection.cursor() as cursor:
        cursor.execute(sql)
        found = cursor.fetchall()
    connection.close()
    return found
"""


def run(folder: Path, code: str, database_url: str) -> None:
    """Run the code after the application, in a process of its own, with warnings as errors."""
    processes.write_application(folder, APPLICATION)
    processes.write_application(folder, "from app import *\n\n" + code, name="script.py")
    processes.run("python", "-W", "error", "script.py", folder=folder, database_url=database_url)


def test_job_is_stored_when_the_call_returns(tmp_path: Path, database_url: str) -> None:
    code = """
async def main():
    handle = await note.options(queue="other", priority=3).adelay(value=[1])
    assert rows("SELECT id, queue, priority, data FROM background_jobs") == [(handle.id, "other", 3, {"value": [1]})]
    assert [each.job_type for each in await note.adelay_many([(2,), {"value": 3}])] == ["note", "note"]
    assert await note.adelay_many([]) == []
    assert rows() == [(3,)]

asyncio.run(main())
"""
    run(tmp_path, code, database_url)


def test_event_loop_goes_on_while_the_database_does_not_answer(tmp_path: Path, database_url: str) -> None:
    """The call can only end after the loop has run on and let go of the lock that the call waits for."""
    code = """
async def until_it_waits():
    while rows("SELECT count(*) FROM pg_locks WHERE relation = 'background_jobs'::regclass AND NOT granted") == [(0,)]:
        await asyncio.sleep(0)

async def main():
    blocker = psycopg2.connect(URL)
    blocker.cursor().execute("LOCK TABLE background_jobs IN ACCESS EXCLUSIVE MODE")
    task = asyncio.create_task(note.adelay())
    await asyncio.wait_for(until_it_waits(), 30)
    assert not task.done()
    blocker.rollback()
    blocker.close()
    await task
    assert rows() == [(1,)]

asyncio.run(main())
"""
    run(tmp_path, code, database_url)


def test_many_calls_share_few_connections(tmp_path: Path, database_url: str) -> None:
    code = """
greenjobs.configure(enqueue_connections=2)

async def main():
    handles = await asyncio.gather(*(note.adelay(number) for number in range(300)))
    assert len({handle.id for handle in handles}) == 300
    ours = "datname = current_database() AND application_name = 'greenjobs'"
    sessions = rows(f"SELECT count(*) FROM pg_stat_activity WHERE {ours}")
    assert 1 <= sessions[0][0] <= 2

asyncio.run(main())
assert rows("SELECT count(DISTINCT data) FROM background_jobs") == [(300,)]
"""
    run(tmp_path, code, database_url)


def test_errors_are_those_of_delay(tmp_path: Path, database_url: str) -> None:
    code = """
async def raises(error, call):
    try:
        await call()
    except error:
        return
    raise AssertionError(error)

async def main():
    await raises(TypeError, lambda: note.adelay(1, 2))
    await raises(PayloadError, lambda: note.adelay(object()))
    await raises(PayloadError, lambda: note.adelay_many([(1,), (object(),)]))
    await raises(OptionError, lambda: note.options(connection="none").adelay())
    assert rows() == [(0,)]
    greenjobs.configure(database_url="postgresql://nobody@127.0.0.1:1/none", enqueue_timeout=5)
    await raises(DatabaseUnavailable, lambda: note.adelay())

asyncio.run(main())
"""
    run(tmp_path, code, database_url)


def test_arguments_are_those_of_the_moment_of_the_call(tmp_path: Path, database_url: str) -> None:
    code = """
async def main():
    value = ["as it was"]
    task = asyncio.ensure_future(note.adelay(value))
    await asyncio.sleep(0)
    value.append("changed")
    await task
    assert rows("SELECT data FROM background_jobs") == [({"value": ["as it was"]},)]

asyncio.run(main())
"""
    run(tmp_path, code, database_url)


def test_context_variables_and_transaction_of_the_caller(tmp_path: Path, database_url: str) -> None:
    code = """
request = contextvars.ContextVar("request")
seen = []

class Connection(psycopg2.extensions.connection):
    def cursor(self, *args, **kwargs):
        seen.append((request.get("none"), threading.current_thread() is threading.main_thread()))
        return super().cursor(*args, **kwargs)

async def main():
    connection = psycopg2.connect(URL, connection_factory=Connection)
    request.set("of the caller")
    await note.options(connection=connection).adelay()
    assert set(seen) == {("of the caller", False)}
    assert rows() == [(0,)]
    connection.commit()
    connection.close()
    assert rows() == [(1,)]

asyncio.run(main())
"""
    run(tmp_path, code, database_url)


def test_cancelled_call_leaves_its_connection_usable(tmp_path: Path, database_url: str) -> None:
    code = """
greenjobs.configure(enqueue_connections=1)

async def main():
    for _ in range(20):
        task = asyncio.ensure_future(note.adelay("cancelled"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
    await note.adelay("kept")

asyncio.run(main())
assert rows("SELECT count(*) FROM background_jobs WHERE data = '{\\"value\\": \\"kept\\"}'") == [(1,)]
"""
    run(tmp_path, code, database_url)


def test_modes_of_tests_hold(tmp_path: Path, database_url: str) -> None:
    code = """
async def main():
    with testing.inline() as mode:
        await note.adelay("inline")
    assert [ran.value for ran in mode.ran] == ["inline"]
    with testing.recording():
        await note.adelay_many([(1,), (2,)])
        testing.assert_enqueued(note, count=2)
    with testing.rolled_back():
        await note.adelay("gone")
        assert [ran.value for ran in testing.drain()] == ["gone"]
    assert rows() == [(0,)]

asyncio.run(main())
"""
    run(tmp_path, code, database_url)


def test_page_is_followed_as_it_stands(server_url: str, tmp_path: Path) -> None:
    with databases.fresh(server_url) as url:
        (printed,) = pages.follow("asyncio.md", tmp_path, url).values()
        assert "50 signed up; 2 more mails" in printed
        assert printed.count("Welcome, user ") == 50
        assert {"Hello, Ann!", "Hi, Bob!"} <= set(printed.splitlines())
        with psycopg2.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT state, count(*) FROM background_jobs GROUP BY state")
            assert cursor.fetchall() == [("scheduled", 50)]
        connection.close()


@pytest.mark.parametrize("package", ["asyncio", "ssl"])
def test_who_does_not_await_does_not_load(package: str, tmp_path: Path) -> None:
    code = f"import greenjobs, sys; assert {package!r} not in sys.modules"
    processes.run("python", "-c", code, folder=tmp_path)
