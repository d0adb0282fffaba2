"""Who may change a claimed job: the claim that it speaks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Fence(NamedTuple):
    """The claim that a change speaks for. Together with the ids of its runner it fits one claim ever."""

    id: int
    attempt: int


# A process that lost its session and registered again has several ids; what it claimed under any of them is its own.
FENCED = """
unnest(%(ids)s::bigint[], %(attempts)s::int[]) AS fence (id, attempt)
WHERE job.id = fence.id
    AND job.attempt = fence.attempt
    AND job.claimed_by = ANY(%(runners)s::int[])
"""

FENCE_TYPES = {"ids": "bigint[]", "attempts": "int[]", "runners": "int[]"}


def fence_parameters(runners: Sequence[int], fences: Sequence[Fence]) -> dict[str, Any]:
    ids, attempts = zip(*fences, strict=True)
    return {"ids": int_array(ids), "attempts": int_array(attempts), "runners": int_array(runners)}


def int_array(numbers: Iterable[int]) -> str:
    """PostgreSQL's text form of an array. psycopg2 would adapt every number by itself, which takes it longer than all
    else that an acknowledge does."""
    return "{" + ",".join(map(str, numbers)) + "}"
