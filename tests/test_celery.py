"""greenjobs.contrib.celery: an ordinary Flask application of Celery's, of which only the imports are changed, and what
each of Celery's options, methods and settings means.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import processes
import pytest
import running

from greenjobs import config, events, jobs
from greenjobs.contrib import celery
from greenjobs.contrib.celery import Celery, chain, chord, group, shared_task, signature
from greenjobs.contrib.celery import app as celery_app
from greenjobs.contrib.celery.exceptions import (
    Ignore,
    ImproperlyConfigured,
    MaxRetriesExceededError,
    NotRegistered,
    Reject,
    Retry,
    SoftTimeLimitExceeded,
    TaskRevokedError,
    TimeoutError,
    Unsupported,
)
from greenjobs.contrib.celery.result import AsyncResult
from greenjobs.contrib.celery.schedules import crontab, schedule, solar
from greenjobs.errors import JobDefinitionError, JobFailed, NoResult, OptionError, PayloadError
from greenjobs.inspection import StoredJob
from greenjobs.job import find_job

# --- an application, as Flask's documentation has it ------------------------------------------------------------------

FACTORY = """
from celery import Celery, Task, shared_task
from celery.result import AsyncResult
from celery.schedules import crontab
from celery.utils.log import get_task_logger
from flask import Flask, current_app, jsonify, request

logger = get_task_logger(__name__)


def celery_init_app(app: Flask) -> Celery:
    class FlaskTask(Task):
        def __call__(self, *args: object, **kwargs: object) -> object:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.from_mapping(
        SHOP="the shop",
        CELERY=dict(
            broker_url="redis://localhost",
            result_backend="redis://localhost",
            task_ignore_result=True,
            task_routes={"factory.send_*": {"queue": "mail"}},
            beat_schedule={
                "sweep": {"task": "factory.sweep", "schedule": crontab(minute=0, hour=3), "args": ("floor",)},
                "often": {"task": "factory.sweep", "schedule": 1.0, "kwargs": {"what": "chimney"}},
            },
            worker_concurrency=4,
        ),
    )
    app.config.from_prefixed_env()
    celery_init_app(app)

    @app.post("/add")
    def start_add():
        result = add_together.delay(request.json["a"], request.json["b"])
        return {"result_id": result.id}

    @app.get("/result/<id>")
    def task_result(id):
        result = AsyncResult(id)
        return {
            "ready": result.ready(),
            "successful": result.successful(),
            "value": result.result if result.ready() else None,
        }

    @app.post("/mail/<to>")
    def mail(to):
        send_mail.apply_async((to,), countdown=0.1, priority=3)
        return jsonify(None)

    return app


@shared_task(ignore_result=False)
def add_together(a: int, b: int) -> int:
    return a + b


class Refused(Exception):
    pass


@shared_task(bind=True, max_retries=3, default_retry_delay=0.1)
def send_mail(self, to):
    if self.request.retries < 2:
        try:
            raise Refused("the mail server is busy")
        except Refused as exc:
            raise self.retry(exc=exc)
    print(f"{current_app.config['SHOP']} mails {to}, after {self.request.retries} retries", flush=True)


@shared_task(autoretry_for=(ConnectionError,), retry_backoff=0.01, retry_jitter=False, max_retries=1)
def flaky(seen=[]):
    seen.append(1)
    if len(seen) < 2:
        raise ConnectionError
    print("no longer flaky", flush=True)


@shared_task
def sweep(what):
    print(f"swept the {what}", flush=True)
"""

MAKE = """
from factory import create_app

