"""SQL texts that are planned once for each connection, where the connection allows it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psycopg2 import errors, extensions

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor


_JSONB_OID = 3802  # pg_type.dat


class PlanningConnection(extensions.connection):
    """A connection that remembers what was prepared on it.

    Nothing can be where a pooler is in between, `is_pooled`: every transaction may have another session of the server.
    """

    def __init__(self, dsn: str, async_: int = 0) -> None:
        super().__init__(dsn, async_)  # type: ignore[call-arg]  # the stubs lack it
        self.is_pooled = False
        self.planned: set[str] = set()
        extensions.register_type(_JSONB, self)


def _read_json(text: Any, _: object) -> Any:
    """What a jsonb column holds; its text, where somebody has stored what is nested too deeply for Python to read.

    One such row must not keep people from looking at all others.
    """
    if text is None:
        return None
    try:
        return json.loads(text)
    except RecursionError:
        return text


_JSONB = extensions.new_type((_JSONB_OID,), "GREENJOBS_JSONB", _read_json)


class Statement:
    """A constant SQL text with named parameters, `%(name)s`, whose types are given by name.

    On a PlanningConnection in autocommit the server parses and plans it once; a claim or an enqueue costs a third less
    for it. On every other connection it is sent as it is.
    """

    __slots__ = ("_execute", "_name", "_plain", "_prepare")

    def __init__(self, name: str, sql: str, /, **types: str) -> None:
        numbered = {parameter: f"${place}" for place, parameter in enumerate(types, start=1)}
        values = ", ".join(f"%({parameter})s" for parameter in types)
        # With a digest, so that no other release's statement is taken for this one where a pooler mixes sessions up.
        self._name = f"greenjobs_{name}_{hashlib.blake2b(sql.encode(), digest_size=4).hexdigest()}"
        self._plain = sql
        self._prepare = f"PREPARE {self._name}{_in_brackets(', '.join(types.values()))} AS {sql % numbered}"
        self._execute = f"EXECUTE {self._name}{_in_brackets(values)}"

    def run(self, cursor: Cursor, parameters: Mapping[str, Any] | None = None) -> None:
        """Execute it with these parameters; the cursor then has its rows."""
        connection = cursor.connection
        if not (isinstance(connection, PlanningConnection) and connection.autocommit and not connection.is_pooled):
            cursor.execute(self._plain, parameters or {})
            return
        try:
            if self._name not in connection.planned:
                cursor.execute(self._prepare)
                connection.planned.add(self._name)
            cursor.execute(self._execute, parameters or {})
        except (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement):
            # Another server session than the one that it was prepared on: a pooler is in between. Nothing was done.
            connection.is_pooled = True
            cursor.execute(self._plain, parameters or {})


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""
