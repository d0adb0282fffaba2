"""The database of greenjobs for SQLAlchemy, and that of SQLAlchemy for greenjobs. The two read URLs in different ways:
several hosts, sockets, spaces in parameters, signs that should have been escaped.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, urlencode

import psycopg2
from psycopg2 import extensions

from greenjobs import config
from greenjobs.contrib import addresses
from greenjobs.pool import parameters_of

# What both read alike where a URL has its host: one name or number, no list, no folder.
_PLAIN_HOST = re.compile(r"[\w.-]+", re.ASCII)


def sqlalchemy_url(database_url: str | None = None) -> str:
    """A database of greenjobs, that of the settings if none is given, as SQLAlchemy names it, over psycopg2.

    For an application that tells greenjobs which database there is, and not SQLAlchemy, as with `embedded:`, the server
    of which is started. Raises ConfigError, EmbeddedServerError, and DatabaseUnavailable where libpq could not
    read it.
    """
    url = addresses.for_libpq(database_url or config.current().require_database_url())
    return _url_of(parameters_of(url))


def _url_of(parameters: dict[str, Any]) -> str:
    """The URL that has SQLAlchemy connect with these parameters of libpq. It knows the password as such, to hide it."""
    more = dict(parameters)
    account, place, database = "", "", ""
    if "user" in more or "password" in more:
        account = quote(more.pop("user", ""), safe="")
        if "password" in more:
            account += f":{quote(more.pop('password'), safe='')}"
        account += "@"
    if _PLAIN_HOST.fullmatch(more.get("host", "")) and more.get("port", "0").isdecimal():
        place = more.pop("host")
        place += f":{more.pop('port')}" if "port" in more else ""
    if _PLAIN_HOST.fullmatch(more.get("dbname", "")):  # not every release takes the path for escaped
        database = more.pop("dbname")
    query = urlencode(more, quote_via=quote)
    return f"postgresql+psycopg2://{account}{place}/{database}{'?' if query else ''}{query}"


def database_url_of(url: Any) -> str | None:
    """Where a URL of SQLAlchemy's leads, a text or an object, as greenjobs takes it; None where that is no PostgreSQL.

    Its driver does not matter: greenjobs has psycopg2. Parameters that only another one knows are left in, and refused
    by libpq.
    """
    text = url.render_as_string(hide_password=False) if hasattr(url, "render_as_string") else url
    if not isinstance(text, str) or not re.match(r"postgres(ql)?(\+\w+)?://", text):
        return None
    plain = f"postgresql://{text.partition('://')[2]}"
    parameters = _as_sqlalchemy_reads(url)
    if parameters is None or _as_libpq_reads(plain) == parameters:
        return plain
    try:
        return str(extensions.make_dsn(**parameters))
    except psycopg2.ProgrammingError:
        return plain


def _as_sqlalchemy_reads(url: Any) -> dict[str, str] | None:
    """The parameters of libpq that SQLAlchemy would connect with; None where it cannot, or is not there."""
    try:
        from sqlalchemy.dialects.postgresql import psycopg2 as dialect
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError
    except ImportError:
        return None
    reader: Any = dialect.dialect
    try:
        _, given = reader().create_connect_args(make_url(url))
    except (ArgumentError, ValueError):
        return None
    # 1.4 names the database otherwise.
    return {"dbname" if name == "database" else name: str(value) for name, value in given.items()}


def _as_libpq_reads(url: str) -> dict[str, str] | None:
    try:
        given: dict[str, str] = extensions.parse_dsn(url)
    except psycopg2.ProgrammingError:
        return None
    return given
