"""The entries of DATABASES, as far as jobs can be in them.

What Django knows of a database changes in its tests, which have one of another name. So it is asked each time, of the
settings that its connections are opened with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import psycopg2
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.utils import load_backend
from psycopg2 import extensions

from greenjobs.contrib import addresses

_PARAMETERS = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}

# What Django keeps for itself of OPTIONS, and libpq would take otherwise.
_NOT_OURS = ("client_encoding",)


def fingerprint(alias: str) -> tuple[object, ...]:
    """What changes when the entry leads somewhere else."""
    entry = connections.settings[alias]
    return (entry["ENGINE"], *(entry[key] for key in _PARAMETERS), id(entry["OPTIONS"]))


def is_postgresql(alias: str) -> bool:
    """Whether its backend is for PostgreSQL, be it Django's own, that of GIS, or one derived from them."""
    try:
        backend = load_backend(connections.settings[alias]["ENGINE"])
    except (ImportError, ImproperlyConfigured):  # whose driver is missing, which is for whoever uses it to hear
        return False
    return bool(backend.DatabaseWrapper.vendor == "postgresql")


def url_of(alias: str) -> str | None:
    """The entry as a libpq keyword string; None for a database that is not PostgreSQL."""
    return str(extensions.make_dsn(**_parameters(alias))) if is_postgresql(alias) else None


def address_of(alias: str) -> addresses.Address | None:
    """Where the entry leads; None for a database that is not PostgreSQL, and where that cannot be said."""
    return addresses.of_parameters(_parameters(alias)) if is_postgresql(alias) else None


def leading_to(database_url: str, *, first: str) -> str | None:
    """The alias of the entry that leads to this database, `first` before others; None when none does, or in doubt."""
    if database_url == url_of(first):  # also where only libpq knows the address, as with a service
        return first
    address = addresses.of_url(database_url)
    if address is None:
        return None
    for alias in sorted(connections.settings, key=lambda alias: alias != first):
        if address_of(alias) == address:
            return str(alias)
    return None


def _parameters(alias: str) -> dict[str, str]:
    entry = connections.settings[alias]
    parameters = {name: str(entry[key]) for key, name in _PARAMETERS.items() if entry[key]}
    parameters |= dict(_libpq_options(entry["OPTIONS"]))
    role = entry["OPTIONS"].get("assume_role")
    if role:  # which Django does by a statement
        quoted = str(role).replace("\\", "\\\\").replace(" ", "\\ ")
        parameters["options"] = f"{parameters.get('options', '')} -c role={quoted}".strip()
    return parameters


def _libpq_options(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Those of OPTIONS that are for libpq, and not for Django or for its driver."""
    for name, value in options.items():
        if name not in _NOT_OURS and isinstance(value, (str, int)) and not isinstance(value, bool):
            try:
                extensions.make_dsn(**{name: str(value)})
            except psycopg2.ProgrammingError:
                continue
            yield name, str(value)
