"""A Flask application with the extension: its settings, a context of its own for every job, its session, its commands.

How jobs join the session of Flask-SQLAlchemy is in tests/test_joining.py.
"""

from __future__ import annotations

import gc
import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import databases
import flask
import gevent
import processes
import psycopg2
import pytest
import running
import shops
import sqlalchemy as sa
from gevent.event import Event
from shops import Order, db, make_shop

import greenjobs
from greenjobs import config, current_job, job
from greenjobs.contrib.flask import GreenJobs
from greenjobs.errors import ConfigError, DatabaseUnavailable
from greenjobs.runner import Runner


@pytest.fixture
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[running.Database]:
    with shops.application(database_url, monkeypatch) as database:
        yield database


# --- settings ---------------------------------------------------------------------------------------------------------


def bare(**settings: Any) -> flask.Flask:
    """An application with the extension and without Flask-SQLAlchemy."""
    app = flask.Flask("bare")
    app.config.update(settings)
    GreenJobs(app)
    return app


@pytest.mark.parametrize(
    "settings",
    [
        {"SQLALCHEMY_DATABASE_URI": "postgresql://u@h/shop"},
        {"SQLALCHEMY_DATABASE_URI": "postgresql+psycopg2://u@h/shop"},
        {"SQLALCHEMY_DATABASE_URI": sa.make_url("postgresql+psycopg2://u@h/shop")},
        {"SQLALCHEMY_ENGINES": {"default": "postgresql+psycopg2://u@h/shop"}},
        {"SQLALCHEMY_ENGINES": {"default": {"url": sa.make_url("postgresql+psycopg2://u@h/shop")}}},
        {"SQLALCHEMY_BINDS": {None: {"url": "postgresql://u@h/shop"}}},
        {"SQLALCHEMY_DATABASE_URI": "postgresql+asyncpg://u@h/shop"},
        {"SQLALCHEMY_DATABASE_URI": "postgresql+pg8000://u@h/shop"},
        {"SQLALCHEMY_DATABASE_URI": "sqlite://", "GREENJOBS_DATABASE_URL": "postgresql://u@h/shop"},
    ],
    ids=str,
)
def test_database_is_that_of_the_application(database: running.Database, settings: dict[str, Any]) -> None:
    bare(**settings)
    assert config.current().database_url == "postgresql://u@h/shop"


def test_password_in_a_url_object_is_kept(database: running.Database) -> None:
    bare(SQLALCHEMY_DATABASE_URI=sa.make_url("postgresql+psycopg2://u:se%40cret@h/shop"))
    assert config.current().database_url == "postgresql://u:se%40cret@h/shop"


@pytest.mark.parametrize("url", ["sqlite://", "mysql://u@h/shop", "postgresql", "postgresql://h/\x07", None, 5])
def test_database_that_jobs_cannot_be_in_is_none(database: running.Database, url: Any) -> None:
    bare(SQLALCHEMY_DATABASE_URI=url)
    assert config.current().database_url is None


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg2://u:se+cr%40et@h:5433/shop?options=-c+search_path%3Djobs",
        sa.URL.create("postgresql", "u", "a b%/@?é", "h", database="shop", query={"options": "-c search_path=jobs"}),
        "postgresql://u:100%@h/shop",
        "postgresql+psycopg2://u@/shop?host=a:1&host=b:2",
        "postgresql+psycopg2://u@/shop?host=a,b&port=1,2",
        "postgresql+psycopg2://u@[::1]:5433/shop",
        "postgresql+psycopg2:///shop?host=/tmp",
    ],
    ids=str,
)
def test_url_is_read_as_sqlalchemy_reads_it(database: running.Database, url: Any) -> None:
    """libpq knows no + for a space, and one host= only; and SQLAlchemy takes a % that is not escaped."""
    bare(SQLALCHEMY_DATABASE_URI=url)
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg2"))
    _, parameters = engine.dialect.create_connect_args(engine.url)
    read = psycopg2.extensions.parse_dsn(config.current().require_database_url())
    assert read == {name: str(value) for name, value in parameters.items()}


