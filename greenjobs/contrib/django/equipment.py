"""What a Django project has of greenjobs: its settings, what its jobs join, and what is around each of them.

A project is the only one of its process, and active in all of it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.conf import settings as django_settings
from django.core.cache import close_caches
from django.db import close_old_connections, connections, reset_queries, transaction
from django.urls import set_script_prefix, set_urlconf
from django.utils import timezone, translation
from psycopg2 import extensions

from greenjobs import config
from greenjobs.contrib import addresses, scopes
from greenjobs.contrib.django import databases, options
from greenjobs.holding import Held, Hold

if TYPE_CHECKING:
    from greenjobs.runner import Runner, RunnerHandle

logger = logging.getLogger(__name__)


class Equipment:
    """The settings of the project, and the place of its jobs among its transactions."""

    app = None

    def __init__(self) -> None:
        self.options = options.read()
        self._layer: tuple[object, config.Layer] | None = None
        self._moved: tuple[object, config.Settings, config.Settings] | None = None
        self._aliases: dict[object, str | None] = {}
        # Before the tests of a project, which have databases of their own, make Django forget them.
        self._at_first = _fingerprints()
        self._addresses_at_first = {alias: databases.address_of(alias) for alias in connections.settings}
        self._said: set[str] = set()

    def install(self) -> None:
        """Have the project asked, from now on, in all of the process."""
        global _installed
        _installed = self
        scopes.install(_scope)

    def reread(self) -> None:
        """Read Django's settings again, for a test has changed them."""
        self.options = options.read()
        self._layer = None
        self._aliases.clear()

    @property
    def settings(self) -> config.Settings:
        """Those of the project, complete; the database is that of Django, unless greenjobs is told of another."""
        alias = self.options.database
        fingerprint = databases.fingerprint(alias)
        if self._layer is None or self._layer[0] != fingerprint:
            url = databases.url_of(alias)
            defaults = {} if url is None else {"database_url": url}
            self._layer = fingerprint, config.Layer(self.options.arguments, defaults)
        settings = self._layer[1].settings()
        now = _fingerprints()
        return settings if now == self._at_first else self._follow(settings, now)

    def _follow(self, settings: config.Settings, now: object) -> config.Settings:
        """The same, but that a URL which led to a database of Django's leads to the one that its tests have instead."""
        if self._moved is None or self._moved[0] != now or self._moved[1] is not settings:
            self._moved = now, settings, self._moved_along(settings)
        return self._moved[2]

    def _moved_along(self, settings: config.Settings) -> config.Settings:
        named = None if settings.database_url is None else addresses.of_url(settings.database_url)
        for alias, address in self._addresses_at_first.items():
            if address is not None and address == named != databases.address_of(alias):
                return replace(settings, database_url=databases.url_of(alias), session_url=None)
        return settings

    def alias_of(self, database_url: str) -> str | None:
        """Which of Django's databases is the one with this URL; None when none is."""
        key = (database_url, _fingerprints())
        if key not in self._aliases:
            self._aliases[key] = databases.leading_to(database_url, first=self.options.database)
        return self._aliases[key]

    def connection_for(self, database_url: str, job: str) -> Any:
        """The connection of the transaction that is open here, a Hold for when it is committed, or None."""
        alias = self.alias_of(database_url)
        wrapper = None if alias is None else connections[alias]
        if wrapper is None or not _is_in_transaction(wrapper):
            return None
        if self.options.transaction == "on_commit" and wrapper.in_atomic_block:
            return _OnCommit(wrapper.alias)
        # As Django's own cursors do.
        wrapper.validate_no_broken_transaction()
        wrapper.ensure_connection()
        if isinstance(wrapper.connection, extensions.connection):
            return wrapper.connection
        self._say_that_jobs_cannot_join(wrapper)
        return _OnCommit(wrapper.alias)

    def _say_that_jobs_cannot_join(self, wrapper: Any) -> None:
        if wrapper.alias not in self._said:
            self._said.add(wrapper.alias)
            logger.warning(
                "jobs cannot join the transactions of the database %r: its driver is %s; with psycopg2 they can. Until "
                "then they are enqueued by transaction.on_commit, and lost where the process dies in between; "
                '"TRANSACTION": "on_commit" in GREENJOBS says that this is meant',
                wrapper.alias,
                type(wrapper.connection).__module__.partition(".")[0],
            )

    def adopt(self) -> None:
        """Nothing to do: they are those of the process already."""

    def equip(self, runner: Runner) -> None:
        """Give every job of this runner connections and a state of its own. `greenjobs run` does this by itself."""
        runner.surround(self.context)

    def check(self, handle: RunnerHandle) -> None:
        """Nothing is known here that could be wrong with a runner."""

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What Django does around a request, done around a job; the signals of requests are not sent, as it is none."""
        with contextlib.ExitStack() as stack:
            # Each of them, whatever becomes of the others. What is here of before: threads that run jobs live on.
            for end in (_close_connections, close_caches, _reset_state):
                stack.callback(end)
            reset_queries()
            close_old_connections()
            _reset_state()
            yield


class _OnCommit(Hold):
    """Holds jobs until the transaction is committed that is open in a database of Django's."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    def take(self, held: Held) -> None:
        def enqueue() -> None:
            try:
                held.settle(held.enqueue())
            except BaseException:
                logger.error(
                    "the transaction was committed, and its jobs could not be enqueued, and are lost: %s (%s)",
                    *(held.job_type, len(held.handles)),
                    extra={"job_type": held.job_type},
                )
                raise

        # Robust: one that fails keeps neither the other jobs nor the application's own functions from their turn.
        transaction.on_commit(enqueue, using=self._alias, robust=True)


def _fingerprints() -> tuple[object, ...]:
    return tuple(map(databases.fingerprint, connections.settings))


def _is_in_transaction(wrapper: Any) -> bool:
    """Whether what is written now is to be committed by somebody, in `atomic()` or by hand."""
    if wrapper.in_atomic_block:
        return True
    is_in_autocommit = wrapper.settings_dict["AUTOCOMMIT"] if wrapper.connection is None else wrapper.autocommit
    return not is_in_autocommit


def _close_connections() -> None:
    with contextlib.ExitStack() as stack:
        for wrapper in connections.all(initialized_only=True):
            stack.callback(wrapper.close)


def _reset_state() -> None:
    """What a request may set: its language, its time zone, its URLs."""
    translation.deactivate()
    timezone.deactivate()
    set_urlconf(None)
    prefix = django_settings.FORCE_SCRIPT_NAME
    set_script_prefix("/" if prefix is None else prefix)


_installed: Equipment | None = None


def installed() -> Equipment | None:
    """That of this process; None where the app is not in INSTALLED_APPS, or not ready."""
    return _installed


def equipment_of(found: Any, name: str) -> Equipment | None:
    """That of the project which has been set up in this process, whatever was found under the name."""
    return _installed if apps.ready else None


def _active_settings() -> config.Settings | None:
    return None if _installed is None else _installed.settings


def _active_connection(database_url: str, job: str) -> Any:
    return None if _installed is None else _installed.connection_for(database_url, job)


_scope = scopes.Scope(scopes.DJANGO, _active_settings, _active_connection)
