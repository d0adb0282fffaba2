"""greenjobs.contrib.celery: an ordinary Flask application of Celery's, of which only the imports are changed, and what
becomes of tasks: their options, errors and retries.
"""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import celeries
import gevent
import processes
import pytest
import running
from celeries import row, run
from gevent.event import Event
from waiting import eventually

from greenjobs import events, jobs
from greenjobs.contrib import celery
from greenjobs.contrib.celery import Celery
from greenjobs.contrib.celery.exceptions import (
    Ignore,
    MaxRetriesExceededError,
    Reject,
    SoftTimeLimitExceeded,
    TaskRevokedError,
    Unsupported,
)
from greenjobs.contrib.celery.result import AsyncResult
from greenjobs.errors import JobDefinitionError, JobFailed, OptionError, PayloadError
from greenjobs.job import find_job
from greenjobs.runner import Runner

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


# --- calls ----------------------------------------------------------------------------------------------------------


def test_job_is_named_as_in_celery(quiet: Celery) -> None:
    @quiet.task
    def add(a: int, b: int) -> int:
        return a + b

    @quiet.task(name="other")
    def named() -> None: ...

    assert (add.name, named.name) == (f"{__name__}.add", "other")
    assert find_job(f"{__name__}.add") is add.job
    assert quiet.gen_task_name("add", "__main__") == "shop.add"


def test_task_is_called_as_the_function_that_it_is(quiet: Celery) -> None:
    @quiet.task(bind=True)
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
def test_option_of_a_task_that_cannot_be_is_refused(quiet: Celery, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):

        @quiet.task(**options)
        def work() -> None: ...


@pytest.mark.parametrize("args", ["Ann", {"to": "Ann"}, 5])
def test_arguments_that_are_no_list_are_refused(app: Celery, database: running.Database, args: Any) -> None:
    """A text is not taken to pieces, where somebody forgot the comma of a tuple."""

    @app.task
    def mail(*to: str) -> None: ...

    for enqueue in (mail.apply_async, mail.apply, mail.signature, mail.s().apply_async):
        with pytest.raises(TypeError, match=r"mail: args is .*; allowed: a list or a tuple"):
            enqueue(args)
    assert database.count() == 0


def test_queue_named_celery_is_the_default_one(app: Celery, database: running.Database) -> None:
    @app.task(queue="mail")
    def mail() -> None: ...

    assert [row(database, mail.apply_async(queue=queue).id)[0] for queue in (None, "celery")] == ["mail", "default"]
    app.conf.task_default_queue = "mine"
    assert row(database, mail.apply_async(queue="celery").id)[0] == "celery"


def test_argument_that_json_has_not_is_refused_with_its_path(app: Celery, database: running.Database) -> None:
    @app.task
    def work(what: Any) -> None: ...

    with pytest.raises(PayloadError, match=r"work: what\['x'\]|work: what.x"):
        work.delay({"x": object()})
    assert database.count() == 0


def test_coroutine_is_refused(quiet: Celery) -> None:
    with pytest.raises(JobDefinitionError, match="is a coroutine or a generator"):

        @quiet.task
        async def work() -> None: ...


def test_two_tasks_of_one_name_are_refused(quiet: Celery) -> None:
    @quiet.task(name="work")
    def one() -> None: ...

    with pytest.raises(JobDefinitionError, match="two tasks are named 'work'"):

        @quiet.task(name="work")
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


def test_builtin_error_is_raised_as_it_was(app: Celery) -> None:
    @app.task
    def look_up(key: str) -> None:
        raise KeyError(key)

    result = look_up.delay("it's\n\u00fc")
    run(look_up)
    with pytest.raises(KeyError) as raised:
        result.get(timeout=30)
    assert raised.value.args == ("it's\n\u00fc",)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="has no groups of errors")
def test_builtin_error_that_is_made_of_more_than_a_text_is_raised_as_failed_job(app: Celery) -> None:
    @app.task
    def fail() -> None:
        raise vars(builtins)["ExceptionGroup"]("two", [ValueError(1), ValueError(2)])

    result = fail.delay()
    run(fail)
    with pytest.raises(JobFailed, match="ExceptionGroup: two"):
        result.get(timeout=30)
    assert isinstance(result.result, JobFailed)