def test_parameter_of_another_driver_is_refused_where_the_database_is_needed(database: running.Database) -> None:
    bare(SQLALCHEMY_DATABASE_URI="postgresql+asyncpg://u:hunter2@h/shop?ssl=require")

    @job
    def work() -> None: ...

    with pytest.raises(DatabaseUnavailable, match=r"postgresql://u:\*\*\*@h/shop\?ssl=require cannot be read by libpq"):
        work.delay()


def test_precedence_of_database_urls(database: running.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to greenjobs wins over what is said to SQLAlchemy, and that over what is said to nobody."""
    said = {"SQLALCHEMY_DATABASE_URI": "postgresql:///by-sqlalchemy"}
    monkeypatch.setenv("DATABASE_URL", "postgresql:///by-anybody")
    app = bare(**said)
    assert config.current().database_url == "postgresql:///by-sqlalchemy"
    monkeypatch.setenv("GREENJOBS_DATABASE_URL", "postgresql:///by-environment")
    bare(**said)
    assert config.current().database_url == "postgresql:///by-environment"
    bare(**said, GREENJOBS_DATABASE_URL="postgresql:///by-config")
    assert config.current().database_url == "postgresql:///by-config"
    greenjobs.configure(database_url="postgresql:///by-argument")
    assert config.current().database_url == "postgresql:///by-argument"
    with app.app_context():
        assert config.current().database_url == "postgresql:///by-argument"


def test_file_wins_over_what_is_said_to_sqlalchemy(
    database: running.Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.cfg").write_text("[greenjobs]\ndatabase_url = postgresql:///by-file\npool = 7\n")
    monkeypatch.chdir(tmp_path)
    bare(SQLALCHEMY_DATABASE_URI="postgresql:///by-sqlalchemy", GREENJOBS_POLL_INTERVAL=3)
    assert config.current().database_url == "postgresql:///by-file"
    assert (config.current().pool, config.current().poll_interval) == (7, 3.0)


def test_settings_are_spelled_as_in_the_environment(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GREENJOBS_POOL", "8")
    bare(GREENJOBS_POOL=9, GREENJOBS_DEFAULT_QUEUE="web", GREENJOBS_KEEP_FAILED="1 day", GREENJOBS_GRACE=None)
    settings = config.current()
    assert (settings.pool, settings.default_queue, settings.keep_failed, settings.grace) == (9, "web", 86_400.0, 30.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"GREENJOBS_POOLS": 5}, "GREENJOBS_POOLS: .*did you mean pool"),
        ({"GREENJOBS_POOL": 0}, r"pool is 0 \(GREENJOBS_POOL in app.config\); the value must be a whole number"),
        ({"GREENJOBS_PROCESSES": 2}, "GREENJOBS_PROCESSES, which counts before the application is loaded"),
        ({"GREENJOBS_APP": "x"}, "GREENJOBS_APP, which counts before"),
        ({"GREENJOBS_JOIN_SESSION": "no"}, "GREENJOBS_JOIN_SESSION is 'no' .*must be True or False"),
    ],
    ids=str,
)
def test_wrong_setting_is_refused_when_the_application_is_set_up(
    database: running.Database, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bare(**settings)


def test_copy_of_the_environment_in_the_configuration_is_no_mistake(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GREENJOBS_PROCESSES", "2")
    bare(GREENJOBS_PROCESSES="2")
    assert config.current().processes == 2


def test_setting_that_came_too_late_is_said(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    app = bare(GREENJOBS_DATABASE_URL=database.url, GREENJOBS_POOL=3)
    app.config.update(GREENJOBS_POOL=4, GREENJOBS_JOIN_SESSION=False, SQLALCHEMY_DATABASE_URI="postgresql:///other")
    for _ in range(2):
        with app.app_context():
            assert config.current().pool == 3
    (record,) = (record for record in caplog.records if record.name == "greenjobs.contrib.flask")
    said = "GREENJOBS_POOL, SQLALCHEMY_DATABASE_URI, GREENJOBS_JOIN_SESSION after GreenJobs had read it"
    assert said in record.getMessage()


def test_database_that_came_too_late_is_refused_with_the_reason(database: running.Database) -> None:
    app = bare()
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql:///shop"

    @job
    def work() -> None: ...

    message = "No database is named, .*'bare' got SQLALCHEMY_DATABASE_URI after .* when app.config is complete"
    with app.app_context(), pytest.raises(ConfigError, match=message):
        work.delay()
    with pytest.raises(ConfigError, match=message):
        app.extensions["greenjobs"].adopt()


def test_application_is_set_up_once(database: running.Database) -> None:
    app = bare()
    with pytest.raises(ConfigError, match="has been set up for the application 'bare' already"):
        GreenJobs().init_app(app)


def test_current_app_stands_for_the_application(database: running.Database) -> None:
    app = flask.Flask("shop")
    with app.app_context():
        GreenJobs(flask.current_app)
    with app.extensions["greenjobs"].context():
        assert flask.current_app.name == "shop"


@pytest.mark.parametrize("given", [None, "shop", flask.Blueprint("shop", __name__), flask.Flask], ids=repr)
def test_what_is_no_application_is_refused(database: running.Database, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"init_app takes the application, a Flask object, not "):
        GreenJobs().init_app(given)


def test_of_several_applications_the_active_one_says_where_a_job_goes(
    database: running.Database, server_url: str, migrated_template: str
) -> None:
    with databases.fresh(server_url, template=migrated_template) as other_url, running.application(other_url) as other:
        greenjobs.configure()
        jobs = GreenJobs()
        apps = [flask.Flask("first"), flask.Flask("second")]
        for app, url, queue in zip(apps, (database.url, other_url), ("one", "two"), strict=True):
            app.config.update(GREENJOBS_DATABASE_URL=url, GREENJOBS_DEFAULT_QUEUE=queue)
            jobs.init_app(app)

        @job
        def work() -> None: ...

        with apps[0].app_context():
            work.delay()
            with apps[1].app_context():
                work.delay()
            work.delay()
        work.delay()  # outside: as in the application that was set up last
        assert database.column("SELECT queue FROM background_jobs") == ["one", "one"]
        assert other.column("SELECT queue FROM background_jobs") == ["two", "two"]


def test_application_without_the_extension_has_the_settings_of_the_process(database: running.Database) -> None:
    bare(GREENJOBS_POOL=9)
    with flask.Flask("other").app_context():
        assert config.current().pool == 9


# --- a context for every job ------------------------------------------------------------------------------------------


def work_off(app: flask.Flask, *jobs: Any, pool: int = 10) -> None:
    runner = Runner(context=app).register(*jobs).configure_queue("default", pool=pool).shutdown_when_queue_empty()
    app.extensions["greenjobs"].equip(runner)
    assert runner.start().wait_for_shutdown(running.PATIENCE_SECONDS)


def test_fifty_jobs_at_once_share_nothing(database: running.Database) -> None:
    """Context, g, session, connection, identity map, and what extensions put into g, such as locale and user."""
    app = make_shop(database.url)
    all_are_there, here = Event(), set[int]()
    contexts, sessions, backends, failures = set[int](), set[int](), set[int](), list[str]()
    torn_down: list[Any] = []

    @app.teardown_appcontext
    def note(error: BaseException | None) -> None:
        torn_down.append((flask.g.get("user"), error))

    @job
    def work(number: int) -> None:
        if list(flask.g) or db.session.new or db.session.identity_map:
            failures.append(f"job {number} found {list(flask.g)}, {list(db.session.new)}")
        flask.g.user = flask.g.locale = number
        mine = Order(customer=f"customer {number}")
        db.session.add(mine)
        db.session.flush()
        (shared,) = db.session.scalars(sa.select(Order).where(Order.customer == "shared"))
        shared.note = f"of {number}"  # never flushed: only this job's object may have it
        here.add(number)
        if len(here) == 50:
            all_are_there.set()
        assert all_are_there.wait(running.PATIENCE_SECONDS)
        gevent.sleep(0)
        with db.session.no_autoflush:
            backends.add(db.session.scalar(sa.text("SELECT pg_backend_pid()")))
        contexts.add(id(flask.globals.app_ctx._get_current_object()))
        sessions.add(id(db.session()))
        if (flask.g.user, flask.g.locale, shared.note, flask.current_app._get_current_object()) != (
            *(number, number, f"of {number}"),
            app,
        ):
            failures.append(f"job {number} has {flask.g.user}, {shared.note}")
        if set(db.session.identity_map.values()) != {mine, shared}:
            failures.append(f"job {number} sees {list(db.session.identity_map.values())}")
        if number % 2:
            raise LookupError(number)
        db.session.expire(shared)
        db.session.commit()

    with app.app_context():
        db.session.add(Order(customer="shared"))
        db.session.commit()
    work.options(max_retries=0).delay_many([(number,) for number in range(50)])
    work_off(app, work, pool=50)
    assert failures == []
    assert (len(contexts), len(sessions), len(backends)) == (50, 50, 50)
    assert database.count("state = 'failed'") == 25 and database.count() == 25
    assert database.value("SELECT count(*) FROM shop_order WHERE customer <> 'shared'") == 25
    of_jobs = [(user, error) for user, error in torn_down if user is not None]
    assert sorted(user for user, _ in of_jobs) == list(range(50))
    assert all(isinstance(error, LookupError) == bool(user % 2) for user, error in of_jobs)
    assert not db.session.registry.registry
    assert [each.pool.checkedout() for each in shops.engines(app)] == [0]


def test_jobs_one_after_the_other_share_nothing(database: running.Database) -> None:
    """A carrier runs them in one greenlet, and contexts may come to lie at the same address."""
    app = make_shop(database.url)
    found: list[Any] = []

    @job
    def work(number: int) -> None:
        found.append((dict(flask.g.__dict__), list(db.session.new), len(db.session.identity_map)))
        flask.g.user = number
        db.session.add(Order(customer="left behind"))

    work.delay_many([(number,) for number in range(200)])
    work_off(app, work, pool=1)
    assert found == [({}, [], 0)] * 200
    assert not db.session.registry.registry


def test_session_is_closed_where_a_function_of_teardown_fails(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Flask then calls no other, that of Flask-SQLAlchemy included."""
    app = make_shop(database.url)
    found: list[Any] = []

    @app.teardown_appcontext
    def fail(error: BaseException | None) -> None:
        raise OSError("cannot tidy up")

    @job
    def work() -> None:
        found.append(list(db.session.new))
        db.session.add(Order(customer="left behind"))
        db.session.execute(sa.text("SELECT 1"))

    work.delay_many([()] * 20)
    work_off(app, work, pool=1)
    assert found == [[]] * 20
    assert database.count() == 0
    assert "cannot tidy up" in caplog.text
    assert not db.session.registry.registry
    assert [each.pool.checkedout() for each in shops.engines(app)] == [0]


@pytest.mark.parametrize("teardown_fails", [False, True])
def test_context_that_a_job_never_popped_ends_with_it(
    database: running.Database, caplog: pytest.LogCaptureFixture, teardown_fails: bool
) -> None:
    """With it on top, the session of the job itself would live on, and a row that was written there stay locked."""
    app = make_shop(database.url)
    ended: list[Any] = []

    @app.teardown_appcontext
    def end(error: BaseException | None) -> None:
        ended.append(flask.g.get("name"))
        if teardown_fails:
            raise OSError("cannot tidy up")

    @job
    def work() -> None:
        for name in ("outer", "inner"):
            db.session.add(Order(customer="left behind"))
            db.session.flush()
            flask.g.name = name
            if name == "outer":
                app.app_context().push()

    work.delay()
    work_off(app, work, pool=1)
    assert ended == ["inner", "outer"]
    assert "Popped wrong app context" not in caplog.text
    assert not db.session.registry.registry
    assert [each.pool.checkedout() for each in shops.engines(app)] == [0]


def test_job_cut_off_in_the_database_leaves_no_broken_connection(database: running.Database) -> None:
    app = make_shop(database.url, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0})

    @job(max_retries=0)
    def work(seconds: float) -> None:
        db.session.execute(sa.text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})

    cut_off = work.options(hard_timeout=0.2).delay(running.PATIENCE_SECONDS)
    work_off(app, work, pool=1)
    assert database.value("SELECT errors -> 0 ->> 'error' FROM background_jobs") == "JobHardTimeout"
    handle = work.delay(0)
    work_off(app, work, pool=1)
    assert (database.state(cut_off.id), database.state(handle.id)) == ("failed", None)
    assert not database.rows(
        "SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND query LIKE '%%pg_sleep%%' AND state = 'active' AND pid <> pg_backend_pid()"
    )


