"""What was said of queues at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class QueueSetting(NamedTuple):
    """What was said of a queue at run time. A `pool` of None is what each runner was started with."""

    paused: bool
    pool: int | None


UNCHANGED = QueueSetting(False, None)
"""What holds for a queue of which nothing was said."""

QUEUE_SETTINGS = """
SELECT jsonb_object_agg(name, jsonb_build_array(paused, pool))
FROM background_queues
"""


def queue_settings(connection: Connection) -> dict[str, QueueSetting]:
    """What was said of queues, by name."""
    with connection.cursor() as cursor:
        cursor.execute(QUEUE_SETTINGS)
        row = cursor.fetchone()
        return as_settings(None if row is None else row[0])


def as_settings(found: Mapping[str, Sequence[Any]] | None) -> dict[str, QueueSetting]:
    """What QUEUE_SETTINGS found, by the name of the queue."""
    return {name: QueueSetting._make(setting) for name, setting in (found or {}).items()}
