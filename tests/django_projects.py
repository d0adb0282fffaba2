"""Django in the test process, which can have one project only: another database, and other settings, for each test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import django
import running
from django.conf import settings
from django.test.utils import override_settings

import greenjobs
from greenjobs import config
from greenjobs.contrib import scopes
from greenjobs.contrib.django import django_database

POSTGRESQL = {"ENGINE": "django.db.backends.postgresql"}

if not settings.configured:
    settings.configure(
        DATABASES={
            "default": dict(POSTGRESQL),
            "other": dict(POSTGRESQL),
            "wrapped": {"ENGINE": "django_shop.wrapped"},
            "lite": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
        },
        INSTALLED_APPS=["greenjobs.contrib.django", "django_shop"],
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        LANGUAGE_CODE="en",
        TIME_ZONE="UTC",
        USE_TZ=True,
        USE_I18N=True,
        ROOT_URLCONF="django_shop",
        SECRET_KEY="of tests",
    )
    django.setup()
    from greenjobs.contrib.django import equipment

    scopes.remove(equipment._scope)

from django.db import connection, connections  # noqa: E402
from django_shop.models import Order  # noqa: E402

_ENTRIES = {alias: dict(connections.settings[alias]) for alias in connections.settings}


def point(alias: str, url: str) -> None:
    """Have Django open another database under this alias from now on, as its tests do."""
    entry = connections.settings[alias]
    connections[alias].close()
    named = {**_ENTRIES[alias], **django_database(url), "ENGINE": entry["ENGINE"]}
    named.setdefault("OPTIONS", {})
    entry.update({**named, "OPTIONS": dict(named["OPTIONS"])})


@contextlib.contextmanager
def project(url: str, **given: Any) -> Iterator[running.Database]:
    """A project with its tables in this database, which greenjobs knows of by Django alone; GREENJOBS is what is given.
    Nothing is left of it at the end.
    """
    with running.application(url) as database, override_settings(GREENJOBS=given):
        greenjobs.configure()
        point("default", url)
        installed = equipment.installed()
        assert installed is not None
        installed._said.clear()
        installed.install()
        with connection.schema_editor() as editor:
            editor.create_model(Order)
        try:
            yield database
        finally:
            connections.close_all()
            scopes.remove(equipment._scope)
            config.adopt(None)
            for alias, entry in _ENTRIES.items():
                connections.settings[alias].update(entry)