def test_job_needs_no_context_of_a_request(database: running.Database) -> None:
    app = make_shop(database.url)
    seen: list[bool] = []

    @job
    def work() -> None:
        seen.append(flask.has_request_context())

    work.delay()
    work_off(app, work)
    assert seen == [False]


def test_application_is_the_context_of_its_runner(database: running.Database) -> None:
    app = make_shop(database.url)
    seen: list[Any] = []

    @job
    def work() -> None:
        seen.append(current_job.context)

    work.delay()
    work_off(app, work)
    assert seen == [app]


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"pool_size": 5, "max_overflow": 10}, "up to 20 jobs run here at a time, and SQLAlchemy lends them 15"),
        ({"pool_size": 5, "max_overflow": 15}, ""),
        ({"pool_size": 5, "max_overflow": -1}, ""),
        ({"pool_size": 0}, ""),
        ({"poolclass": sa.pool.NullPool}, ""),
        ({"poolclass": sa.pool.SingletonThreadPool}, ""),
    ],
    ids=str,
)
def test_too_few_connections_for_all_jobs_are_warned_of(
    database: running.Database, caplog: pytest.LogCaptureFixture, options: dict[str, Any], warned: str
) -> None:
    app = make_shop(database.url, SQLALCHEMY_ENGINE_OPTIONS=options)

    @job(queue="mail")
    def work() -> None: ...

    handle = Runner().register(work).configure_queue("mail", pool=15).configure_queue("slow", pool=5).prepare()
    app.extensions["greenjobs"].check(handle)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == bool(warned)
    assert not warned or (warned in messages[0] and '"pool_size": 20 into SQLALCHEMY_ENGINE_OPTIONS' in messages[0])


