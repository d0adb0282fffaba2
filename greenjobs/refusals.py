"""What the database refuses, said so that it can be mended: tables that are missing, rights that a role lacks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from psycopg2 import errors

from greenjobs.errors import AccessDenied, SchemaError


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Let what the database refuses in the block come out as SchemaError, or as AccessDenied; to be used around our own
    statements only."""
    try:
        yield
    except (errors.UndefinedTable, errors.UndefinedColumn) as error:
        raise SchemaError(
            "the tables of greenjobs are not in this database, older than this release, or not in a schema of its "
            "search_path; type `greenjobs migrate`"
        ) from error
    except errors.InsufficientPrivilege as error:
        raise denied(error) from error


def denied(error: errors.InsufficientPrivilege) -> AccessDenied:
    """The same, with the way out."""
    return AccessDenied(
        f"the database says: {str(error).strip()}; the owner of the tables can give the role its rights, with "
        f"`greenjobs migrate --grant run=ROLE`, or read=ROLE where it is only to look"
    )