def test_error_that_is_only_named_like_a_builtin_one_is_raised_as_failed_job(app: Celery) -> None:
    class Refused(OSError):
        pass

    Refused.__qualname__, Refused.__module__ = "ConnectionError", "requests.exceptions"

    @app.task
    def fail(is_builtin: bool) -> None:
        try:
            raise ConnectionError("no answer")
        except ConnectionError as error:
            if is_builtin:
                raise
            raise Refused("no answer") from error

    builtin, other = fail.delay(True), fail.delay(False)
    run(fail)
    with pytest.raises(ConnectionError, match="no answer"):
        builtin.get(timeout=30)
    with pytest.raises(JobFailed, match="ConnectionError: no answer"):
        other.get(timeout=30)


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
    etas: list[datetime] = []

    @app.task(bind=True, default_retry_delay=50)
    def work(self: Any, how: str) -> None:
        if how == "default":
            self.retry()
        if how == "countdown":
            self.retry(countdown=500)
        etas.append(datetime.now(timezone.utc) + timedelta(seconds=5000))
        self.retry(eta=etas[0].replace(tzinfo=None))

    results = [work.delay(how) for how in ("default", "countdown", "eta")]
    run(work)
    waits = [
        database.value(
            "SELECT round(extract(epoch FROM run_at - last_retry) / 10)::int FROM background_jobs WHERE id = %s",
            int(result.id),
        )
        for result in results[:2]
    ]
    assert waits == [5, 50]
    run_at = database.value("SELECT run_at FROM background_jobs WHERE id = %s", int(results[2].id))
    # It is counted from when the outcome is written.
    assert timedelta(seconds=-1) < run_at - etas[0] < timedelta(seconds=running.PATIENCE_SECONDS)
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


@pytest.mark.parametrize(
    ("call", "again"),
    [
        (((1,), {"to": "Ann"}), {"args": [1], "kwargs": {"to": "Ann"}}),
        (((1, "Ann"), {}), {"args": [1, "Ann"]}),
        (((), {"number": 1, "to": "Ann"}), {"args": (1, "Ann"), "kwargs": {}}),
        (((1,), {"to": "Ann"}), {"kwargs": {"to": "Ann"}}),
        (((1,), {}), {"args": [1, "all"]}),
    ],
    ids=["as it was", "by position", "otherwise", "by name alone", "a default"],
)
def test_retry_may_repeat_the_arguments_of_the_call(app: Celery, call: Any, again: dict[str, Any]) -> None:
    """As many tasks of old do, for Celery once needed them."""

    @app.task(bind=True)
    def mail(self: Any, number: int, to: str = "all") -> list[Any]:
        if not self.request.retries:
            raise self.retry(countdown=0, **again)
        return [number, to, self.request.retries]

    result = mail.apply_async(*call)
    run(mail)
    assert result.get(timeout=30) == [1, "Ann" if "Ann" in str(call) else "all", 1]


@pytest.mark.parametrize(
    "again",
    [{"args": [2]}, {"args": [1], "kwargs": {}}, {"kwargs": {"to": "Bob"}}, {"args": [1, 2, 3]}, {"queue": "slow"}],
)
def test_retry_of_another_call_is_refused_and_keeps_its_error(app: Celery, again: dict[str, Any]) -> None:
    @app.task(bind=True)
    def mail(self: Any, number: int, to: str = "all") -> None:
        raise self.retry(exc=ConnectionError("no answer"), **again)

    result = mail.delay(1, to="Ann")
    run(mail)
    assert result.state == "FAILURE"
    assert "no answer" in str(result.traceback)
    with pytest.raises(JobFailed, match=r"Unsupported: .*mail: retry\((args|kwargs|queue)=…\) is not in greenjobs"):
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


@pytest.mark.parametrize("option", ["autoretry_for", "dont_autoretry_for"])
@pytest.mark.parametrize("given", [OSError, "OSError", (OSError, "KeyError"), [int], 5], ids=str)
def test_autoretry_for_what_is_no_list_of_errors_is_refused(quiet: Celery, option: str, given: Any) -> None:
    """Before the task runs, of whose first error nothing would be left."""
    options = {"autoretry_for": (ConnectionError,), option: given}

    @quiet.task(name="fetch", **options)
    def fetch() -> None: ...

    with pytest.raises(JobDefinitionError, match=f"fetch: {option} is .*; allowed: classes of errors"):
        fetch.delay()


def test_autoretry_raises_the_error_itself_where_the_task_is_called(quiet: Celery) -> None:
    @quiet.task(autoretry_for=(OSError,))
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


def test_headers_are_attributes_of_the_request(app: Celery) -> None:
    @app.task(bind=True)
    def look(self: Any) -> list[Any]:
        request = self.request
        return [request.tenant, request.get("tenant"), request.get("other", "none"), request.timelimit]

    result = look.apply_async(headers={"tenant": "ann"})
    run(look)
    assert result.get(timeout=30) == ["ann", "ann", "none", None]
    with pytest.raises(AttributeError, match="no 'tenant'"):
        look.request.tenant  # noqa: B018


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
    seen = Event()

    @app.task(bind=True)
    def work(self: Any) -> str:
        self.update_state(state="PROGRESS", meta={"current": 3, "total": 10})
        seen.wait(running.PATIENCE_SECONDS)
        return "done"

    result = work.delay()
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