flask_app = create_app()
celery_app = flask_app.extensions["celery"]
"""


def test_ordinary_flask_application_needs_other_imports_and_nothing_else(tmp_path: Path, database_url: str) -> None:
    moved = FACTORY.replace("from celery", "from greenjobs.contrib.celery")
    assert moved.count("greenjobs") == 4
    processes.write_application(tmp_path, moved, name="factory.py")
    processes.write_application(tmp_path, MAKE, name="make_celery.py")
    client = """
        import time
        from factory import create_app, flaky

        client = create_app().test_client()
        client.post("/mail/Ann")
        flaky.delay()
        id = client.post("/add", json={"a": 2, "b": 3}).json["result_id"]
        while not (answer := client.get(f"/result/{id}").json)["ready"]:
            time.sleep(0.05)
        print(type(id).__name__, answer)
    """
    processes.write_application(tmp_path, client, name="client.py")
    with processes.runner(tmp_path, database_url, "--app", "make_celery") as runner:
        printed = processes.run("python", "client.py", folder=tmp_path, database_url=database_url)
        assert printed.strip() == "str {'ready': True, 'successful': True, 'value': 5}"
        runner.wait_for_line("^the shop mails Ann, after 2 retries$")
        runner.wait_for_line("^no longer flaky$")
        runner.wait_for_line("^swept the chimney$")
        assert re.search(r"mail", runner.output[: runner.output.index("jobs: ")])
        runner.terminate()
        assert runner.wait() == 0


# --- unit facts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    tasks, applications = dict(celery_app.tasks), list(celery_app._applications)
    celery_app.tasks.clear()
    celery_app._applications.clear()
    try:
        with running.application(database_url) as database:
            yield database
    finally:
        celery_app.tasks.clear()
        celery_app.tasks.update(tasks)
        celery_app._applications[:] = applications
        celery_app._current.default = celery_app._current.latest = None


@pytest.fixture
def app(database: running.Database) -> Celery:
    return Celery("shop", backend="greenjobs", timezone="UTC")


def run(*tasks: Any) -> None:
    """Run what waits for these tasks, until nothing could run now."""
    while True:
        running.work_off(*(task.job for task in tasks))
        now = datetime.now(timezone.utc) + timedelta(milliseconds=1)
        # A runner stops between the moment in which a task wants to be retried at once, and the next.
        if not any(job.run_at <= now for job in jobs.find(state="scheduled") if isinstance(job, StoredJob)):
            return


def row(database: running.Database, id: str) -> tuple[Any, ...]:
    columns = "queue, priority, state, data, options, round(extract(epoch FROM run_at - created_at))::int"
    (found,) = database.rows(f"SELECT {columns} FROM background_jobs WHERE id = %s", int(id))
    return found


def test_job_is_named_as_in_celery(app: Celery) -> None:
    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    @app.task(name="other")
    def named() -> None: ...

    assert (add.name, named.name) == (f"{__name__}.add", "other")
    assert find_job(f"{__name__}.add") is add.job
    assert app.gen_task_name("add", "__main__") == "shop.add"


def test_task_is_called_as_the_function_that_it_is(app: Celery) -> None:
    @app.task(bind=True)
    def add(self: Any, a: int, b: int) -> tuple[int, bool, Any]:
        return a + b, self.request.called_directly, self.request.id

    assert add(1, b=2) == (3, True, None)
    assert isinstance(add, celery.Task)


def test_delay_is_run_and_its_result_is_kept(app: Celery) -> None:
    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    result = add.delay(1, b=2)
    assert (result.state, result.ready(), result.result) == ("PENDING", False, None)
    run(add)
    again = AsyncResult(result.id)
    assert (again.state, again.status, again.ready(), again.successful(), again.failed()) == (
        *("SUCCESS", "SUCCESS"),
        *(True, True, False),
    )
    assert again.get(timeout=30) == again.result == again.info == 3
    assert isinstance(result.id, str) and again == result and again.name == add.name


def test_options_of_a_call_are_those_of_its_row(app: Celery, database: running.Database) -> None:
    @app.task(priority=1, time_limit=60)
    def work(n: int) -> None: ...

    one = work.apply_async((1,), countdown=60, queue="slow", priority=5, soft_time_limit=10, ignore_result=True)
    queue, priority, state, data, options, seconds = row(database, one.id)
    assert (queue, priority, state, data, seconds) == ("slow", 5, "scheduled", {"n": 1}, 60)
    assert options == {"keep": 0.0, "timeout": 10.0, "hard_timeout": 60.0}
    two = work.apply_async(kwargs={"n": 2}, routing_key="fast", retry=True, serializer="json", countdown=-5)
    assert row(database, two.id)[:3] == ("fast", 1, "available")
    assert row(database, two.id)[4] == {"keep": 86400.0, "hard_timeout": 60.0}


@pytest.mark.parametrize("is_aware", [True, False])
def test_eta_without_a_time_zone_is_utc(app: Celery, database: running.Database, is_aware: bool) -> None:
    @app.task
    def work() -> None: ...

    eta = datetime.now(timezone.utc) + timedelta(hours=2)
    result = work.apply_async(eta=eta if is_aware else eta.replace(tzinfo=None))
    assert database.value("SELECT run_at FROM background_jobs WHERE id = %s", int(result.id)) == eta


def test_eta_without_a_time_zone_is_in_that_of_the_settings_without_enable_utc(
    app: Celery, database: running.Database
) -> None:
    @app.task
    def work() -> None: ...

    app.conf.update(enable_utc=False, timezone="America/New_York")
    result = work.apply_async(eta=datetime(2036, 1, 1, 12))
    expected = datetime(2036, 1, 1, 17, tzinfo=timezone.utc)
    assert database.value("SELECT run_at FROM background_jobs WHERE id = %s", int(result.id)) == expected


def test_expiry_is_counted_from_the_call(app: Celery, database: running.Database) -> None:
    @app.task
    def work() -> None: ...

    result = work.apply_async(countdown=60, expires=90)
    left = "SELECT round(extract(epoch FROM expires_at - created_at))::int FROM background_jobs WHERE id = %s"
    assert database.value(left, int(result.id)) == 90
    with pytest.raises(OptionError, match="expires is 30 s and countdown 60 s: it would never run"):
        work.apply_async(countdown=60, expires=30)


def test_expired_task_is_revoked(app: Celery, database: running.Database) -> None:
    @app.task
    def work() -> None: ...

    result = work.apply_async(expires=0.001)
    database.rows("SELECT pg_sleep(0.01)")
    run(work)
    assert result.state == "REVOKED"
    with pytest.raises(TaskRevokedError, match="expired"):
        result.get(timeout=30)


@pytest.mark.parametrize(
    ("broker", "stored"), [("redis://cache", -3), ("amqp://rabbit", 3), (None, 3)], ids=["redis", "rabbit", "none"]
)
def test_priority_counts_as_with_the_broker(database: running.Database, broker: str | None, stored: int) -> None:
    app = Celery("shop", broker=broker)

    @app.task(priority=3)
    def work() -> None: ...

    assert row(database, work.delay().id)[1] == stored


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_id": "7f0c"}, r"apply_async\(task_id=…\) is not in greenjobs: ids are given by the database"),
        ({"link_error": print}, r"link_error=…\) is not in greenjobs: define on_failure on the task"),
        ({"serializer": "pickle"}, "serializer is 'pickle', and greenjobs stores JSON"),
        ({"exchange": "news"}, "queues are names; use queue=…"),
        ({"countdwn": 5}, "apply_async has no option 'countdwn'"),
        ({"headers": {"trace": 5}}, "headers has 'trace': 5; allowed: texts"),
        ({"eta": 5}, "eta is 5; allowed: a datetime"),
        ({"priority": 10**6}, "priority is 1000000"),
    ],
    ids=str,
)
def test_option_that_cannot_be_is_refused_and_nothing_is_enqueued(
    app: Celery, database: running.Database, options: dict[str, Any], message: str
) -> None:
    @app.task
    def work() -> None: ...

    with pytest.raises((Unsupported, OptionError), match=message):
        work.apply_async(**options)
    assert database.count() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate_limit": "10/m"}, "rate_limit is not in greenjobs; give such tasks a queue of their own"),
        ({"serializer": "pickle"}, "serializer is 'pickle'"),
        ({"pydantic": True}, "annotate the parameters with dataclasses"),
    ],
    ids=str,
)
def test_option_of_a_task_that_cannot_be_is_refused(app: Celery, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):

        @app.task(**options)
        def work() -> None: ...

        work.delay()


def test_argument_that_json_has_not_is_refused_with_its_path(app: Celery, database: running.Database) -> None:
    @app.task
    def work(what: Any) -> None: ...

    with pytest.raises(PayloadError, match=r"work: what\['x'\]|work: what.x"):
        work.delay({"x": object()})
    assert database.count() == 0


def test_coroutine_is_refused(app: Celery) -> None:
    with pytest.raises(JobDefinitionError, match="is a coroutine or a generator"):

        @app.task
        async def work() -> None: ...


def test_two_tasks_of_one_name_are_refused(app: Celery) -> None:
    @app.task(name="work")
    def one() -> None: ...

    with pytest.raises(JobDefinitionError, match="two tasks are named 'work'"):

        @app.task(name="work")
        def other() -> None: ...


def test_result_annotation_that_json_has_not_is_no_mistake(app: Celery) -> None:
    @app.task
    def work() -> object | Path:
        return {"a": 1}

    result = work.delay()
    run(work)
    assert result.get(timeout=30) == {"a": 1}


# --- errors and retries -----------------------------------------------------------------------------------------------


def test_error_is_final_unless_the_task_asks_for_a_retry(app: Celery) -> None:
    @app.task
    def work() -> None:
        raise ValueError("nonsense")

    result = work.delay()
    run(work)
    assert (result.state, result.failed(), result.ready()) == ("FAILURE", True, True)
    assert isinstance(result.result, ValueError) and str(result.result) == "nonsense"
    assert result.traceback is not None and "raise ValueError" in result.traceback
    with pytest.raises(ValueError, match="nonsense"):
        result.get(timeout=30)
    assert isinstance(result.get(timeout=30, propagate=False), ValueError)


def test_error_of_ones_own_is_raised_as_failed_job(app: Celery) -> None:
    class Odd(Exception):
        pass

    @app.task
    def work() -> None:
        raise Odd("odd")

    result = work.delay()
    run(work)
    with pytest.raises(JobFailed, match="Odd: odd"):
        result.get(timeout=30)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_task_that_runs_out_of_time_is_not_retried(app: Celery, kind: str) -> None:
    import gevent

    limits = {"soft_time_limit": 0.05} if kind == "soft" else {"time_limit": 0.05}

    @app.task(**limits)
    def work() -> None:
        gevent.sleep(60)

    result = work.delay()
    run(work)
    assert result.state == "FAILURE"
    with pytest.raises(JobFailed, match="JobTimeout" if kind == "soft" else "JobHardTimeout"):
        result.get(timeout=30)


def test_soft_time_limit_can_be_caught(app: Celery) -> None:
    import gevent

    @app.task(soft_time_limit=0.05)
    def work() -> str:
        try:
            gevent.sleep(60)
        except SoftTimeLimitExceeded:
            return "in short"
        return "at length"

    result = work.delay()
    run(work)
    assert result.get(timeout=30) == "in short"


def test_retry_runs_the_task_again_until_max_retries_and_then_raises_the_error(app: Celery) -> None:
    seen: list[int] = []

    @app.task(bind=True, max_retries=2)
    def work(self: Any, n: int) -> None:
        seen.append(self.request.retries)
        try:
            raise ValueError(f"failed {n}")
        except ValueError as error:
            raise self.retry(exc=error, countdown=0) from None

    result = work.delay(5)
    run(work)
    assert seen == [0, 1, 2]
    with pytest.raises(ValueError, match="failed 5"):
        result.get(timeout=30)


def test_retry_without_an_error_ends_with_max_retries_exceeded(app: Celery) -> None:
    @app.task(bind=True)
    def work(self: Any) -> None:
        self.retry(countdown=0, max_retries=1)

    result = work.delay()
    run(work)
    with pytest.raises(JobFailed, match="MaxRetriesExceededError: can't retry .*work.* it was retried 1 times"):
        result.get(timeout=30)
    assert work.MaxRetriesExceededError is MaxRetriesExceededError


def test_retry_may_say_more_retries_than_the_task(app: Celery) -> None:
    seen: list[int] = []

    @app.task(bind=True, max_retries=0)
    def work(self: Any) -> str:
        seen.append(self.request.retries)
        return "done" if len(seen) > 5 else self.retry(countdown=0, max_retries=7)

    result = work.delay()
    run(work)
    assert result.get(timeout=30) == "done" and seen == [0, 1, 2, 3, 4, 5]


def test_max_retries_of_none_is_no_limit(app: Celery) -> None:
    seen: list[int] = []

    @app.task(bind=True, max_retries=None)
    def work(self: Any) -> None:
        seen.append(self.request.retries)
        if len(seen) < 15:
            self.retry(countdown=0)

    work.delay()
    run(work)
    assert len(seen) == 15


def test_retry_waits_as_long_as_it_says(app: Celery, database: running.Database) -> None:
    @app.task(bind=True, default_retry_delay=50)
    def work(self: Any, how: str) -> None:
        if how == "default":
            self.retry()
        if how == "countdown":
            self.retry(countdown=500)
        self.retry(eta=datetime.now(timezone.utc).replace(tzinfo=None) + timedelta(seconds=5000))

    results = [work.delay(how) for how in ("default", "countdown", "eta")]
    run(work)
    waits = [
        database.value(
            "SELECT round(extract(epoch FROM run_at - last_retry) / 10)::int FROM background_jobs WHERE id = %s",
            int(result.id),
        )
        for result in results
    ]
    assert waits == [5, 50, 500]
    assert {result.state for result in results} == {"RETRY"}


def test_retries_of_a_call_are_where_it_begins(app: Celery) -> None:
    seen: list[int] = []

    @app.task(bind=True, max_retries=3)
    def work(self: Any) -> None:
        seen.append(self.request.retries)
        self.retry(countdown=0)

    work.apply_async(retries=2)
    run(work)
    assert seen == [2, 3]


def test_retry_with_other_arguments_is_refused(app: Celery) -> None:
    @app.task(bind=True)
    def work(self: Any, n: int) -> None:
        self.retry(args=(n + 1,), countdown=0)

    result = work.delay(1)
    run(work)
    with pytest.raises(JobFailed, match="Unsupported: .*retried as it is"):
        result.get(timeout=30)


def test_retry_that_is_not_thrown_is_raised_when_the_task_returns(app: Celery) -> None:
    seen: list[str] = []

    @app.task(bind=True)
    def work(self: Any) -> None:
        if not self.request.retries:
            self.retry(countdown=0, throw=False)
            seen.append("after retry")
        seen.append("end")

    work.delay()
    run(work)
    assert seen == ["after retry", "end", "end"]


def test_autoretry_is_for_the_errors_that_are_named(app: Celery) -> None:
    seen: list[str] = []

    @app.task(
        autoretry_for=(OSError,),
        dont_autoretry_for=(FileNotFoundError,),
        retry_kwargs={"max_retries": 2, "countdown": 0},
    )
    def work(kind: str) -> None:
        seen.append(kind)
        raise {"os": OSError, "file": FileNotFoundError, "value": ValueError}[kind](kind)

    results = [work.delay(kind) for kind in ("os", "file", "value")]
    run(work)
    assert sorted(seen) == ["file", "os", "os", "os", "value"]
    assert {result.state for result in results} == {"FAILURE"}
    assert isinstance(results[0].result, OSError)


def test_autoretry_raises_the_error_itself_where_the_task_is_called(app: Celery) -> None:
    @app.task(autoretry_for=(OSError,))
    def work() -> None:
        raise OSError("here")

    with pytest.raises(OSError, match="here"):
        work()


def test_retry_backoff_doubles_from_retry_to_retry(app: Celery, database: running.Database) -> None:
    waited: list[float | None] = []

    @app.task(autoretry_for=(OSError,), retry_backoff=2, retry_backoff_max=6, retry_jitter=False, max_retries=4)
    def work() -> None:
        raise OSError

    handler = events.subscribe(lambda event: waited.append(event.retry_in))
    try:
        work.delay()
        for _ in range(5):
            run(work)
            database.rows("UPDATE background_jobs SET run_at = now() WHERE state = 'scheduled'")
    finally:
        events.unsubscribe(handler)
    assert waited == [2, 4, 6, 6, None]


def test_hooks_are_called(app: Celery) -> None:
    told: list[tuple[Any, ...]] = []

    class Told(celery.Task):
        def before_start(self, task_id: Any, args: Any, kwargs: Any) -> None:
            told.append(("before", kwargs))

        def on_success(self, retval: Any, task_id: Any, args: Any, kwargs: Any) -> None:
            told.append(("success", retval, task_id))

        def on_failure(self, exc: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
            told.append(("failure", repr(exc), kwargs, "Traceback" in einfo.traceback))

        def on_retry(self, exc: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
            told.append(("retry", repr(exc)))

        def after_return(self, status: str, *_: Any) -> None:
            told.append(("after", status))

    @app.task(base=Told, bind=True)
    def work(self: Any, kind: str) -> int:
        if kind == "error":
            raise ValueError(kind)
        if not self.request.retries:
            self.retry(exc=OSError("busy"), countdown=0)
        return 7

    work.delay("error")
    run(work)
    error = {"kind": "error"}
    assert told == [("before", error), ("failure", "ValueError('error')", error, True), ("after", "FAILURE")]
    told.clear()
    result = work.delay("good")
    run(work)
    assert [each[:2] for each in told] == [
        *(("before", {"kind": "good"}), ("retry", "OSError('busy')")),
        *(("before", {"kind": "good"}), ("success", 7), ("after", "SUCCESS")),
    ]
    assert told[-2][2] == result.id


def test_hook_that_fails_changes_nothing(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    @app.task(on_success=lambda self, *_: 1 / 0)
    def work() -> int:
        return 1

    result = work.delay()
    run(work)
    assert result.get(timeout=30) == 1
    assert "on_success of the task" in caplog.text


def test_ignore_and_reject_end_the_task(app: Celery) -> None:
    seen: list[str] = []

    @app.task(bind=True)
    def work(self: Any, kind: str) -> None:
        seen.append(kind)
        if kind == "ignore":
            raise Ignore
        if kind == "reject":
            raise Reject("no")
        self.update_state(state="SKIPPED", meta={"why": "holiday"})
        raise Ignore

    results = [work.delay(kind) for kind in ("ignore", "reject", "said")]
    run(work)
    assert sorted(seen) == ["ignore", "reject", "said"]
    assert [result.state for result in results] == ["IGNORED", "IGNORED", "SKIPPED"]
    assert results[2].info == {"why": "holiday"}


def test_rejected_task_with_requeue_runs_again(app: Celery, database: running.Database) -> None:
    @app.task
    def work() -> None:
        raise Reject("later", requeue=True)

    result = work.delay()
    run(work)
    assert row(database, result.id)[2] == "scheduled"
    assert database.value("SELECT retries FROM background_jobs") == 0


def test_request_and_current_task_are_about_this_attempt(app: Celery) -> None:
    @app.task(bind=True)
    def work(self: Any, n: int) -> dict[str, Any]:
        request = self.request
        assert celery.current_task.request is request
        return {
            "id": request.id,
            "kwargs": dict(request.kwargs),
            "direct": request.called_directly,
            "headers": dict(request.headers),
            "queue": request.delivery_info["routing_key"],
            "name": celery.current_task.name,
        }

    result = work.apply_async((1,), headers={"trace": "x"})
    run(work)
    assert result.get(timeout=30) == {
        "id": result.id,
        "kwargs": {"n": 1},
        "direct": False,
        "headers": {"trace": "x"},
        "queue": "default",
        "name": work.name,
    }
    assert not celery.current_task


def test_super_call_in_a_class_of_the_application_is_part_of_the_attempt(app: Celery) -> None:
    class Contextual(celery.Task):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    @app.task(base=Contextual, bind=True)
    def work(self: Any) -> list[Any]:
        return [self.request.id, self.request.called_directly]

    result = work.delay()
    run(work)
    assert result.get(timeout=30) == [result.id, False]


def test_state_that_a_task_gives_itself_is_seen_while_it_runs(app: Celery) -> None:
    from gevent.event import Event
    from waiting import eventually

    seen = Event()

    @app.task(bind=True)
    def work(self: Any) -> str:
        self.update_state(state="PROGRESS", meta={"current": 3, "total": 10})
        seen.wait(running.PATIENCE_SECONDS)
        return "done"

    result = work.delay()
    from greenjobs.runner import Runner

    with running.started(Runner().register(work.job)):
        eventually(lambda: result.state == "PROGRESS", "the state", seconds=running.PATIENCE_SECONDS)
        assert result.info == {"current": 3, "total": 10}
        stored = jobs.get(int(result.id))
        assert stored is not None and stored.progress is not None and stored.progress.done == 3
        seen.set()
        assert result.get(timeout=30) == "done"


def test_state_that_is_too_long_fails_the_task(app: Celery) -> None:
    @app.task(bind=True)
    def work(self: Any) -> None:
        self.update_state(state="PROGRESS", meta={"text": "x" * 500})

    result = work.delay()
    run(work)
    with pytest.raises(JobFailed, match="OptionError: .*update_state takes 500 characters of JSON"):
        result.get(timeout=30)


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
    from gevent.event import Event

    from greenjobs.runner import Runner

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
    assert app.AsyncResult(5).id == "5"
    assert AsyncResult("4711").state == "PENDING"


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
def test_what_is_not_in_greenjobs_says_what_to_write(app: Celery, write: Callable[[Any], Any]) -> None:
    add, _ = calculator(app)
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


def test_apply_keeps_the_error_unless_it_is_to_throw(app: Celery) -> None:
    @app.task
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


# --- applications and settings ----------------------------------------------------------------------------------------


def test_shared_task_is_of_the_application_that_counts_when_it_is_used(database: running.Database) -> None:
    @shared_task
    def which() -> str:
        return str(celery.current_app.main)

    one, two = Celery("one"), Celery("two")
    assert (which.app, which()) == (two, "two")
    one.set_default()
    assert (which.app, which()) == (one, "one")


def test_class_of_tasks_may_be_exchanged_after_tasks_are_declared(app: Celery) -> None:
    """As in applications that were written before celery_init_app."""

    @app.task
    def work() -> str:
        return "work"

    class ContextTask(app.Task):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return f"in context: {self.run(*args, **kwargs)}"

    app.Task = ContextTask
    assert work() == "in context: work"
    result = work.delay()
    run(work)
    assert result.get(timeout=30) == "in context: work"


def test_class_with_a_method_run_is_registered(app: Celery) -> None:
    class Add(celery.Task):
        name = "shop.add"

        def run(self, a: int, b: int) -> int:
            return a + b

    add = app.register_task(Add())
    result = app.send_task("shop.add", (1, 2))
    run(add)
    assert result.get(timeout=30) == 3


def test_unknown_task_is_refused(app: Celery) -> None:
    with pytest.raises(NotRegistered, match="no task is named 'shop.nothing' in this process; known: none"):
        app.send_task("shop.nothing")


def test_modules_of_the_settings_are_imported_when_a_task_is_looked_for(
    app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from greenjobs.contrib.celery import shared_task\n\n@shared_task(name='{0}')\ndef work(): ...\n"
    for name in ("included_tasks", "found_package"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "tasks.py").write_text(text.format(name))
    monkeypatch.syspath_prepend(str(tmp_path))
    app.conf.include = ["included_tasks.tasks"]
    app.autodiscover_tasks(["found_package", "json"])
    assert "included_tasks.tasks" not in sys.modules
    from greenjobs.job import registered_jobs

    assert {"included_tasks", "found_package"} <= registered_jobs().keys()
    for name in ("included_tasks", "found_package"):
        monkeypatch.delitem(sys.modules, f"{name}.tasks")


def test_settings_have_their_names_of_old_and_with_a_prefix(app: Celery) -> None:
    app.conf.update(
        {"CELERY_TASK_RESULT_EXPIRES": 60, "CELERY_ALWAYS_EAGER": True, "CELERYD_TASK_TIME_LIMIT": 5, "DEBUG": True}
    )
    assert (app.conf.result_expires, app.conf.task_always_eager, app.conf.task_time_limit) == (60, True, 5)
    assert app.conf["CELERY_ALWAYS_EAGER"] is True and app.conf["DEBUG"] is True

    class Config:
        CELERY_TASK_ROUTES = {"a": "b"}  # noqa: RUF012
        CELERY_BROKER_URL = "redis://cache"
        SECRET = "x"

    app.config_from_object(Config, namespace="CELERY")
    assert app.conf.task_routes == {"a": "b"} and app.conf.broker_url == "redis://cache" and "SECRET" not in app.conf


def test_settings_without_meaning_are_named_once(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        app = Celery("shop", broker="redis://:secret@cache")
        app.conf.update(worker_concurrency=4, broker_url="redis://:secret@cache", colour="red")
        app.conf.update(worker_concurrency=4)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "these settings of Celery have no meaning in greenjobs, whose jobs are rows in PostgreSQL: broker_url",
        "Celery's setting colour is unknown here, and kept for your own code",
        "these settings of Celery have no meaning in greenjobs, whose jobs are rows in PostgreSQL: worker_concurrency",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_serializer": "pickle"}, "task_serializer is 'pickle', and greenjobs stores JSON"),
        ({"CELERY_TASK_SERIALIZER": "pickle"}, "task_serializer is 'pickle'"),
        ({"task_annotations": {"*": {"rate_limit": "1/s"}}}, "task_annotations is not in greenjobs: give the options"),
        ({"task_default_rate_limit": "1/s"}, "a queue of their own"),
        ({"beat_scheduler": "redbeat"}, "greenjobs.schedules.add"),
    ],
    ids=str,
)
def test_setting_that_cannot_be_is_refused(app: Celery, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        app.conf.update(settings)


@pytest.mark.parametrize(
    "url", ["postgresql://u@h/jobs", "sqla+postgresql://u@h/jobs", "db+postgresql+psycopg2://u@h/jobs"]
)
def test_broker_that_is_postgresql_is_the_database_where_no_other_is_named(
    database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str
) -> None:
    for name in ("DATABASE_URL", "GREENJOBS_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    before = config._process
    monkeypatch.setattr(config, "_process", config._Process({}, config._NO_LAYER, []))
    Celery("shop", broker=url, set_as_current=False)
    assert config.current().database_url == "postgresql://u@h/jobs"
    monkeypatch.setattr(config, "_process", before)


def test_routes_say_where_tasks_go_that_say_nothing_themselves(app: Celery, database: running.Database) -> None:
    @app.task(name="mail.send")
    def send() -> None: ...

    @app.task(name="mail.own", queue="own")
    def own() -> None: ...

    @app.task(name="other")
    def other() -> None: ...

    def router(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> Any:
        return "routed" if name == "other" else None

    app.conf.task_routes = [("mail.*", {"queue": "mail", "priority": 7}), router]
    assert row(database, send.delay().id)[:2] == ("mail", 7)
    assert row(database, send.apply_async(queue="now").id)[:2] == ("now", 7)
    assert row(database, own.delay().id)[0] == "own"
    assert row(database, other.delay().id)[0] == "routed"
    assert (send.job.queue, own.job.queue) == ("mail", "own")  # which a runner serves
    app.conf.update(task_routes=None, task_default_queue="celery")
    assert row(database, other.delay().id)[0] == other.job.queue == "celery"


def test_job_under_a_task_enqueues_as_the_task_does(app: Celery, database: running.Database) -> None:
    @app.task(queue="own", priority=4, soft_time_limit=9)
    def work(n: int) -> None: ...

    (handle,) = work.job.delay_many([(1,)])
    assert row(database, str(handle.id))[:2] == ("own", 4)
    assert row(database, str(handle.id))[4] == {"keep": 86400.0, "timeout": 9.0}
    assert work.job.options(unique=True).delay(2).id == work.job.options(unique=True).delay(2).id


def test_job_is_part_of_the_transaction_that_is_named(app: Celery, database: running.Database) -> None:
    import psycopg2

    @app.task
    def work() -> None: ...

    with psycopg2.connect(database.url) as connection:
        work.apply_async(connection=connection)
        connection.rollback()
    connection.close()
    assert database.count() == 0


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "cron"),
    [
        (crontab(), "* * * * *"),
        (crontab(minute=0, hour="*/3,8-17"), "0 */3,8-17 * * *"),
        (crontab(hour=7, minute=30, day_of_week="mon, friday"), "30 7 * * MON,FRI"),
        (crontab(0, 0, day_of_month={1, 15}, month_of_year="jan-march"), "0 0 1,15 JAN-MAR *"),
        (crontab.from_string("5 4 * * *"), "5 4 * * *"),
        (schedule(1), "*/1 * * * * *"),
        (schedule(timedelta(seconds=30)), "*/30 * * * * *"),
        (schedule(60.0), "* * * * *"),
        (schedule(300), "*/5 * * * *"),
        (schedule(7200), "0 */2 * * *"),
        (schedule(timedelta(days=1)), "0 0 * * *"),
    ],
    ids=str,
)
def test_schedule_is_a_cron_expression(given: Any, cron: str) -> None:
    assert given.cron == cron


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedule(45).cron, "every 0:00:45 is none by the clock"),
        (lambda: schedule(0).cron, "is none by the clock"),
        (lambda: schedule(timedelta(days=2)).cron, "use a crontab"),
        (lambda: crontab(day_of_month=13, day_of_week="fri").cron, "on days that are both"),
        (lambda: solar("sunset", 1, 2), "solar schedules are not in greenjobs"),
    ],
)
def test_schedule_that_cron_has_not_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        make()


def test_beat_schedule_is_declared_by_the_jobs_that_it_is_about(app: Celery) -> None:
    from greenjobs.schedules import declared

    @app.task(name="sweep", queue="cellar")
    def sweep(what: str, twice: bool = False) -> None: ...

    @app.task(name="other")
    def other() -> None: ...

    app.conf.timezone = "Europe/Paris"
    app.conf.beat_schedule = {
        "night": {"task": "sweep", "schedule": crontab(0, 3), "args": ("floor",), "options": {"priority": 3}},
        "often": {"task": "sweep", "schedule": timedelta(minutes=1), "kwargs": {"what": "yard", "twice": True}},
    }

    @app.on_after_configure.connect
    def set_up(sender: Celery, **_: Any) -> None:
        sender.add_periodic_task(10.0, other.s(), name="ten")

    app.load()
    found = declared({"sweep": sweep.job, "other": other.job}, ())
    assert {(each.name, each.job.name, each.data, each.queue, each.priority) for each in found.values()} == {
        ("night", "sweep", '{"what":"floor"}', "cellar", 3),
        ("often", "sweep", '{"what":"yard","twice":true}', "cellar", None),
        ("ten", "other", "{}", None, None),
    }
    assert (found["night"].timetable.cron, found["night"].timetable.timezone) == ("0 3 * * *", "Europe/Paris")
    assert (found["often"].timetable.cron, found["often"].timetable.timezone) == ("* * * * *", "UTC")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "nothing", "schedule": 10}, "no task is named 'nothing'"),
        ({"task": "sweep"}, "beat_schedule: 'x' is .* and lacks 'schedule'"),
        ({"task": "sweep", "schedule": "daily"}, "the schedule of 'x' is 'daily'; allowed: seconds"),
        ({"task": "sweep", "schedule": crontab(minute="61")}, "the schedule 'x': cron is '61"),
        ({"task": "sweep", "schedule": 45}, "the schedule 'x': a schedule of every 0:00:45"),
        ({"task": "sweep", "schedule": 10, "options": {"expires": 5}}, "'x' has the option 'expires'"),
        ({"task": "sweep", "schedule": 10, "args": (1,)}, "takes|too many"),
    ],
    ids=str,
)
def test_entry_of_beat_schedule_that_cannot_be_keeps_a_runner_from_starting(
    app: Celery, entry: dict[str, Any], message: str
) -> None:
    from greenjobs.schedules import declared

    @app.task(name="sweep")
    def sweep() -> None: ...

    app.conf.beat_schedule = {"x": entry}
    with pytest.raises((Unsupported, ImproperlyConfigured, NotRegistered, TypeError), match=message):
        declared({"sweep": sweep.job}, ())


def test_signals_say_what_takes_their_place() -> None:
    with pytest.raises(ImportError, match=r"task_prerun is not in greenjobs; use greenjobs\.surroundings\.surround"):
        from greenjobs.contrib.celery.signals import task_prerun  # noqa: F401
    with pytest.raises(Unsupported, match=r"app\.control\.inspect is not in greenjobs"):
        Celery("shop", set_as_current=False).control.inspect()
    assert issubclass(Retry, BaseException) and not issubclass(Retry, Exception)
