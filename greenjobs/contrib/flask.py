"""greenjobs in a Flask application: its settings, its context around every job, its session, its commands.

    jobs = GreenJobs(app)                   # or GreenJobs(), and jobs.init_app(app) in the factory

Jobs belong to the process that declares them, not to an application: `@job` needs none. Where several applications
share a process, a job that is enqueued in the context of one has its settings, and so its database; outside of any
context those of the application that was set up last count. A runner works for one application.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flask import Flask, appcontext_tearing_down, current_app, has_app_context
from flask.cli import NoAppException, find_best_app
from flask.globals import app_ctx
from werkzeug.local import LocalProxy

from greenjobs import config, surroundings
from greenjobs.contrib import scopes
from greenjobs.contrib.flask_commands import group
from greenjobs.contrib.joining import Sessions, session_extension
from greenjobs.contrib.sqlalchemy import database_url_of, sqlalchemy_url
from greenjobs.errors import ConfigError
from greenjobs.loading import EARLY_OPTIONS
from greenjobs.surroundings import Surrounding

if TYPE_CHECKING:
    from greenjobs.runner import Runner, RunnerHandle

__all__ = ["Equipment", "GreenJobs", "equipment_of", "sqlalchemy_url"]

logger = logging.getLogger(__name__)

_PREFIX = "GREENJOBS_"
_JOIN = "GREENJOBS_JOIN_SESSION"

# Where extensions for SQLAlchemy have the database of the application.
_SQLALCHEMY = ("SQLALCHEMY_DATABASE_URI", "SQLALCHEMY_ENGINES", "SQLALCHEMY_BINDS")

_extensions: weakref.WeakSet[GreenJobs] = weakref.WeakSet()
_equipped: weakref.WeakSet[Equipment] = weakref.WeakSet()
_latest: weakref.ref[Equipment] | None = None


class GreenJobs:
    """The extension. It has no state of its own: what it makes of an application is there in `app.extensions`."""

    def __init__(self, app: Flask | None = None) -> None:
        _extensions.add(self)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Set the application up, with the settings that `app.config` has now. Raises ConfigError."""
        if not isinstance(app, Flask):
            raise ConfigError(
                f"init_app takes the application, a Flask object, not {app!r}; without one yet, write GreenJobs() and "
                f"call init_app(app) in the factory"
            )
        if isinstance(app, LocalProxy):  # current_app, which is another one elsewhere
            app = app._get_current_object()
        if "greenjobs" in app.extensions:
            raise ConfigError(f"greenjobs has been set up for the application {app.name!r} already")
        equipment = Equipment(app)
        app.extensions["greenjobs"] = equipment
        app.cli.add_command(group)
        # After all functions of teardown, one of which may commit.
        appcontext_tearing_down.connect(_context_ends, app)
        equipment.become_latest()
        scopes.install(_scope)
        surroundings.of_application = _surroundings_in_tests


