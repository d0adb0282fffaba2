"""The fixtures and the marker, in suites as users write them: in processes of their own, which nothing has patched."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import processes
import pytest

APPLICATION = """
import sys
from greenjobs import current_job, job

seen = []

@job(queue="emails", max_retries=0)
def send(to, subject="Hello"):
    if to == "nobody":
        raise ValueError("nobody is there")
    seen.append((to, bool(current_job)))
"""


def run_suite(
    folder: Path, tests: str, *, database_url: str | None = None, status: int = 0, options: tuple[str, ...] = ()
) -> str:
    """Run these tests with warnings as errors; returns what pytest printed."""
    processes.write_application(folder, APPLICATION)
    processes.write_application(folder, tests, name="test_app.py")
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\naddopts = --strict-markers -p no:anyio\n")
    command = ("python", "-m", "pytest", "-p", "no:cacheprovider", "-v", *options)
    return processes.run(*command, folder=folder, database_url=database_url, status=status)


def test_pytest_finds_the_plugin_by_itself() -> None:
    (found,) = entry_points(group="pytest11", name="greenjobs")
    assert found.value == "greenjobs.pytest_plugin"


def test_plugin_brings_nothing_heavy_and_patches_nothing(tmp_path: Path) -> None:
    tests = """
    import sys

    def test_nothing_is_loaded(pytestconfig):
        assert pytestconfig.pluginmanager.has_plugin("greenjobs")
        assert "greenjobs.pytest_plugin" in sys.modules
        assert not {"gevent", "psycopg2", "greenjobs.testing", "greenjobs.storage", "flask"} & set(sys.modules)
    """
    assert "1 passed" in run_suite(tmp_path, tests)


def test_greenjobs_does_not_need_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import greenjobs.testing; print('gevent' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "False\n"


def test_marker_and_fixtures_are_documented_where_pytest_lists_them(tmp_path: Path) -> None:
    output = run_suite(tmp_path, "", options=("--markers",))
    assert "@pytest.mark.greenjobs(mode, **options)" in output
    output = run_suite(tmp_path, "", options=("--fixtures",))
    for name in ("greenjobs_inline", "greenjobs_recorded", "greenjobs_connection", "greenjobs_database"):
        assert name in output
    assert "greenjobs_drain" in output


def test_fixtures_without_a_database(tmp_path: Path) -> None:
    tests = """
    import pytest
    from app import seen, send
    from greenjobs import testing

    @pytest.fixture(autouse=True)
    def forget():
        seen.clear()

    def test_inline(greenjobs_inline):
        send.delay("ann")
        assert seen == [("ann", True)]
        assert [ran.outcome for ran in greenjobs_inline.ran] == ["done"]
        with pytest.raises(ValueError):
            send.delay("nobody")

    def test_recorded(greenjobs_recorded):
        send.delay("ann")
        assert seen == []
        assert [job.args for job in greenjobs_recorded.jobs] == [{"to": "ann"}]
        testing.assert_enqueued(send, to="ann", queue="emails")

    @pytest.mark.greenjobs("inline")
    def test_marked_inline():
        send.delay("ann")
        assert seen == [("ann", True)]

    @pytest.mark.greenjobs(mode="inline", raise_errors=False)
    def test_marked_with_options(greenjobs_inline):
        send.delay("nobody")
        assert greenjobs_inline.ran[0].outcome == "failed"

    @pytest.mark.greenjobs("recording")
    class TestMarked:
        @pytest.fixture
        def order(self):
            return send.delay("ann")

        def test_fixtures_of_the_test_are_in_the_mode(self, order):
            testing.assert_enqueued(send, "ann")

        @pytest.mark.parametrize("name", ["ann", "bob"])
        def test_each_parameter_has_its_own(self, name):
            send.delay(name)
            testing.assert_enqueued(send, name, count=1)
            assert len(testing.enqueued_jobs()) == 1

        @pytest.mark.greenjobs("inline")
        def test_closest_marker_counts(self):
            send.delay("ann")
            assert len(seen) == 1

    def test_nothing_is_left():
        from greenjobs import current
        assert current.stage is None
    """
    assert "9 passed" in run_suite(tmp_path, tests)


def test_unittest_classes_can_be_marked(tmp_path: Path) -> None:
    tests = """
    import unittest
    import pytest
    from app import seen, send

    @pytest.mark.greenjobs("inline")
    class TestOrders(unittest.TestCase):
        def setUp(self):
            send.delay("ann")

        def test_ran(self):
            self.assertEqual(seen, [("ann", True)])
    """
    assert "1 passed" in run_suite(tmp_path, tests)


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("greenjobs", "the mode of the marker greenjobs is missing; allowed: inline, recording, database"),
        ("greenjobs('outline')", "the mode of the marker greenjobs is 'outline'; allowed"),
        ("greenjobs('inline', mode='recording')", "the mode of the marker greenjobs is 'inline', 'recording'; allowed"),
    ],
)
def test_marker_that_says_nothing_sensible_is_an_error(tmp_path: Path, marker: str, message: str) -> None:
    tests = f"""
    import pytest

    @pytest.mark.{marker}
    def test_marked(): ...
    """
    output = run_suite(tmp_path, tests, status=1)
    assert "1 error" in output
    assert message in output


DATABASE_TESTS = """
import sys
import threading
import pytest
from app import seen, send
from greenjobs import jobs, testing

