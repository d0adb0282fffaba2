"""current_job.transaction(session): the job completes in the transaction of a SQLAlchemy session or connection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
import running
import sqlalchemy
from sqlalchemy import orm
from sqlalchemy.exc import IntegrityError

from greenjobs import current_job, job

pytest.importorskip("greenjobs.alchemy", reason="connections of SQLAlchemy are not understood yet")


class Base(orm.DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "notes"
    what: orm.Mapped[str] = orm.mapped_column(primary_key=True)


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        yield database


@pytest.fixture
def engine(database: running.Database) -> Iterator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(database.url.replace("postgresql:", "postgresql+psycopg2:", 1))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def notes(database: running.Database) -> list[str]:
    return database.column("SELECT what FROM notes ORDER BY what")


@pytest.mark.parametrize("scoped", [True, False])
def test_session_commits_with_the_job_and_with_what_the_job_enqueues(
    database: running.Database, engine: sqlalchemy.Engine, scoped: bool
) -> None:
    after_commit = []

    @job(queue="others")
    def note() -> None: ...

    @job(max_retries=0)
    def work(fails: bool) -> None:
        factory = orm.sessionmaker(engine)
        session: Any = orm.scoped_session(factory) if scoped else factory()
        sqlalchemy.event.listen(session, "after_commit", after_commit.append)
        session.add(Note(what=f"before {fails}"))
        with current_job.transaction(session) as given:
            assert given is session
            session.add(Note(what=f"inside {fails}"))
            note.delay()
            if fails:
                raise ValueError("rolled back")
        assert not session().in_transaction() if scoped else not session.in_transaction()
        session.close()

    work.delay_many([(True,), (False,)])
    running.work_off(work)
    assert notes(database) == ["before False", "inside False"]
    assert (database.count("queue = 'others'"), database.count("state = 'failed'")) == (1, 1)
    assert len(after_commit) == 1


def test_connection_commits_with_the_job(database: running.Database, engine: sqlalchemy.Engine) -> None:
    @job
    def work() -> None:
        with engine.connect() as connection, current_job.transaction(connection):
            connection.execute(sqlalchemy.insert(Note).values(what="written"))

    work.delay()
    running.work_off(work)
    assert (notes(database), database.count()) == (["written"], 0)


def test_hook_after_the_commit_of_the_block_enqueues_a_job_of_its_own(
    database: running.Database, engine: sqlalchemy.Engine
) -> None:
    @job(queue="others")
    def note() -> None: ...

    @job(max_retries=0)
    def work() -> None:
        with orm.Session(engine) as session:
            sqlalchemy.event.listen(session, "after_commit", lambda _: note.delay())
            with current_job.transaction(session):
                session.add(Note(what="written"))

    work.delay()
    running.work_off(work)
    assert (notes(database), database.column("SELECT queue FROM background_jobs")) == (["written"], ["others"])


def test_flush_that_fails_at_the_commit_rolls_all_of_it_back(
    database: running.Database, engine: sqlalchemy.Engine
) -> None:
    """What the session has kept to itself until then is written after the end of the job, in the same transaction."""
    database.rows("INSERT INTO notes VALUES ('taken')")

    @job(max_retries=0)
    def work() -> None:
        with orm.Session(engine) as session, current_job.transaction(session):
            session.add(Note(what="free"))
            session.flush()
            session.add(Note(what="taken"))

    work.delay()
    running.work_off(work)
    assert notes(database) == ["taken"]
    assert database.count("state = 'failed' AND errors->-1->>'error' = %s", IntegrityError.__name__) == 1


def test_session_that_the_block_commits_is_noticed(database: running.Database, engine: sqlalchemy.Engine) -> None:
    @job(max_retries=0)
    def work() -> None:
        with orm.Session(engine) as session, current_job.transaction(session):
            session.add(Note(what="too early"))
            session.commit()
            session.add(Note(what="rolled back"))

    work.delay()
    running.work_off(work)
    assert notes(database) == ["too early"]
    assert database.count("state = 'failed' AND errors->-1->>'error' = 'CompletionError'") == 1


def test_session_can_be_used_again_after_the_block(database: running.Database, engine: sqlalchemy.Engine) -> None:
    @job
    def work() -> None:
        with orm.Session(engine) as session:
            for what in ("taken", "free"):
                try:
                    with current_job.transaction(session):
                        session.add(Note(what=what))
                except IntegrityError:
                    continue
            session.add(Note(what="after"))
            session.commit()

    database.rows("INSERT INTO notes VALUES ('taken')")
    work.delay()
    running.work_off(work)
    assert (notes(database), database.count()) == (["after", "free", "taken"], 0)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_session_whose_connection_breaks_can_be_used_again(
    database: running.Database, engine: sqlalchemy.Engine, when: str
) -> None:
    @job
    def work() -> None:
        with orm.Session(engine) as session:

            def breaks() -> None:
                pid = session.scalar(sqlalchemy.text("SELECT pg_backend_pid()"))
                database.terminate(pid)

            if when == "before":
                breaks()
            with pytest.raises(psycopg2.OperationalError), current_job.transaction(session):
                breaks()
            session.rollback()
            with current_job.transaction(session):
                session.add(Note(what="in the end"))

    work.delay()
    running.work_off(work)
    assert (notes(database), database.count()) == (["in the end"], 0)
