"""What `manage.py check` says of jobs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from django.core import checks
from psycopg2 import Error

from greenjobs import migrate
from greenjobs.contrib.django import equipment
from greenjobs.errors import GreenjobsError


def register() -> None:
    """Have Django call them."""
    checks.register(check_database)
    checks.register(check_tables, checks.Tags.database)


def check_database(app_configs: Any = None, **_: Any) -> list[Any]:
    """Whether there is a database that jobs can be in."""
    found = equipment.installed()
    if found is None or found.settings.database_url is not None:
        return []
    return [
        checks.Warning(
            f"No database can hold jobs: DATABASES[{found.options.database!r}] is not PostgreSQL.",
            hint='Name one that is: "DATABASE": its alias, or "DATABASE_URL": its URL, in GREENJOBS. For development, '
            '"DATABASE_URL": "embedded:" starts a private server.',
            id="greenjobs.W001",
        )
    ]


def check_tables(app_configs: Any = None, databases: Sequence[str] | None = None, **_: Any) -> list[Any]:
    """Whether the tables of greenjobs are there, and those of this release. Only for databases that are asked for."""
    if sys.argv[1:2] == ["migrate"]:  # which looks at the databases first, and is about to make them
        return []
    found = equipment.installed()
    url = None if found is None else found.settings.database_url
    if found is None or url is None or found.alias_of(url) not in (databases or ()):
        return []
    try:
        missing = migrate.pending(url)
    except (GreenjobsError, Error) as error:
        return [checks.Warning(f"The tables of greenjobs cannot be looked at: {error}", id="greenjobs.W003")]
    if not missing:
        return []
    return [
        checks.Warning(
            f"The tables of greenjobs are missing or older than this release: {', '.join(m.label for m in missing)}.",
            hint='Type `python manage.py migrate`, or, with "MIGRATE": False, `python manage.py greenjobs migrate`.',
            id="greenjobs.W002",
        )
    ]
