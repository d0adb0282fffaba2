"""Jobs in transactions of SQLAlchemy: there when they commit, gone when they roll back, with what they are about."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import databases
import gevent
import psycopg2
import pytest
import running
import sqlalchemy as sa
from gevent.event import Event
from psycopg2 import extras
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession
from waiting import eventually

from greenjobs import embedded, job, schedules
from greenjobs.call import BATCH_SIZE
from greenjobs.contrib import addresses
from greenjobs.contrib.sqlalchemy import sqlalchemy_url
from greenjobs.errors import DatabaseUnavailable, OptionError, PayloadError, SchemaError
from greenjobs.migrate import migrate
from greenjobs.runner import Runner


class Base(orm.DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    number: orm.Mapped[str] = orm.mapped_column(unique=True)


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        yield database


@pytest.fixture
def engine(database: running.Database) -> Iterator[sa.Engine]:
    engine = sa.create_engine(databases.sqlalchemy_url(database.url))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def declare_job() -> Any:
    @job(name="confirm")
    def confirm(number: str) -> None: ...

    return confirm


@contextlib.contextmanager
def a_connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        yield connection


@contextlib.contextmanager
def a_session(engine: sa.Engine) -> Iterator[orm.Session]:
    with orm.Session(engine) as session:
        yield session


@contextlib.contextmanager
def a_session_of_a_connection(engine: sa.Engine) -> Iterator[orm.Session]:
    with engine.connect() as connection, orm.Session(connection) as session:
        yield session


@contextlib.contextmanager
def a_scoped_session(engine: sa.Engine) -> Iterator[Any]:
    session = orm.scoped_session(orm.sessionmaker(engine))
    yield session
    session.remove()


KINDS = [a_connection, a_session, a_session_of_a_connection, a_scoped_session]

Given = Callable[[sa.Engine], Any]


@pytest.mark.parametrize("given", KINDS)
def test_job_is_there_when_the_transaction_commits(database: running.Database, engine: sa.Engine, given: Given) -> None:
    confirm = declare_job()
    with given(engine) as transaction:
        handle = confirm.options(connection=transaction).delay("A1")
        assert database.count() == 0
        transaction.commit()
    assert database.state(handle.id) == "available"


@pytest.mark.parametrize("given", KINDS)
def test_job_is_gone_when_the_transaction_rolls_back(
    database: running.Database, engine: sa.Engine, given: Given
) -> None:
    confirm = declare_job()
    with given(engine) as transaction:
        transaction.execute(sa.insert(Order).values(number="A1"))
        confirm.options(connection=transaction).delay("A1")
        transaction.rollback()
        transaction.execute(sa.insert(Order).values(number="A2"))
        transaction.commit()
    assert (database.count(), database.column("SELECT number FROM orders")) == (0, ["A2"])


@pytest.mark.parametrize("given", KINDS)
def test_savepoint_that_is_rolled_back_takes_only_its_own_jobs(
    database: running.Database, engine: sa.Engine, given: Given
) -> None:
    confirm = declare_job()
    with given(engine) as transaction:
        confirm.options(connection=transaction).delay("before")
        savepoint = transaction.begin_nested()
        confirm.options(connection=transaction).delay("undone")
        savepoint.rollback()
        with transaction.begin_nested():
            confirm.options(connection=transaction).delay("released")
        transaction.commit()
    assert database.column("SELECT data ->> 'number' FROM background_jobs ORDER BY id") == ["before", "released"]


def test_with_block_of_begin_commits_the_job(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    with engine.begin() as connection:
        confirm.options(connection=connection).delay("A1")
    with orm.Session(engine) as session, session.begin():
        confirm.options(connection=session).delay("A2")
    assert database.count() == 2


def test_error_in_the_block_takes_the_job_along(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    with pytest.raises(ZeroDivisionError), engine.begin() as connection:
        confirm.options(connection=connection).delay("A1")
        raise ZeroDivisionError
    assert database.count() == 0


def test_connection_that_is_closed_without_commit_takes_the_job_along(
    database: running.Database, engine: sa.Engine
) -> None:
    confirm = declare_job()
    with engine.connect() as connection:
        confirm.options(connection=connection).delay("A1")
    assert database.count() == 0


def test_nothing_is_flushed_and_both_are_committed(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    with orm.Session(engine) as session:
        order = Order(number="A1")
        session.add(order)
        confirm.options(connection=session).delay("A1")
        assert order in session.new
        session.commit()
    assert (database.count(), database.column("SELECT number FROM orders")) == (1, ["A1"])


def test_flush_that_fails_takes_the_job_along(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    database.rows("INSERT INTO orders (number) VALUES ('A1')")
    with orm.Session(engine) as session:
        session.add(Order(number="A1"))
        confirm.options(connection=session).delay("A1")
        with pytest.raises(sa.exc.IntegrityError):
            session.commit()
        session.rollback()
        session.commit()
    assert database.count() == 0


@pytest.mark.parametrize("given", KINDS)
def test_connection_that_breaks_under_a_job_is_forgotten(
    database: running.Database, engine: sa.Engine, given: Given
) -> None:
    """As where it breaks under a statement of SQLAlchemy's own; it would be rolled back otherwise, which fails."""
    confirm = declare_job()
    with given(engine) as transaction:
        pid = transaction.scalar(sa.text("SELECT pg_backend_pid()"))
        database.terminate(pid)
        with pytest.raises(psycopg2.OperationalError):
            confirm.options(connection=transaction).delay("A1")
        transaction.rollback()
        handle = confirm.options(connection=transaction).delay("A2")
        transaction.commit()
    assert (database.count(), database.state(handle.id)) == (1, "available")