# --- commands ---------------------------------------------------------------------------------------------------------

APPLICATION = """
from flask import Flask, current_app
from flask_sqlalchemy import SQLAlchemy
from greenjobs import green, job
from greenjobs.contrib.flask import GreenJobs

db = SQLAlchemy()
jobs = GreenJobs()

@job(queue="mail")
def send(to):
    print(f"{current_app.name} {current_app.config['GREETING']} {to} {green.missing_patches()}", flush=True)
    print(f"rows: {db.session.execute(db.text('SELECT 5')).scalar()}", flush=True)

def create_app(greeting="greets"):
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = URL
    app.config["GREENJOBS_POOL"] = 30
    app.config["GREETING"] = greeting
    db.init_app(app)
    jobs.init_app(app)

    @app.cli.command()
    def order():
        send.delay("Ann")
        db.session.commit()

    return app
"""


@pytest.fixture
def folder(tmp_path: Path, database_url: str) -> Path:
    """An application with a factory, the database of which only its configuration names; and one that it has made."""
    url = databases.sqlalchemy_url(database_url)
    processes.write_application(tmp_path, f"URL = {url!r}\n{APPLICATION}", name="shop.py")
    return tmp_path


@pytest.fixture
def database_of_folder(folder: Path, database_url: str) -> Iterator[running.Database]:
    database = running.Database(database_url)
    yield database
    database.connection.close()