class Equipment:
    """What an application has of greenjobs: `app.extensions["greenjobs"]`."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self._layer = config.Layer(_arguments_in(app.config), _defaults_in(app.config))
        self._joins = _checked_join(app.config.get(_JOIN, True))
        self._was_in_use = False
        self.sessions = Sessions(joins=self._joins)
        _equipped.add(self)

    @property
    def settings(self) -> config.Settings:
        """Those of the application, complete."""
        settings = self._layer.settings()
        if not self._was_in_use or settings.database_url is None:
            self._look_for_late_settings(settings)
        return settings

    def _look_for_late_settings(self, settings: config.Settings) -> None:
        """Say once what `app.config` got after it was read. Raises ConfigError if that is why there is no database."""
        late = self._late_settings()
        if late and settings.database_url is None:
            raise ConfigError(
                f"No database is named, for app.config of {self.app.name!r} got {late} after GreenJobs had read it: "
                f"call init_app, or GreenJobs(app), when app.config is complete"
            )
        if late and not self._was_in_use:
            logger.warning(
                "app.config of %r got %s after GreenJobs had read it, which changes nothing: call init_app, or "
                "GreenJobs(app), when app.config is complete",
                *(self.app.name, late),
            )
        self._was_in_use = True

    def _late_settings(self) -> str:
        arguments, former = _arguments_in(self.app.config), self._layer.arguments
        names = arguments.keys() | former.keys()
        late = sorted(_PREFIX + name.upper() for name in names if arguments.get(name) != former.get(name))
        if _defaults_in(self.app.config) != self._layer.defaults:
            late.append(next((key for key in _SQLALCHEMY if self.app.config.get(key)), _SQLALCHEMY[0]))
        if self.app.config.get(_JOIN, True) != self._joins:
            late.append(_JOIN)
        return ", ".join(late)

    def adopt(self) -> None:
        """Let its settings be those of the process, where no other application is active. Raises ConfigError."""
        self.become_latest()
        _ = self.settings

    def become_latest(self) -> None:
        """The same, while the application is set up."""
        global _latest
        _latest = weakref.ref(self)
        config.adopt(self._layer)

    def equip(self, runner: Runner) -> None:
        """Let every job of this runner run in a context of the application. `greenjobs run` does this by itself."""
        runner.surround(self.context)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """A fresh context of the application, and at its end all that ends with one; no session outlives it."""
        left: list[tuple[dict[Any, Any], Any]] = []
        outer, context = _active_context(), self.app.app_context()
        try:
            with context:
                try:
                    yield
                finally:
                    left = _pop_down_to(context, outer)
        finally:
            # A function of teardown that fails keeps those before it from running, Flask-SQLAlchemy's too. Its session
            # is filed under the address of the context, which the context of another job will have one day.
            for registry, scope in left:
                session = registry.pop(scope, None)
                if session is not None:
                    session.close()

    def check(self, handle: RunnerHandle) -> None:
        """Warn when jobs may wait for one another's connections to the database of the application."""
        for message in self.narrow_pools(handle.slots):
            logger.warning("%s", message)

    def narrow_pools(self, jobs: int) -> list[str]:
        """What is to be said of engines whose pools lend fewer connections than so many jobs may want at a time."""
        said = []
        with self.app.app_context():
            db = session_extension()
            engines = dict(db.engines) if db is not None else {}
        for key, bind in engines.items():
            most = _most_connections(bind.engine.pool)
            if most is not None and most < jobs:
                where = f'SQLALCHEMY_BINDS["{key}"]' if key is not None else "SQLALCHEMY_ENGINE_OPTIONS"
                said.append(
                    f"up to {jobs} jobs run here at a time, and SQLAlchemy lends them {most} connections (pool_size "
                    f"and max_overflow) of the engine {key or 'default'!r}: the others wait for one, for 30 s by "
                    f'default, and then fail; put "pool_size": {jobs} into {where}, or run fewer at a time (--pool)'
                )
        return said


def equipment_of(found: Any, name: str) -> Equipment | None:
    """What the Flask application has of greenjobs that was found under this name: as an object, by its factory, or in
    a module by Flask's rules. None when it does without. Raises ConfigError when there is none to be found.
    """
    if inspect.isfunction(found):  # myapp:create_app, which Flask calls
        found = found()
    if isinstance(found, ModuleType):
        found = _application_in(found, name)
    equipment = found.extensions.get("greenjobs") if isinstance(found, Flask) else found
    return equipment if isinstance(equipment, Equipment) else None


def _application_in(module: ModuleType, name: str) -> Any:
    try:
        return find_best_app(module)
    except NoAppException as error:
        equipped = list(_equipped)
        if len(equipped) == 1:  # a module of jobs, which imports the application
            return equipped[0]
        if not equipped and not _extensions:  # something else of this module was wanted
            return None
        raise ConfigError(
            f"app is {name!r}, and jobs are to run in a Flask application, but it is not clear in which: {error} "
            f"Name it, as in myapp:app or myapp:create_app()"
        ) from None