def test_session_that_failed_says_so_until_it_is_rolled_back(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    database.rows("INSERT INTO orders (number) VALUES ('A1')")
    with orm.Session(engine) as session:
        with pytest.raises(sa.exc.IntegrityError):
            session.execute(sa.insert(Order).values(number="A1"))
        with pytest.raises(psycopg2.errors.InFailedSqlTransaction):
            confirm.options(connection=session).delay("A1")
        session.rollback()
        confirm.options(connection=session).delay("A2")
        session.commit()
    assert database.count() == 1


def test_after_the_commit_there_is_one_wake_up_and_none_before(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    database.rows("LISTEN greenjobs")
    with orm.Session(engine) as session:
        for number in range(3):
            confirm.options(connection=session).delay(str(number))
        confirm.options(connection=session).delay_many([("x",), ("y",)])
        database.rows("SELECT 1")
        assert database.connection.notifies == []
        session.commit()
    database.rows("SELECT 1")
    assert [each.payload for each in database.connection.notifies] == ["*:default"]


def test_after_a_rollback_there_is_no_wake_up(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    database.rows("LISTEN greenjobs")
    with orm.Session(engine) as session:
        confirm.options(connection=session).delay("A1")
        session.rollback()
    database.rows("SELECT 1")
    assert database.connection.notifies == []


def test_runner_sees_the_job_with_the_row_it_is_about(database: running.Database, engine: sa.Engine) -> None:
    seen: list[Any] = []
    ran = Event()

    @job(max_retries=0)
    def look_at(number: str) -> None:
        with orm.Session(engine) as session:
            seen.append(session.scalar(sa.select(Order.id).where(Order.number == number)))
        ran.set()

    with running.started(Runner().register(look_at)), orm.Session(engine) as session:
        look_at.options(connection=session).delay("A1")
        session.add(Order(number="A1"))
        session.flush()
        assert not ran.wait(0.2)
        session.commit()
        assert ran.wait(running.PATIENCE_SECONDS)
    assert seen == [1]


def test_many_transactions_at_once_each_take_their_own_jobs(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()

    def place(number: int) -> None:
        with orm.Session(engine) as session:
            session.add(Order(number=str(number)))
            confirm.options(connection=session).delay(str(number))
            session.flush()
            session.execute(sa.text("SELECT pg_sleep(0.01)"))
            session.commit() if number % 2 else session.rollback()

    gevent.joinall([gevent.spawn(place, number) for number in range(30)], raise_error=True)
    orders = set(database.column("SELECT number FROM orders"))
    assert len(orders) == 15
    assert set(database.column("SELECT data ->> 'number' FROM background_jobs")) == orders


def test_many_jobs_in_several_statements_are_there_all_or_none(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    calls = [(str(number),) for number in range(2 * BATCH_SIZE + 1)]
    with orm.Session(engine) as session:
        confirm.options(connection=session).delay_many(calls)
        session.rollback()
        assert database.count() == 0
        handles = confirm.options(connection=session).delay_many(calls)
        session.commit()
    assert database.count() == len({handle.id for handle in handles}) == len(calls)


def test_refused_arguments_leave_the_transaction_as_it_was(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    with orm.Session(engine) as session:
        session.add(Order(number="A1"))
        session.flush()
        with pytest.raises((PayloadError, TypeError)):
            confirm.options(connection=session).delay(object())
        session.commit()
    assert (database.count(), database.column("SELECT number FROM orders")) == (0, ["A1"])


@pytest.mark.parametrize("given", KINDS)
def test_engine_in_autocommit_commits_the_job_at_once(
    database: running.Database, engine: sa.Engine, given: Given
) -> None:
    confirm = declare_job()
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with given(autocommit) as transaction:
        confirm.options(connection=transaction).delay("A1")
        assert database.count() == 1
        confirm.options(connection=transaction).delay_many([(str(number),) for number in range(BATCH_SIZE + 1)])
        assert database.count() == BATCH_SIZE + 2
        transaction.rollback()
    assert database.count() == BATCH_SIZE + 2


def test_connection_of_an_autocommit_engine_is_a_transaction_again_in_the_next_loan(
    database: running.Database, engine: sa.Engine
) -> None:
    confirm = declare_job()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        confirm.options(connection=connection).delay("A1")
    with engine.connect() as connection:
        confirm.options(connection=connection).delay("A2")
        connection.rollback()
    assert database.count() == 1


def test_unique_job_is_enqueued_once_in_a_session(database: running.Database, engine: sa.Engine) -> None:
    @job(unique=True)
    def refresh(number: str) -> None: ...

    with orm.Session(engine) as session:
        first = refresh.options(connection=session).delay("A1")
        again = refresh.options(connection=session).delay("A1")
        session.commit()
    assert (again.duplicate, again.id) == (True, first.id)
    assert database.count() == 1


def test_session_of_several_engines_has_to_say_which(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    with orm.Session(binds={Order: engine}) as session:
        with pytest.raises(OptionError, match=r"session\.connection\(bind_arguments="):
            confirm.options(connection=session).delay("A1")
        confirm.options(connection=session.connection(bind_arguments={"bind": engine})).delay("A1")
        session.commit()
    assert database.count() == 1


@pytest.fixture(scope="module")
def url_with_two_phases() -> Iterator[str]:
    """A migrated database of a server that lets transactions be prepared."""
    with embedded.temporary({"max_prepared_transactions": "4"}) as url:
        migrate(url)
        yield url


@pytest.mark.parametrize("open_it", [a_session, a_connection], ids=["session", "connection"])
def test_job_can_be_part_of_a_transaction_in_two_phases(url_with_two_phases: str, open_it: Any) -> None:
    """PostgreSQL prepares none that would notify: the runner finds the job when it looks the next time."""
    engine = sa.create_engine(databases.sqlalchemy_url(url_with_two_phases))
    ran = []
    with running.application(url_with_two_phases, poll_interval=0.05) as database:

        @job
        def confirm(number: str) -> None:
            ran.append(number)

        @job(unique=True, on_conflict="replace")
        def tell(number: str) -> None:
            ran.append(number)

        def enqueue(number: str, how: str) -> None:
            with open_it(engine) as given:
                if open_it is a_session:
                    given.twophase, transaction = True, given
                else:
                    transaction = given.begin_twophase()
                confirm.options(connection=given).delay(number)
                tell.options(connection=given).delay_many([(number,), (number,)])
                if how == "rollback" or open_it is a_connection:
                    transaction.prepare()
                assert database.count() == 0
                getattr(transaction, how)()

        with running.started(Runner().register(confirm, tell)):
            enqueue("A1", "rollback")
            enqueue("A2", "commit")
            eventually(lambda: len(ran) == 2, "the jobs did not run", seconds=running.PATIENCE_SECONDS)
        assert ran == ["A2", "A2"]
    engine.dispose()


def test_database_without_the_tables_says_so(empty_database_url: str, database: running.Database) -> None:
    confirm = declare_job()
    elsewhere = sa.create_engine(databases.sqlalchemy_url(empty_database_url))
    name = elsewhere.url.database
    with elsewhere.connect() as connection, pytest.raises(SchemaError, match=rf"are not in the database '{name}' on "):
        confirm.options(connection=connection).delay("A1")
    elsewhere.dispose()


@pytest.mark.parametrize("session", [True, False])
def test_engine_of_another_database_is_refused(database: running.Database, session: bool) -> None:
    confirm = declare_job()
    engine = sa.create_engine("sqlite://")
    given = orm.Session(engine) if session else engine.connect()
    with given, pytest.raises(OptionError, match=r"sqlite\+pysqlite; allowed: .*postgresql\+psycopg2"):
        confirm.options(connection=given).delay("A1")
    engine.dispose()


def test_another_driver_for_postgresql_is_refused_without_a_connection(database: running.Database) -> None:
    """None of which is installed here: their dialects without the drivers."""
    from sqlalchemy.dialects.postgresql import asyncpg, psycopg

    confirm = declare_job()
    for dialect in (psycopg.PGDialect_psycopg, asyncpg.PGDialect_asyncpg):
        engine = sa.create_engine("postgresql+psycopg2://")
        engine.dialect = dialect()
        session = orm.Session(engine)
        with pytest.raises(OptionError, match=rf"postgresql\+{dialect.driver}; allowed: "):
            confirm.options(connection=session).delay("A1")


@pytest.mark.parametrize(
    "given",
    [
        sa.create_mock_engine("postgresql+psycopg2://", lambda *_: None),
        sa.create_engine("sqlite://"),
        orm.sessionmaker(),
        AsyncSession(),
        "postgresql://",
        5,
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_connection_is_refused_with_what_is(database: running.Database, given: Any) -> None:
    confirm = declare_job()
    with pytest.raises(OptionError, match=rf"{type(given).__name__}; allowed: .*Connection, Session or scoped_session"):
        confirm.options(connection=given).delay("A1")
    assert database.count() == 0


def test_raw_connection_of_an_engine_is_one_of_psycopg2(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    connection = engine.raw_connection()
    try:
        confirm.options(connection=connection).delay("A1")
        connection.rollback()
        confirm.options(connection=connection).delay("A2")
        assert database.count() == 0
        connection.commit()
    finally:
        connection.close()
    assert database.column("SELECT data ->> 'number' FROM background_jobs") == ["A2"]


def test_connection_that_nobody_here_can_wait_on_is_refused(database: running.Database) -> None:
    confirm = declare_job()
    with contextlib.closing(psycopg2.connect(database.url, async_=True)) as connection:
        extras.wait_select(connection)
        with pytest.raises(OptionError, match=r"async_=True"):
            confirm.options(connection=connection).delay("A1")
    assert database.count() == 0


def test_connection_and_independent_together_are_refused(database: running.Database, engine: sa.Engine) -> None:
    with orm.Session(engine) as session, pytest.raises(OptionError, match="not both"):
        declare_job().options(connection=session, independent=True)


def test_independent_that_is_no_truth_value_is_refused(database: running.Database) -> None:
    with pytest.raises(OptionError, match="independent is 'yes'; allowed: True or False"):
        declare_job().options(independent="yes")


def test_schedule_belongs_to_the_transaction(database: running.Database, engine: sa.Engine) -> None:
    confirm = declare_job()
    with orm.Session(engine) as session:
        schedules.add(confirm, name="daily", cron="0 5 * * *", args=["A1"], connection=session)
        assert schedules.find() == []
        session.rollback()
        schedules.add(confirm, name="weekly", cron="0 5 * * 1", args=["A1"], connection=session)
        session.commit()
    assert [schedule.name for schedule in schedules.find()] == ["weekly"]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://a:1,b:2/shop",
        "postgresql://u:p%20w+%25@h:5433/shop?options=-c%20search_path%3Da%2Cb&application_name=a+b",
        "postgresql://%2Fvar%2Frun/shop",
        "postgresql://u@[::1]:5433/shop",
        "postgresql://h:/a%3Fb%20c",
        "postgres://:secret@h",
        "host=a,b port=1,2 dbname=shop user='u v' password='p@/:%+ w'",
        "service=shop",
    ],
)
def test_url_for_sqlalchemy_is_read_by_it_as_libpq_reads_ours(url: str) -> None:
    engine = sa.create_engine(sqlalchemy_url(url))
    _, parameters = engine.dialect.create_connect_args(engine.url)
    assert {name: str(value) for name, value in parameters.items()} == psycopg2.extensions.parse_dsn(url)


def test_password_in_a_keyword_string_is_hidden_by_sqlalchemy() -> None:
    engine = sa.create_engine(sqlalchemy_url("host=h dbname=shop user=u password=hunter2"))
    assert "hunter2" not in repr(engine)


def test_url_that_libpq_cannot_read_is_refused_without_its_password() -> None:
    with pytest.raises(DatabaseUnavailable, match=r"postgresql://u:\*\*\*@h/shop\?nonsense cannot be read") as raised:
        sqlalchemy_url("postgresql://u:hunter2@h/shop?nonsense")
    assert raised.value.__context__ is None


def test_url_for_sqlalchemy_leads_to_the_database_of_greenjobs(database: running.Database) -> None:
    keywords = " ".join(f"{name}='{value}'" for name, value in psycopg2.extensions.parse_dsn(database.url).items())
    for url in (sqlalchemy_url(), sqlalchemy_url(database.url), sqlalchemy_url(keywords)):
        engine = sa.create_engine(url)
        assert addresses.of_engine(engine) == addresses.of_url(database.url)
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT current_database()")) == database.value(
                "SELECT current_database()"
            )
        engine.dispose()


def test_enqueuing_does_not_load_sqlalchemy(database_url: str) -> None:
    code = f"""
import sys, greenjobs, psycopg2
greenjobs.configure(database_url={database_url!r})
@greenjobs.job
def nothing(): pass
nothing.delay()
connection = psycopg2.connect({database_url!r})
nothing.options(connection=connection).delay()
connection.commit()
try:
    nothing.options(connection=5).delay()
except greenjobs.GreenjobsError:
    print("sqlalchemy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
