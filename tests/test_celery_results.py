"""greenjobs.contrib.celery: results, signatures, chains and groups, and tasks that run here and now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import celeries
import processes
import pytest
import running
from celeries import row, run
from gevent.event import Event

import greenjobs
from greenjobs import jobs, testing
from greenjobs.contrib.celery import Celery, chain, chord, group, signature
from greenjobs.contrib.celery.exceptions import (
    TaskRevokedError,
    TimeoutError,
    Unsupported,
)
from greenjobs.contrib.celery.result import AsyncResult
from greenjobs.errors import NoResult, OptionError, PayloadError
from greenjobs.runner import Runner


@pytest.fixture
def quiet() -> Iterator[Celery]:
    """An application that stores nothing."""
    with celeries.alone() as app:
        yield app


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        yield database


@pytest.fixture
def app(database: running.Database) -> Iterator[Celery]:
    with celeries.alone() as app:
        yield app


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["no backend", "of the task", "of the settings"])
def test_result_that_is_ignored_is_not_kept(database: running.Database, why: str) -> None:
    app = Celery("shop", backend=None if why == "no backend" else "redis://cache")
    app.conf.task_ignore_result = why == "of the settings"

    @app.task(**({"ignore_result": True} if why == "of the task" else {}))
    def work() -> int:
        return 1

    result = work.delay()
    run(work)
    assert result.state == "PENDING"
    with pytest.raises(NoResult, match="so where a result backend is named"):
        result.get(timeout=30)
    assert database.value("SELECT count(*) FROM background_history") == 0


def test_task_that_wants_its_result_has_it_though_the_settings_ignore_results(app: Celery) -> None:
    app.conf.task_ignore_result = True

    @app.task(ignore_result=False)
    def work() -> int:
        return 1

    result = work.delay()
    run(work)
    assert result.get(timeout=30) == 1


def test_results_are_kept_as_long_as_the_settings_say(app: Celery, database: running.Database) -> None:
    app.conf.result_expires = 3600

    @app.task
    def work() -> int:
        return 1

    work.delay()
    run(work)
    seconds = "SELECT extract(epoch FROM keep_until - ended_at)::int FROM background_history"
    assert database.value(seconds) == 3600


def test_get_that_takes_too_long_raises_and_the_task_goes_on(app: Celery) -> None:
    @app.task
    def work() -> int:
        return 1

    result = work.delay()
    with pytest.raises(TimeoutError, match="has not ended in time"):
        result.get(timeout=0)
    run(work)
    assert result.get(timeout=30) == 1


def test_get_inside_a_task_is_refused(app: Celery) -> None:
    @app.task
    def work() -> None:
        AsyncResult("1").get()

    result = work.delay()
    run(work)
    with pytest.raises(RuntimeError, match="a task waits for another one"):
        result.get(timeout=30)


def test_revoked_task_never_runs(app: Celery) -> None:
    @app.task
    def work() -> None:
        raise AssertionError

    result, other = work.delay(), work.apply_async(countdown=60)
    result.revoke()
    app.control.revoke([other.id])
    run(work)
    assert (result.state, other.state) == ("REVOKED", "REVOKED")
    with pytest.raises(TaskRevokedError, match="was cancelled"):
        result.get(timeout=30)


def test_revoke_ends_a_task_that_runs_only_with_terminate(app: Celery) -> None:
    begun = Event()

    @app.task
    def work() -> None:
        begun.set()
        Event().wait()

    result = work.delay()
    with running.started(Runner().register(work.job)):
        assert begun.wait(running.PATIENCE_SECONDS)
        result.revoke()
        assert result.handle.status() == "running"
        result.revoke(terminate=True)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=running.PATIENCE_SECONDS)


def test_forgotten_result_is_gone(app: Celery, database: running.Database) -> None:
    @app.task
    def work(good: bool) -> None:
        if not good:
            raise ValueError

    results = [work.delay(True), work.delay(False), work.apply_async((True,), countdown=60)]
    run(work)
    for result in results:
        result.forget()
    assert [result.handle.status() for result in results] == ["gone", "gone", "scheduled"]


def test_id_that_is_none_is_refused(app: Celery) -> None:
    with pytest.raises(OptionError, match="'7f0c-11' is not the id of a task: in greenjobs they are whole numbers"):
        AsyncResult("7f0c-11")
    for id in ("9" * 20, "0", "-1", ""):
        with pytest.raises(OptionError, match="is not the id of a task"):
            AsyncResult(id)
    assert app.AsyncResult(5).id == "5"
    assert AsyncResult("4711").state == "PENDING"


def test_result_says_when_the_task_ended(app: Celery) -> None:
    @app.task
    def divide(by: int) -> float:
        return 1 / by

    before = datetime.now(timezone.utc)
    ended = [divide.delay(1), divide.delay(0)]
    waits = divide.apply_async((1,), countdown=3600)
    run(divide)
    for result in ended:
        assert before < result.date_done <= datetime.now(timezone.utc)
    assert waits.date_done is None and divide.apply((1,)).date_done is None


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda app, task: task.delay().children, "AsyncResult.children is not in greenjobs; .*parent"),
        (lambda app, task: task.delay().then(print), "AsyncResult.then is not in greenjobs; use link"),
        (lambda app, task: app.connection(), "Celery.connection is not in greenjobs; .*greenjobs.connection"),
        (lambda app, task: app.steps["worker"].add(), "Celery.steps is not in greenjobs; .*bootsteps"),
        (lambda app, task: task.push_request(), "look.push_request is not in greenjobs; in tests, use task.apply"),
    ],
)
def test_attribute_that_is_only_celerys_says_what_to_write(app: Celery, look: Any, message: str) -> None:
    @app.task(name="look")
    def look_at() -> None: ...

    with pytest.raises(Unsupported, match=message.replace("look.push", "look_at.push")):
        look(app, look_at)
    assert not hasattr(look_at.delay(), "children") and getattr(app, "backend", None) is None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        app.nonsense  # noqa: B018


@pytest.mark.parametrize("where", ["settings", "task"])
def test_started_is_told_where_the_settings_or_the_task_say_so(app: Celery, where: str) -> None:
    app.conf.task_track_started = where == "settings"

    @app.task(bind=True, **({"track_started": True} if where == "task" else {}))
    def work(self: Any) -> str:
        return AsyncResult(self.request.id, app=app).state

    result = work.delay()
    run(work)
    assert result.get(timeout=30) == "STARTED"


# --- signatures -------------------------------------------------------------------------------------------------------


def calculator(app: Celery) -> tuple[Any, Any]:
    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    @app.task
    def times(a: int, b: int) -> int:
        return a * b

    return add, times


def test_signature_is_a_call_that_is_made_later(app: Celery, database: running.Database) -> None:
    add, _ = calculator(app)
    result = add.s(2).set(countdown=60, queue="slow").delay(1)
    assert row(database, result.id)[:4] == ("slow", 0, "scheduled", {"a": 1, "b": 2})
    stored = json.loads(json.dumps(add.si(1, b=2)))
    assert row(database, signature(stored).apply_async((99,)).id)[3] == {"a": 1, "b": 2}  # immutable
    assert signature(stored)() == 3
    assert signature(add.name, (1, 2))() == add.s(1)(2) == 3
    assert repr(add.s(1, b=2)) == f"{add.name}(1, b=2)"


def test_chain_hands_each_result_to_the_next(app: Celery) -> None:
    add, times = calculator(app)
    result = (add.s(1, 2) | times.s(10) | add.si(0, 5) | times.s(3)).delay()
    assert result.state == "PENDING"
    run(add, times)
    assert result.get(timeout=30) == 15
    assert result.parent is not None and result.parent.parent is not None
    assert result.parent.get(timeout=30) == 5 and result.parent.parent.get(timeout=30) == 30
    assert AsyncResult(result.id).get(timeout=30) == 15  # known by its id from the beginning


def test_tasks_of_a_chain_wait_for_the_one_before(app: Celery, database: running.Database) -> None:
    add, times = calculator(app)
    chain(add.s(1, 2), times.s(10)).apply_async(countdown=0.01)
    run(times)
    assert database.count("state = 'scheduled' AND data = '{}' AND run_at > now() + interval '300 days'") == 1


def test_chain_goes_on_when_a_task_that_failed_is_retried_by_hand(app: Celery) -> None:
    broken = [True]

    @app.task
    def fetch() -> int:
        if broken:
            raise OSError("away")
        return 2

    _, times = calculator(app)
    result = chain(fetch.s(), times.s(10)).delay()
    run(fetch, times)
    with pytest.raises(OSError, match="away"):
        result.get(timeout=30)
    broken.clear()
    jobs.retry(int(result.parent.id))
    run(fetch, times)
    assert result.get(timeout=30) == 20


def test_chain_ends_before_a_task_that_was_revoked(app: Celery, database: running.Database) -> None:
    add, times = calculator(app)
    result = chain(add.s(1, 2), times.s(10), times.s(10)).delay()
    result.parent.revoke()
    run(add, times)
    assert (result.parent.parent.state, result.parent.state) == ("SUCCESS", "REVOKED")
    assert database.count("state = 'scheduled'") == 1


def test_task_completes_together_with_the_enqueue_of_the_next(app: Celery, database: running.Database) -> None:
    """What the next one cannot take fails the task that returned it, and nothing is enqueued."""

    @app.task
    def make() -> Any:
        return object()

    _, times = calculator(app)
    result = chain(make.s(), times.s(10)).delay()
    run(make, times)
    assert result.parent.state == "FAILURE" and result.state == "PENDING"
    assert result.parent.traceback is not None and "PayloadError" in result.parent.traceback


def test_linked_call_follows_with_the_result(app: Celery, database: running.Database) -> None:
    add, times = calculator(app)
    add.apply_async((1, 2), link=[times.s(10), times.s(100) | add.s(1)])
    run(add, times)
    results = database.column("SELECT result FROM background_history WHERE NOT data ? 'none' ORDER BY id")
    assert sorted(results) == [3, 30, 300, 301]


def test_chain_that_could_not_go_on_is_refused_and_nothing_is_enqueued(app: Celery, database: running.Database) -> None:
    add, times = calculator(app)
    with pytest.raises(TypeError, match="cannot follow another task, whose result comes first"):
        chain(add.s(1, 2), times.s(1, 2)).delay()
    with pytest.raises(PayloadError, match="are carried as plain JSON"):
        chain(add.s(1, 2), times.s(datetime.now(timezone.utc))).delay()
    with pytest.raises(ValueError, match="a chain without tasks"):
        chain().delay()
    with pytest.raises(Unsupported, match=r"group has group\(.*; allowed: signatures and chains"):
        group(group(add.s(1, 2)))
    with pytest.raises(OptionError, match="has no option 'countdwn'"):
        chain(add.s(1, 2), times.s(1).set(countdwn=1)).delay()
    assert database.count() == 0


def test_group_is_enqueued_and_waited_for(app: Celery) -> None:
    add, _ = calculator(app)
    results = group(add.s(n) for n in range(3)).delay(10)
    assert len(results) == 3 and results.waiting() and not results.ready()
    run(add)
    assert results.get(timeout=30) == [10, 11, 12]
    assert results.successful() and results.completed_count() == 3 and not results.failed()


@pytest.mark.parametrize(
    "write",
    [
        lambda add: chord([add.s(1)])(add.s(2)),
        lambda add: group(add.s(1, 1)) | add.s(2),
        lambda add: chain(group(add.s(1, 1)), add.s(2)),
        lambda add: add.s(1, 2).on_error(add.s(1)),
        lambda add: add.map([1]),
        lambda add: add.chunks([1], 2),
    ],
)
def test_what_is_not_in_greenjobs_says_what_to_write(quiet: Celery, write: Callable[[Any], Any]) -> None:
    add, _ = calculator(quiet)
    with pytest.raises(Unsupported, match=r"not in greenjobs.*(current_job\.transaction|on_failure|delay_many)"):
        write(add)


# --- here and now -----------------------------------------------------------------------------------------------------


def test_apply_runs_here_with_its_retries(app: Celery, database: running.Database) -> None:
    @app.task(bind=True, max_retries=5)
    def work(self: Any, n: int) -> int:
        assert self.request.is_eager and not self.request.called_directly
        return n + self.request.retries if self.request.retries == 2 else self.retry(countdown=1000)

    result = work.apply((1,))
    assert (result.get(), result.state, result.ready()) == (3, "SUCCESS", True)
    assert database.count() == 0


def test_apply_keeps_the_error_unless_it_is_to_throw(quiet: Celery) -> None:
    @quiet.task
    def work() -> None:
        raise ValueError("here")

    result = work.apply()
    assert result.failed() and isinstance(result.result, ValueError) and "ValueError: here" in str(result.traceback)
    with pytest.raises(ValueError, match="here"):
        result.get()
    with pytest.raises(ValueError, match="here"):
        work.apply(throw=True)


def test_task_always_eager_runs_what_is_enqueued_here(app: Celery, database: running.Database) -> None:
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    add, times = calculator(app)
    assert add.delay(1, 2).get() == 3
    assert (add.s(1, 2) | times.s(10)).delay().get() == 30
    assert group(add.s(1, 2), times.s(2, 2)).delay().get() == [3, 4]
    with pytest.raises(PayloadError):
        add.delay(object(), 2)  # type: ignore[arg-type]
    assert database.count() == 0


@pytest.mark.parametrize(
    "enqueue",
    [
        lambda task: task.apply_async(task_id="one"),
        lambda task: task.apply_async(priority=100_000),
        lambda task: task.apply_async(headers={"number": 5}),
        lambda task: task.apply_async(link=task.s(when=datetime.now(timezone.utc))),
        lambda task: chain(task.s(), task.s(when=datetime.now(timezone.utc))).delay(),
    ],
    ids=["task_id", "priority", "headers", "link", "chain"],
)
def test_task_always_eager_refuses_what_could_not_be_enqueued(quiet: Celery, enqueue: Callable[[Any], Any]) -> None:
    """So that tests find out."""
    quiet.conf.task_always_eager = True
    seen = []

    @quiet.task
    def look(*results: Any, when: datetime | None = None) -> None:
        seen.append(when)

    with pytest.raises((Unsupported, OptionError, PayloadError)):
        enqueue(look)
    assert seen == []


# --- in tests of an application ---------------------------------------------------------------------------------------


def test_what_follows_a_task_runs_inline_in_a_test_without_a_database(quiet: Celery) -> None:
    greenjobs.configure(database_url=f"postgresql://nobody@127.0.0.1:{processes.free_port()}/none")

    @quiet.task
    def add(a: int, b: int) -> int:
        return a + b

    @quiet.task(bind=True)
    def fail(self: Any, value: int) -> None:
        raise self.retry(exc=ValueError(value))

    with testing.inline() as mode:
        result = chain(add.s(1, 2), add.s(10), add.si(5, 5)).delay()
        assert (result.get(), result.parent.get(), result.parent.parent.get()) == (10, 13, 3)
        add.apply_async((1, 2), link=add.s(20))
        broken = chain(add.s(1, 1), fail.s(), add.s(1)).delay()
        with pytest.raises(PayloadError):
            add.apply_async((1, 2), link=add.s(datetime.now(timezone.utc)))
    ran = [(each.job_type, each.value) for each in mode.ran]
    values = [("add", value) for value in (3, 13, 10, 3, 23, 2)]
    assert ran == [(f"{add.__module__}.{name}", value) for name, value in (*values, ("fail", None))]
    assert broken.state == "PENDING"


def test_what_follows_a_task_is_drained_in_a_test(app: Celery, database: running.Database) -> None:
    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    with testing.rolled_back():
        result = chain(add.s(1, 2), add.s(10)).delay()
        testing.drain()
        assert result.get(timeout=0) == 13
    assert database.count() == 0
