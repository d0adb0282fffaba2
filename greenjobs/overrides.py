"""What the options of a row say otherwise than its job, as far as they can be meant so.

`.options()` writes what it has checked. But the column is JSON, and anybody with SQL may have written anything: what
makes no sense leaves a thing to the job, lest one row keep its runner from settling it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_MOST_RETRIES = 10_000
_LONGEST_TIMEOUT_SECONDS = 366 * 24 * 60 * 60.0


def read(options: str | None) -> Mapping[str, Any]:
    """The options as a mapping; empty for none, and for what is no JSON object, or nested beyond reading."""
    if options is None:
        return {}
    try:
        found = json.loads(options)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def retries(options: str | None, declared: int) -> int:
    """How often the job may be tried again."""
    said = read(options).get("max_retries")
    return said if type(said) is int and 0 <= said <= _MOST_RETRIES else declared


def seconds(options: Mapping[str, Any], name: str, declared: float | None) -> float | None:
    """A timeout by its name."""
    said = options.get(name)
    is_one = isinstance(said, (int, float)) and not isinstance(said, bool) and 0 < said <= _LONGEST_TIMEOUT_SECONDS
    return float(said) if is_one and said is not None else declared
