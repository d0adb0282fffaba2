"""Jobs that are enqueued in Flask-SQLAlchemy's session: what `.delay()` does inside an application context.

The session and the job then share one fate. That has a trap, a context that ends without commit, and so has the
opposite, a job that is committed while the changes that it is about are not. Both are logged, once for each job and
place.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg2
from flask import current_app, g, has_request_context, request

from greenjobs import alchemy, inspection, pool
from greenjobs.contrib import addresses
from greenjobs.current import current_job

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy

logger = logging.getLogger(__name__)

# The name under which `g` and `session.info` have the jobs whose transaction has not ended.
_KEY = "_greenjobs_uncommitted"

# Where jobs do not join: so often a job and a place are looked at for open changes, which costs a round trip.
_MOST_LOOKS = 20


class _Joined(NamedTuple):
    job: str
    place: str
    savepoint: Any


class _NoBind:
    """Says that no engine of the application leads to the database of the jobs."""


class Sessions:
    """The sessions of one application, as far as jobs are concerned."""

    def __init__(self, *, joins: bool) -> None:
        self._joins = joins
        self._bind_keys: dict[str, Any] = {}
        self._looks: dict[tuple[str, str], int] = {}
        self._said: set[tuple[str, ...]] = set()

    def connection_for(self, database_url: str, job: str) -> Any:
        """SQLAlchemy's connection of the active session, in its transaction, if it leads to this database, or None."""
        db = session_extension()
        if db is None:
            return None
        bind_key = self._bind_key(db, database_url)
        if bind_key is _NoBind:
            return None
        bind = db.engines[bind_key]
        if self._joins:
            return _join(db, bind, job)
        self._look_for_changes(db, bind, job)
        return None

    def context_ends(self, error: BaseException | None) -> None:
        """Warn of jobs that were enqueued in a session of this context that nobody committed or rolled back.

        After an error nobody wonders that they are gone.
        """
        for joined in g.pop(_KEY, ()):
            for job, place, _ in joined if error is None else ():
                self._warn(
                    "%s enqueued job %s in its session, which was never committed: the job is gone; call "
                    "db.session.commit(), or enqueue with .options(independent=True)",
                    place,
                    job,
                )
            joined.clear()

    def _bind_key(self, db: SQLAlchemy, database_url: str) -> Any:
        if database_url not in self._bind_keys:
            self._bind_keys[database_url] = self._find_bind_key(db.engines, database_url)
        return self._bind_keys[database_url]

    def _find_bind_key(self, engines: Mapping[str | None, Any], database_url: str) -> Any:
        address = addresses.of_url(database_url)
        if address is None:
            return _NoBind
        # The default one first.
        for key in sorted(engines, key=lambda key: key is not None):
            # Tests put connections in the place of engines.
            engine = engines[key].engine
            if addresses.of_engine(engine) != address:
                continue
            if engine.dialect.driver == "psycopg2":
                return key
            logger.warning(
                "jobs cannot join the session: its engine uses %s; with psycopg2 (a URL of postgresql+psycopg2://) "
                "they can. Until then each job is committed by itself",
                engine.dialect.driver,
            )
        return _NoBind

    def _look_for_changes(self, db: SQLAlchemy, bind: Any, job: str) -> None:
        place = _place()
        looks = self._looks.get((job, place), 0)
        if looks >= _MOST_LOOKS or not db.session.registry.has():
            return
        self._looks[job, place] = looks + 1
        if _has_changes(db.session(), bind):
            self._looks[job, place] = _MOST_LOOKS
            self._warn(
                "%s enqueues job %s, which is committed at once, while its session has changes that are not: a runner "
                "may not see them, and a rollback will not take the job along; enqueue after the commit, or with "
                ".options(connection=db.session)",
                place,
                job,
            )

    def _warn(self, message: str, place: str, job: str) -> None:
        if (message, place, job) not in self._said:
            self._said.add((message, place, job))
            logger.warning(message, place, job, extra={"job_type": job, "place": place})


def session_extension() -> SQLAlchemy | None:
    """Flask-SQLAlchemy of the active application, if it has it, in a version that is known here (3)."""
    db = current_app.extensions.get("sqlalchemy")
    if db is None:
        return None
    try:
        from flask_sqlalchemy import SQLAlchemy
    except ImportError:  # another extension of that name
        return None
    # In version 2 it is something else.
    return db if isinstance(db, SQLAlchemy) and hasattr(db, "engines") else None


def _join(db: SQLAlchemy, bind: Any, job: str) -> Any:
    session = db.session()
    if not alchemy.takes_statements(session, bind):
        return None
    connection = session.connection(bind_arguments={"bind": bind})
    # Where the engine's isolation level is AUTOCOMMIT, there is nothing to commit.
    if pool.raw_connection(connection).autocommit:
        return connection
    _listen(db)
    joined = session.info.setdefault(_KEY, [])
    of_context = g.setdefault(_KEY, [])
    if not any(each is joined for each in of_context):
        of_context.append(joined)
    joined.append(_Joined(job, _place(), session.get_nested_transaction()))
    return connection


def _listen(db: SQLAlchemy) -> None:
    from sqlalchemy import event

    for name, handler in (("after_commit", _committed), ("after_rollback", _rolled_back)):
        if not event.contains(db.session, name, handler):
            event.listen(db.session, name, handler)


def _committed(session: Any) -> None:
    # Also called when a savepoint is released, which decides nothing.
    if not session.in_nested_transaction():
        session.info.get(_KEY, []).clear()


def _rolled_back(session: Any) -> None:
    joined = session.info.get(_KEY, [])
    undone = session.get_nested_transaction()
    joined[:] = [each for each in joined if undone is not None and undone not in _with_parents(each.savepoint)]


def _with_parents(savepoint: Any) -> Iterator[Any]:
    while savepoint is not None:
        yield savepoint
        savepoint = savepoint.parent


def _has_changes(session: Any, bind: Any) -> bool:
    if session.new or session.dirty or session.deleted:
        return True
    if not session.in_transaction() or not alchemy.takes_statements(session, bind):
        return False
    connection = session.connection(bind_arguments={"bind": bind})
    try:
        return inspection.has_written(pool.raw_connection(connection))
    except psycopg2.Error as error:  # its transaction has failed already, and will be rolled back
        pool.forget_if_broken(connection, error)
        return False


def _place() -> str:
    if has_request_context():
        return f"the view {request.endpoint or request.path}"
    return f"the job {current_job.name}" if current_job else "an application context"
