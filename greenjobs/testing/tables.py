"""What tests say where a database has no tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from psycopg2 import errors

from greenjobs.errors import SchemaError


@contextlib.contextmanager
def tables_needed() -> Iterator[None]:
    """Make a SchemaError of a missing table; for our own statements, not for those of jobs."""
    try:
        yield
    except errors.UndefinedTable as error:
        raise SchemaError(
            "the tables of greenjobs are not in the database of this test, or not in a schema of its search_path; "
            "type `greenjobs migrate`, or call greenjobs.migrate.migrate() before the tests"
        ) from error