def flask_command(folder: Path, *arguments: str, app: str = "shop", status: int = 0) -> str:
    return processes.run("flask", "--app", app, *arguments, folder=folder, status=status)


@pytest.mark.parametrize(
    ("app", "greeting"),
    [
        ("shop", "greets"),
        ("shop:create_app", "greets"),
        ("shop:create_app('hails')", "hails"),
        ("wsgi", "welcomes"),
        ("wsgi:application", "welcomes"),
        ("tasks", "welcomes"),
    ],
)
def test_greenjobs_run_works_for_the_application_that_flask_finds(
    folder: Path, database_of_folder: running.Database, app: str, greeting: str
) -> None:
    processes.write_application(folder, "import shop\napplication = shop.create_app('welcomes')", name="wsgi.py")
    processes.write_application(folder, "from wsgi import shop as module_of_jobs", name="tasks.py")
    flask_command(folder, "order")
    output = processes.run("greenjobs", "run", "--app", app, "--until-empty", folder=folder)
    assert f"shop {greeting} Ann ()" in output
    assert "rows: 5" in output
    assert "queues: mail (30 at a time)" in output
    assert "up to 30 jobs run here at a time, and SQLAlchemy lends them 15 connections" in output
    assert database_of_folder.count() == 0


def test_argument_wins_over_the_configuration_of_the_application(folder: Path) -> None:
    flask_command(folder, "order")
    output = processes.run("greenjobs", "run", "--app", "shop", "--pool", "15", "--until-empty", folder=folder)
    assert "queues: mail (15 at a time)" in output
    assert "SQLAlchemy lends" not in output


