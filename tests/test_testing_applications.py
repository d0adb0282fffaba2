"""Jobs in tests are surrounded, and complete in their own transactions, as in a runner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flask
import psycopg2
import pytest
import running
import shops
from shops import Order, db, make_shop

import greenjobs
from greenjobs import current_job, job, surroundings, testing
from greenjobs.errors import CompletionError


@pytest.fixture
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[running.Database]:
    with shops.application(database_url, monkeypatch) as database:
        database.rows("CREATE TABLE notes (text text)")
        yield database


@contextlib.contextmanager
def connected(database: running.Database) -> Iterator[Any]:
    with contextlib.closing(psycopg2.connect(database.url)) as connection:
        yield connection


def note(connection: Any, text: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO notes VALUES (%s)", (text,))


def test_drained_job_completes_in_its_own_transaction(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url)

    @job
    def follow_up() -> None: ...

    @job
    def work() -> None:
        with current_job.transaction() as connection:
            note(connection, "done")
            follow_up.delay()

    work.delay()
    assert [(ran.job_type, ran.outcome) for ran in testing.drain()] == [("work", "done"), ("follow_up", "done")]
    assert database.column("SELECT text FROM notes") == ["done"]
    assert database.count() == 0


def test_drained_job_that_fails_after_its_transaction_is_done(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url)

    @job
    def work() -> None:
        with current_job.transaction():
            pass
        raise ValueError

    work.delay()
    (ran,) = testing.drain()
    assert (ran.outcome, type(ran.error)) == ("done", ValueError)
    assert database.count() == 0


def test_job_that_leaves_its_transaction_open_fails_in_a_test_too(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url)

    @job
    def work() -> None:
        current_job.transaction().__enter__()

    with pytest.raises(CompletionError):
        testing.perform(work)


def test_drain_says_that_a_job_completes_on_another_connection_than_that_of_the_test(
    database: running.Database,
) -> None:
    greenjobs.configure(database_url=database.url)

    @job
    def work() -> None:
        with connected(database) as other, current_job.transaction(other):
            note(other, "never")

    with connected(database) as connection, testing.using(connection):
        work.delay()
        with pytest.raises(testing.DrainError, match=r"another connection than the test is using"):
            testing.drain()
    assert database.column("SELECT text FROM notes") == []


@pytest.mark.parametrize("mode", ["inline", "perform"])
def test_transaction_of_a_job_that_is_nowhere_stored_commits(database: running.Database, mode: str) -> None:
    with connected(database) as connection:

        @job
        def work() -> None:
            with current_job.transaction(connection):
                note(connection, "done")

        if mode == "perform":
            testing.perform(work)
        else:
            with testing.inline():
                work.delay()
    assert database.column("SELECT text FROM notes") == ["done"]


def test_job_in_a_test_is_lent_connections(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url)

    @job
    def work() -> None:
        with greenjobs.connection() as connection:
            note(connection, "lent")

    testing.perform(work)
    assert database.column("SELECT text FROM notes") == ["lent"]


def test_job_in_a_test_has_the_surroundings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "everywhere", [])
    seen: list[str] = []

    @surroundings.surround
    @contextlib.contextmanager
    def around() -> Iterator[None]:
        seen.append("begin")
        yield
        seen.append("end")

    @job(name="surrounded")
    def work() -> None:
        seen.append("work")

    testing.perform(work)
    assert seen == ["begin", "work", "end"]


@job(name="name_of_application")
def name_of_application() -> str:
    flask.g.seen = True
    return flask.current_app.name


def test_job_in_a_test_has_a_context_of_the_active_application(database: running.Database) -> None:
    active, latest = make_shop(database.url), make_shop(database.url)
    active.name, latest.name = "active", "latest"
    with active.app_context():
        assert testing.perform(name_of_application).value == "active"
        assert "seen" not in flask.g
    assert testing.perform(name_of_application).value == "latest"


def test_drained_job_works_with_the_session_in_the_transaction_of_the_test(database: running.Database) -> None:
    app = make_shop(database.url)

    @job
    def confirm(order_id: int) -> None:
        order = db.session.get(Order, order_id)
        with current_job.transaction(db.session):
            order.note = "confirmed"

    with app.app_context():
        db.session.configure(join_transaction_mode="create_savepoint")
        engine = db.engines[None]
        with engine.connect() as connection, connection.begin() as transaction:
            db.engines[None] = connection  # type: ignore[index]
            try:
                with testing.using(connection):
                    order = Order(customer="Ann")
                    db.session.add(order)
                    db.session.flush()
                    confirm.delay(order.id)
                    db.session.commit()
                    assert [ran.outcome for ran in testing.drain()] == ["done"]
                    assert testing.enqueued_jobs() == []
                    db.session.refresh(order)
                    assert order.note == "confirmed"
            finally:
                db.session.remove()
                db.session.session_factory.configure(join_transaction_mode="conditional_savepoint")
                db.engines[None] = engine  # type: ignore[index]
                transaction.rollback()
    assert database.value("SELECT count(*) FROM shop_order") == 0
