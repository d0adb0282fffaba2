"""The app that a project has in INSTALLED_APPS."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.core.signals import setting_changed
from django.db.backends.base.base import NO_DB_ALIAS
from django.db.backends.signals import connection_created
from django.db.models.signals import post_migrate
from django.utils.module_loading import autodiscover_modules

from greenjobs import lending, migrate, pool
from greenjobs.contrib import addresses
from greenjobs.contrib.django import checks, equipment


class GreenJobsConfig(AppConfig):  # type: ignore[misc]  # without stubs Django's classes are of any type
    """Sets greenjobs up, and finds the jobs of all apps."""

    name = "greenjobs.contrib.django"
    label = "greenjobs"
    verbose_name = "Background jobs"

    def ready(self) -> None:
        """Raises ConfigError where GREENJOBS is wrong, and whatever a module of jobs raises."""
        found = equipment.Equipment()
        found.install()
        checks.register()
        setting_changed.connect(_setting_changed)
        post_migrate.connect(_migrated, sender=self)
        connection_created.connect(_connected)
        autodiscover_modules(found.options.jobs_module)


def _setting_changed(*, setting: str, **_: Any) -> None:
    found = equipment.installed()
    if found is not None and setting in ("GREENJOBS", "DATABASES"):
        found.reread()


def _migrated(*, using: str, verbosity: int = 1, **said: Any) -> None:
    """Bring our tables up to date with those of Django, in the databases of its tests, too."""
    found = equipment.installed()
    # Not after a flush, which says nothing of a plan, and which some tests do each time.
    if found is None or not found.options.migrates or "plan" not in said:
        return
    settings = found.settings
    url = settings.database_url
    if url is None or found.alias_of(url) != using:
        return
    direct = None if settings.session_url is None else addresses.of_url(settings.session_url)
    here = addresses.of_url(url)
    if direct is not None and here is not None and direct.database == here.database:  # and not that of production
        url = settings.session_url or url
    tell = said["stdout"].write if said.get("stdout") else print
    for label in migrate.migrate(url):
        if verbosity >= 1:
            tell(f"  Applying greenjobs.{label}... OK")


def _connected(*, connection: Any, **_: Any) -> None:
    """Leave a database alone that is about to be dropped, or copied, by the tests of a project."""
    if connection.alias == NO_DB_ALIAS:
        for pools in (pool.shared_pools(), lending.job_pools()):
            for each in pools:
                each.close()
