"""Database URLs and keyword strings for people to read: without the passwords that are in them."""

from __future__ import annotations

import re
from urllib.parse import unquote

# libpq: a name, "=", and a value that is quoted, or ends at white space; a backslash makes the next character literal.
_KEYWORD_PAIR = re.compile(r"\s*(?P<key>\w+)\s*=\s*(?P<value>'(?:\\.|[^'\\])*'|(?!')(?:\\.?|[^\s\\])*)", re.DOTALL)
_HOST = r"(?:\[[^\]@/=]*\]|[^@/?:,\[\]=;&\s]*)(?::\d*)?"
_PARAMETER = r"[^=&;@]+=[^=&;]*"
# What libpq takes for a URL after "://" (conninfo_uri_parse_options in fe-connect.c): the credentials end at the first
# "@" that no "/" precedes, the password begins at their first ":".
_URL = re.compile(
    rf"(?:(?P<user>[^:@/=]*)(?P<password>:[^@/]*)?@)?{_HOST}(?:,{_HOST})*(?:/[^@?=]*)?"
    rf"(?P<query>\?(?:{_PARAMETER}(?:&{_PARAMETER})*)?)?"
)
_KEY_BEFORE_VALUE = re.compile(r"(?<![\w%])([\w%]+)\s*=")
_SECRET_KEY = re.compile(r"pass(?:word|wd|phrase)|pwd|secret|token|scram_\w+_key", re.IGNORECASE)


def redact(url: str) -> str:
    """Return a database URL or keyword string with *** in place of every password in it.

    Takes any text and never raises. Of what is no valid URL or keyword string it rather hides too much than too little.
    """
    text = str(url)
    if text.startswith("embedded:"):
        return text
    pairs = keyword_pairs(text)
    if pairs is None:
        return _redact_url(text)
    shown, copied = "", 0
    for key, start, end in pairs:
        shown += text[copied:start] + ("***" if _is_secret(key) else _redact_url(text[start:end]))
        copied = end
    return shown + text[copied:]


def keyword_pairs(text: str) -> list[tuple[str, int, int]] | None:
    """Each key of a libpq keyword string and its value's span (conninfo_parse in fe-connect.c); None for other text."""
    pairs: list[tuple[str, int, int]] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _KEYWORD_PAIR.match(text, position)
        if match is None:
            return None
        pairs.append((match["key"], *match.span("value")))
        position = match.end()
    return pairs


def _is_secret(key: str) -> bool:
    return _SECRET_KEY.search(unquote(key)) is not None


def _redact_url(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if not separator or "@" in scheme:
        # The scheme was forgotten, the password was not.
        scheme, separator, rest = "", "", text
    match = _URL.fullmatch(rest)
    if match is None:
        return _redact_broadly(scheme + separator, rest)
    start = len(rest) if match["query"] is None else match.start("query")
    address, query = rest[:start], rest[start:]
    if match["password"]:
        address = f"{address[: match.start('password')]}:***{address[match.end('password') :]}"
    parameters = (each.partition("=") for each in query.split("&"))
    shown = (f"{key}=***" if _is_secret(key) else f"{key}{equals}{value}" for key, equals, value in parameters)
    return scheme + separator + address + "&".join(shown)


def _redact_broadly(scheme: str, rest: str) -> str:
    """Of text that is no valid URL: hide all that could be credentials, and all from the first secret key on."""
    start, end = rest.find(":"), rest.rfind("@")
    if 0 <= start < end:
        rest = f"{rest[: start + 1]}***{rest[end:]}"
    text = scheme + rest
    secret = next((match for match in _KEY_BEFORE_VALUE.finditer(text) if _is_secret(match[1])), None)
    return text if secret is None else f"{text[: secret.end()]}***"
