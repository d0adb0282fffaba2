"""`.delay()` in an application context with Flask-SQLAlchemy: the job and the session share one fate."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import databases
import flask
import gevent
import pytest
import running
import shops
import sqlalchemy as sa
from gevent.event import Event
from shops import Order, db, make_shop

import greenjobs
from greenjobs import config, job
from greenjobs.contrib import addresses, joining
from greenjobs.runner import Runner


@pytest.fixture
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[running.Database]:
    with shops.application(database_url, monkeypatch) as database:
        yield database


def declare_job() -> Any:
    @job(name="confirm", max_retries=0)
    def confirm(customer: str) -> None: ...

    return confirm


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said about jobs and sessions."""
    return [record.getMessage() for record in caplog.records if record.name == joining.__name__]


def orders(database: running.Database) -> list[str]:
    return database.column("SELECT customer FROM shop_order ORDER BY id")


def with_view(app: flask.Flask, body: Callable[[], Any], times: int = 1) -> list[int]:
    """Ask for a view that does this, so often; returns the statuses."""

    @app.post("/orders")
    def place_order() -> str:
        body()
        return ""

    app.config["PROPAGATE_EXCEPTIONS"] = False
    return [app.test_client().post("/orders").status_code for _ in range(times)]


def test_job_of_a_view_is_committed_with_its_session(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    confirm = declare_job()

    def body() -> None:
        db.session.add(Order(customer="Ann"))
        confirm.delay("Ann")
        assert database.count() == 0
        db.session.commit()
        assert database.count() == 1

    assert with_view(make_shop(database.url), body) == [200]
    assert (orders(database), database.count(), warnings_of(caplog)) == (["Ann"], 1, [])


def test_job_is_rolled_back_with_its_session(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    confirm = declare_job()

    def body() -> None:
        db.session.add(Order(customer="Ann"))
        confirm.delay("Ann")
        db.session.rollback()

    assert with_view(make_shop(database.url), body) == [200]
    assert (database.count(), warnings_of(caplog)) == (0, [])


def test_view_that_fails_takes_its_job_along(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    confirm = declare_job()

    def body() -> None:
        confirm.delay("Ann")
        raise LookupError("mine")

    assert with_view(make_shop(database.url), body) == [500]
    assert (database.count(), warnings_of(caplog)) == (0, [])


def test_view_that_does_not_commit_is_warned_of_once(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    confirm = declare_job()
    assert with_view(make_shop(database.url), lambda: confirm.delay("Ann"), times=3) == [200] * 3
    (warning,) = warnings_of(caplog)
    assert warning.startswith("the view place_order enqueued job confirm in its session, which was never committed")
    assert "db.session.commit()" in warning and ".options(independent=True)" in warning
    assert database.count() == 0
    (record,) = (record for record in caplog.records if record.name == joining.__name__)
    assert (record.levelno, record.job_type, record.place) == (  # type: ignore[attr-defined]
        *(logging.WARNING, "confirm", "the view place_order"),
    )


def test_job_after_the_last_commit_is_warned_of(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    confirm = declare_job()

    def body() -> None:
        confirm.delay("Ann")
        db.session.commit()
        confirm.delay("Bob")

    with_view(make_shop(database.url), body)
    assert len(warnings_of(caplog)) == 1
    assert database.column("SELECT data ->> 'customer' FROM background_jobs") == ["Ann"]


def test_session_that_was_removed_without_commit_is_warned_of(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    confirm = declare_job()

    def body() -> None:
        confirm.delay("Ann")
        db.session.remove()
        confirm.delay("Bob")
        db.session.commit()

    with_view(make_shop(database.url), body)
    assert len(warnings_of(caplog)) == 1


def test_commit_in_a_function_of_teardown_is_one(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever was set up first."""
    confirm = declare_job()
    app = make_shop(database.url)

    @app.teardown_appcontext
    def commit(error: BaseException | None) -> None:
        db.session.commit()

    with_view(app, lambda: confirm.delay("Ann"))
    assert (database.count(), warnings_of(caplog)) == (1, [])


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("hook", ["after_commit", "after_rollback"])
def test_job_of_a_hook_after_the_end_of_the_transaction_is_committed_at_once(
    database: running.Database, caplog: pytest.LogCaptureFixture, hook: str, joins: bool
) -> None:
    """There the session takes no statements: SQLAlchemy raises."""
    confirm = declare_job()

    def after_it(_: Any) -> None:
        confirm.delay("Ann")

    def body() -> None:
        db.session.add(Order(customer="Ann"))
        db.session.flush()
        db.session.commit() if hook == "after_commit" else db.session.rollback()

    app = make_shop(database.url, GREENJOBS_JOIN_SESSION=joins)
    sa.event.listen(db.session, hook, after_it)
    try:
        assert with_view(app, body) == [200]
    finally:
        sa.event.remove(db.session, hook, after_it)
    assert (database.count(), warnings_of(caplog)) == (1, [])


def test_session_whose_flush_failed_refuses_the_job(database: running.Database) -> None:
    confirm = declare_job()
    with make_shop(database.url).app_context():
        db.session.add_all([Order(id=1, customer="Ann"), Order(id=1, customer="Bob")])
        with pytest.raises(sa.exc.IntegrityError):
            db.session.flush()
        with pytest.raises(sa.exc.PendingRollbackError):
            confirm.delay("Ann")
        db.session.rollback()
    assert database.count() == 0


@pytest.mark.parametrize(("releases", "commits"), [(True, True), (True, False), (False, True), (False, False)])
def test_savepoint_decides_only_for_its_own_jobs(
    database: running.Database, caplog: pytest.LogCaptureFixture, releases: bool, commits: bool
) -> None:
    confirm = declare_job()

    def body() -> None:
        savepoint = db.session.begin_nested()
        with db.session.begin_nested():
            confirm.delay("Ann")
        savepoint.commit() if releases else savepoint.rollback()
        if commits:
            db.session.commit()

    with_view(make_shop(database.url), body)
    assert database.count() == (releases and commits)
    assert len(warnings_of(caplog)) == (releases and not commits)


def test_savepoint_that_is_rolled_back_leaves_the_jobs_before_it_to_the_commit(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    confirm = declare_job()

    def body() -> None:
        confirm.delay("Ann")
        savepoint = db.session.begin_nested()
        confirm.delay("Bob")
        savepoint.rollback()

    with_view(make_shop(database.url), body)
    assert len(warnings_of(caplog)) == 1


def test_runner_cannot_have_the_job_before_the_commit(database: running.Database) -> None:
    confirm_ran = Event()
    app = make_shop(database.url)
    seen: list[Any] = []

    @job
    def look_at(customer: str) -> None:
        seen.append(db.session.scalar(sa.select(Order.id).where(Order.customer == customer)))
        confirm_ran.set()

    runner = Runner(context=app).register(look_at)
    app.extensions["greenjobs"].equip(runner)

    def body() -> None:
        look_at.delay("Ann")
        db.session.add(Order(customer="Ann"))
        db.session.flush()
        assert not confirm_ran.wait(0.2)
        db.session.commit()

    with running.started(runner):
        assert with_view(app, body) == [200]
        assert confirm_ran.wait(running.PATIENCE_SECONDS)
    assert seen == [1]


def test_requests_at_once_each_decide_for_their_own_jobs(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    confirm = declare_job()
    app = make_shop(database.url)
    arrived = Event()
    count = [0]

    @app.post("/orders/<int:number>")
    def place_order(number: int) -> str:
        db.session.add(Order(customer=str(number)))
        confirm.delay(str(number))
        db.session.flush()
        count[0] += 1
        if count[0] == 30:
            arrived.set()
        assert arrived.wait(running.PATIENCE_SECONDS)
        db.session.commit() if number % 2 else db.session.rollback()
        return ""

    greenlets = [
        gevent.spawn(lambda number=number: app.test_client().post(f"/orders/{number}")) for number in range(30)
    ]
    gevent.joinall(greenlets, raise_error=True)
    assert [greenlet.value.status_code for greenlet in greenlets] == [200] * 30
    kept = {str(number) for number in range(30) if number % 2}
    assert set(orders(database)) == set(database.column("SELECT data ->> 'customer' FROM background_jobs")) == kept
    assert warnings_of(caplog) == []


def test_job_enqueued_in_a_job_joins_the_session_of_that_job(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    confirm = declare_job()
    app = make_shop(database.url)

    @job(max_retries=0)
    def place(customer: str) -> None:
        db.session.add(Order(customer=customer))
        confirm.delay(customer)
        if customer == "Ann":
            db.session.commit()
        elif customer == "Bob":
            raise LookupError

    place.delay_many([("Ann",), ("Bob",), ("Cleo",)])
    runner = Runner(context=app).register(place).shutdown_when_queue_empty()
    app.extensions["greenjobs"].equip(runner)
    assert runner.start().wait_for_shutdown(running.PATIENCE_SECONDS)
    assert orders(database) == ["Ann"]
    assert database.column("SELECT data ->> 'customer' FROM background_jobs WHERE job_type = 'confirm'") == ["Ann"]
    (warning,) = warnings_of(caplog)
    assert warning.startswith("the job place enqueued job confirm in its session, which was never committed")


def test_independent_call_is_committed_at_once(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    confirm = declare_job()

    def body() -> None:
        db.session.add(Order(customer="Ann"))
        confirm.options(independent=True).delay("Ann")
        assert database.count() == 1
        db.session.rollback()

    with_view(make_shop(database.url), body)
    assert (database.count(), orders(database), warnings_of(caplog)) == (1, [], [])


def test_given_connection_is_used_instead(database: running.Database) -> None:
    confirm = declare_job()

    def body() -> None:
        with db.engine.connect() as connection:
            confirm.options(connection=connection).delay("Ann")
            connection.commit()
        db.session.rollback()

    with_view(make_shop(database.url), body)
    assert database.count() == 1


def test_outside_of_a_context_a_job_is_committed_at_once(database: running.Database) -> None:
    confirm = declare_job()
    make_shop(database.url)
    confirm.delay("Ann")
    assert database.count() == 1


def test_context_of_another_application_does_not_join(database: running.Database) -> None:
    confirm = declare_job()
    make_shop(database.url)
    with flask.Flask("without").app_context():
        confirm.delay("Ann")
    assert database.count() == 1


def test_engine_in_autocommit_commits_the_job_at_once(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    confirm = declare_job()
    app = make_shop(database.url, SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": "AUTOCOMMIT"})
    with_view(app, lambda: confirm.delay("Ann"))
    assert (database.count(), warnings_of(caplog)) == (1, [])


def test_session_of_another_database_is_not_joined(
    database: running.Database, empty_database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    confirm = declare_job()
    app = make_shop(empty_database_url, GREENJOBS_DATABASE_URL=database.url)

    def body() -> None:
        db.session.add(Order(customer="Ann"))
        confirm.delay("Ann")
        assert database.count() == 1
        db.session.rollback()

    assert with_view(app, body) == [200]
    assert (database.count(), warnings_of(caplog)) == (1, [])


def test_engine_of_a_bind_is_joined_where_it_leads_to_the_jobs(
    database: running.Database, empty_database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    confirm = declare_job()
    binds = {"jobs": databases.sqlalchemy_url(database.url)}
    app = make_shop(empty_database_url, GREENJOBS_DATABASE_URL=database.url, SQLALCHEMY_BINDS=binds)

    def body() -> None:
        db.session.add(Order(customer="Ann"))
        confirm.delay("Ann")
        assert database.count() == 0
        db.session.commit()

    assert with_view(app, body) == [200]
    assert (database.count(), warnings_of(caplog)) == (1, [])


def test_tests_that_put_a_connection_in_place_of_the_engine_roll_all_of_it_back(database: running.Database) -> None:
    """The recipe of Flask-SQLAlchemy for tests that leave nothing behind."""
    confirm = declare_job()
    app = make_shop(database.url)

    def body() -> None:
        db.session.add(Order(customer="Ann"))
        confirm.delay("Ann")
        db.session.commit()

    engines = db._app_engines[app]
    engine = engines[None]
    with engine.connect() as connection:
        transaction = connection.begin()
        engines[None] = connection  # type: ignore[assignment]
        assert with_view(app, body) == [200]
        assert connection.scalar(sa.text("SELECT count(*) FROM background_jobs")) == 1
        transaction.rollback()
        engines[None] = engine
    assert (database.count(), orders(database)) == (0, [])


def test_many_calls_in_a_view_wake_a_runner_once(database: running.Database) -> None:
    confirm = declare_job()
    database.rows("LISTEN greenjobs")

    def body() -> None:
        for number in range(5):
            confirm.delay(str(number))
        db.session.commit()

    with_view(make_shop(database.url), body)
    database.rows("SELECT 1")
    assert [each.payload for each in database.connection.notifies] == ["*:default"]


def test_driver_that_jobs_cannot_share_is_warned_of_once(
    database: running.Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirm = declare_job()
    app = make_shop(database.url)
    (engine,) = shops.engines(app)
    monkeypatch.setattr(engine.dialect, "driver", "psycopg")
    assert with_view(app, lambda: confirm.delay("Ann"), times=2) == [200, 200]
    assert database.count() == 2
    (warning,) = warnings_of(caplog)
    assert "its engine uses psycopg; with psycopg2" in warning


# --- where jobs do not join -------------------------------------------------------------------------------------------


def flush_an_order() -> None:
    db.session.add(Order(customer="Ann"))
    db.session.flush()


def add_an_order() -> None:
    db.session.add(Order(customer="Ann"))


def insert_an_order() -> None:
    db.session.execute(sa.insert(Order).values(customer="Ann"))


def look_at_orders() -> None:
    db.session.scalars(sa.select(Order)).all()


def commit_an_order() -> None:
    flush_an_order()
    db.session.commit()


@pytest.mark.parametrize("changes", [flush_an_order, add_an_order, insert_an_order])
def test_job_that_is_ahead_of_the_changes_of_its_session_is_warned_of_once(
    database: running.Database, caplog: pytest.LogCaptureFixture, changes: Callable[[], None]
) -> None:
    confirm = declare_job()

    def body() -> None:
        changes()
        confirm.delay("Ann")
        db.session.commit()

    assert with_view(make_shop(database.url, GREENJOBS_JOIN_SESSION=False), body, times=2) == [200, 200]
    (warning,) = warnings_of(caplog)
    assert warning.startswith(
        "the view place_order enqueues job confirm, which is committed at once, while its session"
    )
    assert database.count() == 2


@pytest.mark.parametrize("before", [look_at_orders, commit_an_order, lambda: None])
def test_job_without_open_changes_is_not_warned_of(
    database: running.Database, caplog: pytest.LogCaptureFixture, before: Callable[[], None]
) -> None:
    confirm = declare_job()

    def body() -> None:
        before()
        confirm.delay("Ann")

    with_view(make_shop(database.url, GREENJOBS_JOIN_SESSION=False), body)
    assert (database.count(), warnings_of(caplog)) == (1, [])


def test_rollback_leaves_the_job_where_jobs_do_not_join(database: running.Database) -> None:
    confirm = declare_job()

    def body() -> None:
        confirm.delay("Ann")
        db.session.rollback()

    with_view(make_shop(database.url, GREENJOBS_JOIN_SESSION=False), body)
    assert database.count() == 1


def test_failed_transaction_does_not_keep_a_job_from_being_enqueued(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    confirm = declare_job()

    def body() -> None:
        with pytest.raises(sa.exc.ProgrammingError):
            db.session.execute(sa.text("SELECT nonsense"))
        confirm.delay("Ann")

    assert with_view(make_shop(database.url, GREENJOBS_JOIN_SESSION=False), body) == [200]
    assert (database.count(), warnings_of(caplog)) == (1, [])


@pytest.mark.parametrize("joins", [True, False])
def test_session_whose_connection_breaks_ends_with_its_request(database: running.Database, joins: bool) -> None:
    """Flask-SQLAlchemy would fail to roll back in the teardown, and leave the session to a later request."""
    confirm = declare_job()
    app = make_shop(database.url, GREENJOBS_JOIN_SESSION=joins)
    broken: list[int] = []

    def body() -> None:
        pid = db.session.scalar(sa.text("SELECT pg_backend_pid()"))
        if not broken:
            broken.append(pid)
            database.terminate(pid)
        confirm.delay("Ann")
        db.session.commit()

    assert with_view(app, body, times=2) == [500, 200]
    assert not db.session.registry.registry
    assert database.count("state = 'available'") == (1 if joins else 2)


def test_restart_of_the_server_fails_one_view_as_with_sqlalchemy_alone(database: running.Database) -> None:
    """SQLAlchemy then takes all connections that are as old for broken, not only the one that it tried."""
    confirm = declare_job()
    app = make_shop(database.url)

    def body() -> None:
        confirm.delay("Ann")
        db.session.commit()

    with app.app_context(), contextlib.ExitStack() as stack:
        opened = [stack.enter_context(db.engine.connect()) for _ in range(4)]
        pids = [connection.scalar(sa.text("SELECT pg_backend_pid()")) for connection in opened]
    for pid in pids:
        database.terminate(pid)
    assert with_view(app, body, times=4) == [500, 200, 200, 200]
    assert database.count() == 3


def test_looks_for_changes_come_to_an_end(database: running.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a round trip, which a view that only reads would pay for ever."""
    confirm = declare_job()
    asked: list[Any] = []
    monkeypatch.setattr(joining.inspection, "has_written", lambda connection: bool(asked.append(connection)))

    def body() -> None:
        look_at_orders()
        confirm.delay("Ann")

    with_view(make_shop(database.url, GREENJOBS_JOIN_SESSION=False), body, times=30)
    assert (len(asked), database.count()) == (20, 30)


# --- the same database ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "sqlalchemys"),
    [
        ("postgresql://h/shop", "postgresql+psycopg2://h/shop"),
        ("postgresql://ann@h:5432/shop", "postgresql+psycopg2://bob:secret@h/shop?sslmode=disable"),
        ("host=h dbname=shop", "postgresql+psycopg2://H:5432/shop"),
        ("postgresql://localhost/shop", "postgresql+psycopg2://127.0.0.1/shop"),
        ("postgresql:///shop?host=/tmp", "postgresql+psycopg2:///shop?host=/tmp"),
        ("postgresql:///shop", "postgresql+psycopg2:///shop"),
        ("postgresql://a:1,b:2/shop", "postgresql+psycopg2:///shop?host=b:2&host=a:1"),
        ("postgresql://h/shop?target_session_attrs=read-write", "postgresql+psycopg2://h/shop"),
        (
            "postgresql://h/shop?options=-csearch_path%3Djobs",
            "postgresql+psycopg2://h/shop?options=-csearch_path%3Djobs",
        ),
    ],
)
def test_two_ways_to_one_database(ours: str, sqlalchemys: str) -> None:
    assert addresses.of_url(ours) == addresses.of_engine(sa.create_engine(sqlalchemys)) != None  # noqa: E711


@pytest.mark.parametrize(
    ("ours", "sqlalchemys"),
    [
        ("postgresql://h/shop", "postgresql+psycopg2://h/other"),
        ("postgresql://h/shop", "postgresql+psycopg2://g/shop"),
        ("postgresql://h/shop", "postgresql+psycopg2://h:5433/shop"),
        ("postgresql://h/shop", "postgresql+psycopg2:///shop"),
        ("postgresql://h,g/shop", "postgresql+psycopg2://h/shop"),
        ("postgresql://h/shop?options=-csearch_path%3Djobs", "postgresql+psycopg2://h/shop"),
    ],
)
def test_two_databases(ours: str, sqlalchemys: str) -> None:
    assert addresses.of_url(ours) != addresses.of_engine(sa.create_engine(sqlalchemys))


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "postgresql+psycopg2://",
        "postgresql+psycopg2://h/shop?target_session_attrs=prefer-standby",
        "postgresql+psycopg2://h/shop?service=other",
    ],
)
def test_engine_of_which_nothing_is_certain(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGDATABASE", raising=False)
    assert addresses.of_engine(sa.create_engine(url)) is None


def test_environment_of_libpq_says_what_the_url_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in (("PGHOST", "h"), ("PGPORT", "6000"), ("PGDATABASE", "shop")):
        monkeypatch.setenv(variable, value)
    assert addresses.of_url("postgresql://") == addresses.of_url("postgresql://h:6000/shop")


def test_hook_costs_nothing_until_there_is_an_application() -> None:
    """As in a process that never imports Flask."""
    import subprocess
    import sys

    code = "from greenjobs import config, current, job; print(config.scoped, current.ambient)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "None None\n"


def test_settings_of_the_runner_decide_inside_its_jobs(
    database: running.Database, server_url: str, migrated_template: str
) -> None:
    """A runner that was given another database enqueues there what its jobs enqueue, and does not join."""
    confirm = declare_job()
    with databases.fresh(server_url, template=migrated_template) as other_url:
        app = make_shop(database.url)

        @job
        def place() -> None:
            confirm.delay("Ann")

        greenjobs.configure(database_url=other_url)
        assert config.current().database_url == other_url
        place.delay()
        runner = Runner(context=app).register(place).shutdown_when_queue_empty()
        app.extensions["greenjobs"].equip(runner)
        assert runner.start().wait_for_shutdown(running.PATIENCE_SECONDS)
        other = running.Database(other_url)
        assert (database.count(), other.column("SELECT job_type FROM background_jobs")) == (0, ["confirm"])
        other.connection.close()