def _active() -> Equipment | None:
    equipment = current_app.extensions.get("greenjobs") if has_app_context() else None
    return equipment if isinstance(equipment, Equipment) else None


def _active_settings() -> config.Settings | None:
    equipment = _active()
    return None if equipment is None else equipment.settings


def _active_connection(database_url: str, job: str) -> Any:
    equipment = _active()
    return None if equipment is None else equipment.sessions.connection_for(database_url, job)


_scope = scopes.Scope(scopes.FLASK, _active_settings, _active_connection)


def _surroundings_in_tests() -> Sequence[Surrounding]:
    equipment = _active() or (_latest() if _latest is not None else None)
    return () if equipment is None else (equipment.context,)


def _context_ends(app: Flask, exc: BaseException | None = None, **_: Any) -> None:
    equipment = app.extensions.get("greenjobs")
    if isinstance(equipment, Equipment):
        equipment.sessions.context_ends(exc)


def _active_context() -> Any:
    proxy: Any = app_ctx
    return proxy._get_current_object() if proxy else None


def _pop_down_to(context: Any, outer: Any) -> list[tuple[dict[Any, Any], Any]]:
    """Pop what was pushed inside of this context and is still there: with it on top, the teardown of this context would
    be about the wrong one, and leave its session, with all locks of it. Returns where sessions may be left.
    """
    left: list[tuple[dict[Any, Any], Any]] = []
    while (active := _active_context()) is not outer:
        left += _scope_of_session()
        if active is context:
            break
        try:
            active.pop()
        except Exception:
            logger.exception("a context that was pushed in a job, and never popped, failed at its end")
            if _active_context() is active:
                break
    return left


def _scope_of_session() -> Iterator[tuple[dict[Any, Any], Any]]:
    """Where Flask-SQLAlchemy keeps the session of the active context, and under which key."""
    db = session_extension()
    registry: Any = getattr(db.session, "registry", None) if db is not None else None
    if hasattr(registry, "scopefunc"):
        yield registry.registry, registry.scopefunc()


def _most_connections(pool: Any) -> int | None:
    """How many connections a QueuePool of SQLAlchemy lends at a time; None for no limit, and for other pools."""
    overflow = getattr(pool, "_max_overflow", -1)
    if overflow < 0 or not pool.size():  # others may have a size of another kind
        return None
    return int(pool.size() + overflow)


# --- settings ---------------------------------------------------------------------------------------------------------


def _arguments_in(given: Mapping[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        # Who copies the environment into the configuration says nothing new.
        if not key.startswith(_PREFIX) or key == _JOIN or value is None or os.environ.get(key) == value:
            continue
        name = key.removeprefix(_PREFIX).lower()
        if name in EARLY_OPTIONS:
            raise ConfigError(
                f"app.config has {key}, which counts before the application is loaded; set it in the environment, in "
                f"setup.cfg or pyproject.toml, or on the command line"
            )
        try:
            arguments |= config.check({name: value}, f"{key} in app.config")
        except TypeError as error:
            raise ConfigError(f"app.config has {key}: {error}") from None
    return arguments


def _defaults_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """The database of the application, when it is one that jobs can be in."""
    candidates = (
        given.get("SQLALCHEMY_DATABASE_URI"),
        (given.get("SQLALCHEMY_ENGINES") or {}).get("default"),
        (given.get("SQLALCHEMY_BINDS") or {}).get(None),
    )
    for candidate in candidates:
        url = database_url_of(candidate.get("url") if isinstance(candidate, dict) else candidate)
        if url is not None:
            with contextlib.suppress(ValueError):
                return {"database_url": config.OPTIONS["database_url"].parse(url)}
    return {}


def _checked_join(given: Any) -> bool:
    if not isinstance(given, bool):
        raise ConfigError(f"{_JOIN} is {given!r} (app.config); the value must be True or False.")
    return given