def test_module_without_an_application_is_refused(folder: Path) -> None:
    processes.write_application(folder, "from shop import send", name="tasks.py")
    output = processes.run("greenjobs", "run", "--app", "tasks", folder=folder, status=2)
    assert "it is not clear in which" in output and "Traceback" not in output


def test_file_with_two_applications_is_refused_by_its_name(tmp_path: Path, database_url: str) -> None:
    source = """
        from flask import Flask
        from greenjobs import job
        from greenjobs.contrib.flask import GreenJobs

        one, two = Flask("one"), Flask("two")
        GreenJobs(one), GreenJobs(two)

        @job
        def work(): ...
        """
    (tmp_path / "app.py").write_text(textwrap.dedent(source))
    printed = processes.run("greenjobs", "run", folder=tmp_path, database_url=database_url, status=2)
    assert "app is 'app.py', and jobs are to run in a Flask application, but it is not clear in which" in printed


def test_module_that_only_asks_for_the_url_needs_no_application(tmp_path: Path, database_url: str) -> None:
    code = """
    from greenjobs import job
    from greenjobs.contrib.flask import sqlalchemy_url

    @job
    def work(): ...

    print(sqlalchemy_url(), flush=True)
    """
    processes.write_application(tmp_path, code)
    output = processes.run("greenjobs", "run", "--until-empty", folder=tmp_path, database_url=database_url)
    assert "postgresql+psycopg2://" in output


def test_flask_greenjobs_run_works_in_a_fresh_interpreter(folder: Path, database_of_folder: running.Database) -> None:
    """Patched before anything was imported, as its jobs say."""
    flask_command(folder, "order")
    arguments = ("greenjobs", "run", "--until-empty", "--queue", "mail:7")
    output = flask_command(folder, *arguments, app="shop:create_app('hails')")
    assert "shop hails Ann ()" in output
    assert "queues: mail (7 at a time)" in output
    assert database_of_folder.count() == 0


