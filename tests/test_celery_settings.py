"""greenjobs.contrib.celery: applications, their settings, routes and schedules."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import celeries
import psycopg2
import pytest
import running
import shops
from celeries import row, run

from greenjobs import config
from greenjobs.contrib import celery
from greenjobs.contrib.celery import Celery, shared_task
from greenjobs.contrib.celery.exceptions import (
    ImproperlyConfigured,
    NotRegistered,
    Retry,
    Unsupported,
)
from greenjobs.contrib.celery.schedules import crontab, schedule, solar
from greenjobs.job import registered_jobs
from greenjobs.schedules import declared


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


def test_unknown_task_is_refused(quiet: Celery) -> None:
    with pytest.raises(NotRegistered, match="no task is named 'shop.nothing' in this process; known: none"):
        quiet.send_task("shop.nothing")


def test_modules_of_the_settings_are_imported_when_a_task_is_looked_for(
    quiet: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from greenjobs.contrib.celery import shared_task\n\n@shared_task(name='{0}')\ndef work(): ...\n"
    for name in ("included_tasks", "found_package"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "tasks.py").write_text(text.format(name))
    monkeypatch.syspath_prepend(str(tmp_path))
    quiet.conf.include = ["included_tasks.tasks"]
    quiet.autodiscover_tasks(["found_package", "json"])
    assert "included_tasks.tasks" not in sys.modules
    assert {"included_tasks", "found_package"} <= registered_jobs().keys()
    for name in ("included_tasks", "found_package"):
        monkeypatch.delitem(sys.modules, f"{name}.tasks")


def test_module_of_tasks_that_cannot_be_imported_is_tried_again(
    quiet: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not forgotten, as if it had no tasks."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "halfway.py").write_text("import nowhere_to_be_found")
    quiet.conf.imports = ["halfway"]
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
            quiet.send_task("halfway.work")


def test_settings_have_their_names_of_old_and_with_a_prefix(quiet: Celery) -> None:
    quiet.conf.update(
        {"CELERY_TASK_RESULT_EXPIRES": 60, "CELERY_ALWAYS_EAGER": True, "CELERYD_TASK_TIME_LIMIT": 5, "DEBUG": True}
    )
    assert (quiet.conf.result_expires, quiet.conf.task_always_eager, quiet.conf.task_time_limit) == (60, True, 5)
    assert quiet.conf["CELERY_ALWAYS_EAGER"] is True and quiet.conf["DEBUG"] is True

    class Config:
        CELERY_TASK_ROUTES = {"a": "b"}  # noqa: RUF012
        CELERY_BROKER_URL = "redis://cache"
        SECRET = "x"

    quiet.config_from_object(Config, namespace="CELERY")
    assert (
        quiet.conf.task_routes == {"a": "b"} and quiet.conf.broker_url == "redis://cache" and "SECRET" not in quiet.conf
    )


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
def test_setting_that_cannot_be_is_refused(quiet: Celery, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        quiet.conf.update(settings)


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
        (crontab(hour="22-2,7", day_of_week="fri-mon"), "* 22,23,0,1,2,7 * * 5,6,0,1"),
        (crontab(minute="50-9/5", month_of_year="nov-jan/2"), "50,55,0,5 * * 11,1 *"),
        (crontab(minute="5-5/10"), "5 * * * *"),
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


def test_beat_schedule_is_declared_by_the_jobs_that_it_is_about(quiet: Celery) -> None:
    @quiet.task(name="sweep", queue="cellar")
    def sweep(what: str, twice: bool = False) -> None: ...

    @quiet.task(name="other")
    def other() -> None: ...

    quiet.conf.timezone = "Europe/Paris"
    quiet.conf.beat_schedule = {
        "night": {"task": "sweep", "schedule": crontab(0, 3), "args": ("floor",), "options": {"priority": 3}},
        "often": {"task": "sweep", "schedule": timedelta(minutes=1), "kwargs": {"what": "yard", "twice": True}},
    }

    @quiet.on_after_configure.connect
    def set_up(sender: Celery, **_: Any) -> None:
        sender.add_periodic_task(10.0, other.s(), name="ten")

    quiet.load()
    another = Celery("another, which is the current one by now")
    another.conf.beat_schedule["also"] = {"task": "other", "schedule": 1}
    found = declared({"sweep": sweep.job, "other": other.job}, ())
    assert {(each.name, each.job.name, each.data, each.queue, each.priority) for each in found.values()} == {
        ("night", "sweep", '{"what":"floor"}', "cellar", 3),
        ("often", "sweep", '{"what":"yard","twice":true}', "cellar", None),
        ("ten", "other", "{}", None, None),
        ("also", "other", "{}", None, None),
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
        ({"task": "sweep", "schedule": 10, "args": "floor"}, "beat_schedule: 'x': args is 'floor'; allowed: a list"),
    ],
    ids=str,
)
def test_entry_of_beat_schedule_that_cannot_be_keeps_a_runner_from_starting(
    quiet: Celery, entry: dict[str, Any], message: str
) -> None:
    @quiet.task(name="sweep")
    def sweep() -> None: ...

    quiet.conf.beat_schedule = {"x": entry}
    with pytest.raises((Unsupported, ImproperlyConfigured, NotRegistered, TypeError), match=message):
        declared({"sweep": sweep.job}, ())


def test_signals_say_what_takes_their_place() -> None:
    with pytest.raises(ImportError, match=r"task_prerun is not in greenjobs; use greenjobs\.surroundings\.surround"):
        from greenjobs.contrib.celery.signals import task_prerun  # noqa: F401
    with pytest.raises(ImportError, match=r"worker_process_init is not in greenjobs; use the module that"):
        from greenjobs.contrib.celery.signals import worker_process_init  # noqa: F401
    with pytest.raises(Unsupported, match=r"app\.control\.inspect is not in greenjobs"):
        Celery("shop", set_as_current=False).control.inspect()
    assert issubclass(Retry, BaseException) and not issubclass(Retry, Exception)


def test_task_joins_the_session_of_an_application_with_the_extension(
    app: Celery, database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shops.application(database.url, monkeypatch):
        shop = shops.make_shop(database.url)

        @app.task
        def work() -> None: ...

        with shop.app_context():
            work.delay()
            shops.db.session.rollback()
            assert database.count() == 0
            independent = work.apply_async(independent=True)
            assert database.state(int(independent.id)) == "available"


def test_importing_it_loads_neither_driver_nor_gevent_nor_celery() -> None:
    code = "import greenjobs.contrib.celery, sys; print({'gevent', 'psycopg2', 'flask', 'celery'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
