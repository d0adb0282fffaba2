"""greenjobs in a Django project: put "greenjobs.contrib.django" into INSTALLED_APPS.

Its settings are in GREENJOBS, its database is one of DATABASES, `.delay()` joins `transaction.atomic()`, jobs are found
in the modules `jobs` of the apps, and run with connections and a state of their own. `manage.py greenjobs …` has the
commands. Nothing here imports Django before the settings are there.
"""

from __future__ import annotations

from typing import Any

from greenjobs import config
from greenjobs.contrib import addresses
from greenjobs.pool import parameters_of

__all__ = ["django_database"]

_KEYS = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}


def django_database(database_url: str | None = None) -> dict[str, Any]:
    """A database of greenjobs, that of its settings if none is given, as an entry of DATABASES.

    For a project that names its database in a URL, or has the private `embedded:` one, the server of which is started.
    Raises ConfigError, EmbeddedServerError, and DatabaseUnavailable where libpq could not read it.
    """
    given = parameters_of(addresses.for_libpq(database_url or config.load().require_database_url()))
    entry: dict[str, Any] = {"ENGINE": "django.db.backends.postgresql"}
    entry |= {key: given.pop(name) for name, key in _KEYS.items() if name in given}
    return {**entry, "OPTIONS": given} if given else entry