@pytest.fixture(autouse=True)
def forget():
    seen.clear()

@pytest.fixture(autouse=True, params=["first", "second"])
def begins_empty(greenjobs_database):
    with greenjobs_database.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM background_jobs")
        assert cursor.fetchone() == (0,)

def test_drain(greenjobs_drain):
    send.delay("ann")
    testing.assert_enqueued(send, "ann")
    assert [ran.outcome for ran in greenjobs_drain()] == ["done"]
    assert seen == [("ann", True)]
    testing.assert_not_enqueued(send)

@pytest.mark.greenjobs("database")
def test_failures_are_raised():
    send.delay("nobody")
    with pytest.raises(ValueError):
        testing.drain()
    assert [job.state for job in jobs.find()] == ["failed"]

def test_threads_of_a_live_server_join_the_transaction(greenjobs_drain):
    threads = [threading.Thread(target=send.delay, args=(str(number),)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(greenjobs_drain()) == 20

def test_no_gevent_is_needed(greenjobs_drain):
    assert "gevent" not in sys.modules
"""


def test_fixtures_with_a_database(tmp_path: Path, database_url: str) -> None:
    assert "8 passed" in run_suite(tmp_path, DATABASE_TESTS, database_url=database_url)


def test_connection_is_whatever_the_suite_says(tmp_path: Path, database_url: str) -> None:
    """Such as the one behind the session of SQLAlchemy that its tests share; and no URL is configured then."""
    overridden = f"""
import psycopg2

@pytest.fixture
def greenjobs_connection():
    connection = psycopg2.connect({database_url!r})
    yield connection
    connection.rollback()
    connection.close()
"""
    assert "8 passed" in run_suite(tmp_path, DATABASE_TESTS + overridden)


def test_assertions_fail_in_the_line_of_the_test(tmp_path: Path) -> None:
    tests = """
    from app import send
    from greenjobs import testing

    def test_it(greenjobs_recorded):
        send.delay("bob")
        testing.assert_enqueued(send, "ann")
    """
    output = run_suite(tmp_path, tests, status=1)
    assert "E       AssertionError: send(to='ann') was expected, and was not enqueued." in output
    assert "E         send(to='bob')  queue 'emails'" in output
    assert "assertions.py" not in output


def test_suite_without_greenjobs_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text("def test_plain(): pass\n", encoding="utf-8")
    shown = {}
    for name, option in (("with", "addopts="), ("without", "addopts=-p no:greenjobs")):
        output = processes.run(
            *("python", "-m", "pytest", "-p", "no:cacheprovider", "-q", "--setup-show", "-o", option),
            folder=tmp_path,
        )
        shown[name] = [line for line in output.splitlines() if " passed in " not in line]
    assert shown["with"] == shown["without"]