def test_flask_greenjobs_run_finds_the_file_that_flask_finds(folder: Path) -> None:
    processes.write_application(folder, "import shop\napplication = shop.create_app('welcomes')", name="wsgi.py")
    processes.write_application(folder, "raise AssertionError('flask prefers wsgi.py')", name="app.py")
    processes.run("flask", "order", folder=folder)
    assert "shop welcomes Ann ()" in processes.run("flask", "greenjobs", "run", "--until-empty", folder=folder)


def test_flask_greenjobs_run_is_stopped_by_a_signal(folder: Path) -> None:
    with processes.start("flask", "--app", "shop", "greenjobs", "run", folder=folder) as process:
        process.wait_for_line(r"greenjobs\.cli: jobs: send")
        process.terminate()
        assert process.wait() == 0


def test_flask_greenjobs_run_with_a_supervisor(folder: Path) -> None:
    flask_command(folder, "order")
    command = ("flask", "--app", "shop", "greenjobs", "run", "--processes", "2")
    with processes.start(*command, folder=folder) as process:
        process.wait_for_line(r"shop greets Ann \(\)")
        process.terminate()
        assert process.wait() == 0


def test_flask_greenjobs_knows_the_database_of_the_application(
    tmp_path: Path, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = databases.sqlalchemy_url(empty_database_url)
    processes.write_application(tmp_path, f"URL = {url!r}\n{APPLICATION}", name="shop.py")
    assert "applied 0001_background_jobs" in flask_command(tmp_path, "greenjobs", "migrate")
    assert flask_command(tmp_path, "greenjobs", "migrate", "--check") == "up to date\n"
    flask_command(tmp_path, "order")
    assert "no live runners" in flask_command(tmp_path, "greenjobs", "status")
    assert " send " in flask_command(tmp_path, "greenjobs", "jobs", "list")
    assert "cancelled 1 job: 1" in flask_command(tmp_path, "greenjobs", "jobs", "cancel", "1", "--yes")


def test_flask_greenjobs_lists_the_commands_of_greenjobs(folder: Path) -> None:
    from greenjobs.cli import main

    output = flask_command(folder, "greenjobs", "--help")
    assert all(f"\n  {name} " in output for name in main.commands)


def test_help_of_flask_greenjobs_run_is_that_of_greenjobs_run(folder: Path) -> None:
    assert "--until-empty" in flask_command(folder, "greenjobs", "run", "--help")


def test_application_that_was_handed_over_as_an_object_cannot_be_run_elsewhere(folder: Path) -> None:
    processes.write_application(
        folder,
        """
        from flask.cli import FlaskGroup
        from shop import create_app

        FlaskGroup(create_app=create_app)()
        """,
        name="manage.py",
    )
    output = processes.run("python", "manage.py", "greenjobs", "run", folder=folder, status=2)
    assert "name it, as in --app 'myapp:create_app()'" in output
    named = ("greenjobs", "run", "--app", "shop:create_app()", "--until-empty")
    assert "queues: mail" in processes.run("python", "manage.py", *named, folder=folder)


def test_extension_loads_neither_gevent_nor_sqlalchemy(folder: Path) -> None:
    code = """
import sys
from flask import Flask
from greenjobs.contrib.flask import GreenJobs
GreenJobs(Flask("bare"))
print({"gevent", "sqlalchemy", "flask_sqlalchemy"} & set(sys.modules))
"""
    assert processes.run("python", "-c", code, folder=folder) == "set()\n"


def test_application_is_not_kept_alive(database: running.Database) -> None:
    import weakref

    app = bare()
    gone = weakref.ref(app)
    del app
    gc.collect()
    assert gone() is None
