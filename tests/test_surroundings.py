"""What is entered around every attempt: in which order, for whom, and what its errors come to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
import running

from greenjobs import Discard, current_job, job, surroundings
from greenjobs.errors import ConfigError
from greenjobs.runner import Runner


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url, max_retries=0) as database:
        yield database


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(surroundings, "everywhere", [])
    return []


def noting(seen: list[Any], name: str) -> Any:
    @contextlib.contextmanager
    def surrounding() -> Iterator[None]:
        seen.append(f"{name} begins")
        try:
            yield
        except BaseException as error:
            seen.append(f"{name} hears of {type(error).__name__}")
            raise
        finally:
            seen.append(f"{name} ends")

    return surrounding


def work_off(*around: Any) -> None:
    from greenjobs.job import registered_jobs

    runner = Runner().register(*registered_jobs().values()).shutdown_when_queue_empty()
    for each in around:
        runner.surround(each)
    assert runner.start().wait_for_shutdown(running.PATIENCE_SECONDS)


def test_those_of_the_process_are_around_those_of_the_runner(database: running.Database, seen: list[Any]) -> None:
    surroundings.surround(noting(seen, "process"))

    @job
    def work() -> None:
        seen.append("job")

    work.delay()
    work_off(noting(seen, "first"), noting(seen, "second"))
    begin, end = ["process begins", "first begins", "second begins"], ["second ends", "first ends", "process ends"]
    assert seen == [*begin, "job", *end]


def test_each_attempt_has_its_own_in_its_own_greenlet(database: running.Database, seen: list[Any]) -> None:
    inside: set[int] = set()

    @contextlib.contextmanager
    def surrounding() -> Iterator[None]:
        here = (gevent.getcurrent(), current_job.id)
        yield
        assert here == (gevent.getcurrent(), current_job.id)
        seen.append(current_job.id)

    @job
    def work() -> None:
        inside.add(current_job.id)
        gevent.sleep(0.001)

    handles = work.delay_many([()] * 30)
    work_off(surrounding)
    assert sorted(seen) == sorted(inside) == sorted(handle.id for handle in handles)


def test_error_of_the_job_goes_through_and_is_its_outcome(database: running.Database, seen: list[Any]) -> None:
    @job
    def fail() -> None:
        raise LookupError("mine")

    @job
    def drop() -> None:
        raise Discard("of no use")

    failed, dropped = fail.delay(), drop.delay()
    work_off(noting(seen, "it"))
    assert {"it hears of LookupError", "it hears of Discard"} <= set(seen)
    assert (database.state(failed.id), database.state(dropped.id)) == ("failed", None)
    assert database.value("SELECT errors -> 0 ->> 'error' FROM background_jobs") == "LookupError"


def test_error_on_the_way_in_fails_the_attempt_and_ends_what_was_entered(
    database: running.Database, seen: list[Any]
) -> None:
    @contextlib.contextmanager
    def broken() -> Iterator[None]:
        raise OSError("no tenant")
        yield

    @job
    def work() -> None:
        seen.append("job")

    handle = work.delay()
    work_off(noting(seen, "outer"), broken, noting(seen, "inner"))
    assert seen == ["outer begins", "outer hears of OSError", "outer ends"]
    assert database.state(handle.id) == "failed"


@pytest.mark.parametrize("error", [OSError, SystemExit, gevent.GreenletExit])
def test_error_on_the_way_out_is_logged_and_loses_no_outcome(
    database: running.Database, seen: list[Any], caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    @contextlib.contextmanager
    def broken() -> Iterator[None]:
        try:
            yield
        finally:
            raise error("cannot tidy up")

    @job
    def work() -> None: ...

    @job
    def fail() -> None:
        raise LookupError("mine")

    done, failed = work.delay(), fail.delay()
    work_off(noting(seen, "outer"), broken)
    assert (database.state(done.id), database.state(failed.id)) == (None, "failed")
    assert database.value("SELECT errors -> 0 ->> 'error' FROM background_jobs") == "LookupError"
    assert seen.count("outer ends") == 2
    reports = [record for record in caplog.records if record.name == surroundings.__name__]
    assert [record.levelno for record in reports] == [logging.ERROR] * 2
    assert f"job {done.id} (work)" in caplog.text and "cannot tidy up" in caplog.text


def test_error_cannot_be_suppressed(database: running.Database, seen: list[Any]) -> None:
    @job
    def fail() -> None:
        raise LookupError("mine")

    handle = fail.delay()
    work_off(lambda: contextlib.suppress(LookupError))
    assert database.state(handle.id) == "failed"


def test_way_out_counts_for_the_hard_timeout(database: running.Database, seen: list[Any]) -> None:
    @contextlib.contextmanager
    def slow() -> Iterator[None]:
        yield
        gevent.sleep(running.PATIENCE_SECONDS)

    @job(hard_timeout=0.1)
    def work() -> None: ...

    handle = work.delay()
    work_off(noting(seen, "outer"), slow)
    assert seen[-1] == "outer ends"
    assert database.state(handle.id) == "failed"


def test_what_cannot_be_called_is_refused(database: running.Database) -> None:
    with pytest.raises(ConfigError, match="a callable that returns a context manager, not 5"):
        Runner().surround(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a callable that returns a context manager, not 5"):
        surroundings.surround(5)  # type: ignore[type-var]
