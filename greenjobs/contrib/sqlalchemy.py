"""The database of greenjobs, for SQLAlchemy, which is not needed for it."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from greenjobs import config
from greenjobs.contrib import addresses
from greenjobs.pool import parameters_of


def sqlalchemy_url(database_url: str | None = None) -> str:
    """A database of greenjobs, that of the settings if none is given, as SQLAlchemy names it, over psycopg2.

    For an application that tells greenjobs which database there is, and not SQLAlchemy, as with `embedded:`, the server
    of which is started. Raises ConfigError, EmbeddedServerError, and
    DatabaseUnavailable where libpq could not read it.
    """
    url = addresses.for_libpq(database_url or config.current().require_database_url())
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql"):
        return f"postgresql+psycopg2{separator}{rest}"
    # A keyword string: psycopg2 takes as parameters what it has.
    return f"postgresql+psycopg2:///?{urlencode(parameters_of(url), quote_via=quote)}"
