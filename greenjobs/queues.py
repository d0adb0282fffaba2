"""Queues while runners serve them: look at them, pause and resume them, change how many of their jobs run at a time.

What is said here is kept in the database until it is taken back. Runners hear of it at once, and those that do not, or
start later, read it.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from greenjobs import config, inspection, storage
from greenjobs.current import lender
from greenjobs.errors import OptionError, UnknownQueue
from greenjobs.inspection import Queue, QueueServer
from greenjobs.job import check_queue_name
from greenjobs.refusals import explained

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

__all__ = ["Queue", "QueueServer", "find", "get", "pause", "resize", "resume"]


def find() -> list[Queue]:
    """All queues by name: those that have jobs, are served by a live runner, or were paused or resized."""
    with _connection() as connection:
        return inspection.queues(connection)


def get(name: str) -> Queue | None:
    """This queue; None if it has no jobs, no live runner serves it, and nothing was said of it. Raises OptionError."""
    (name,) = _checked((name,))
    with _connection() as connection:
        found = inspection.queues(connection, [name])
        return found[0] if found else None


def pause(*names: str, force: bool = False) -> list[str]:
    """Let no further job of these queues start, in no runner, until they are resumed; returns those not paused before.

    What runs goes on, and jobs can be enqueued. It holds for runners that start later, too. Committed when this
    returns; runners follow within a second. Raises OptionError for what cannot be the name of a queue; UnknownQueue,
    and nothing is changed, for one that has no jobs and that no live runner serves, unless `force` is given;
    DatabaseUnavailable; SchemaError; AccessDenied.
    """
    names = _checked(names)
    with _connection() as connection:
        if not force:
            _require_known(connection, names)
        changed = storage.pause_queues(connection, names)
    return [name for name in names if name in changed]


def resume(*names: str) -> list[str]:
    """Let jobs of these queues start again, at once; returns those that were paused. Raises as `pause`."""
    names = _checked(names)
    with _connection() as connection:
        _require_known(connection, names)
        changed = storage.resume_queues(connection, names)
    return [name for name in names if name in changed]


def resize(name: str, pool: int | None, *, force: bool = False) -> bool:
    """Let `pool` jobs of this queue run at a time in every runner; whether that is a change.

    None gives every runner the pool back that it was started with. More jobs start at once; where it is fewer, those
    that run go on. In a share no more jobs run than it has slots. Holds for runners that start later, too. Raises as
    `pause`.
    """
    names = _checked((name,))
    if pool is not None:
        option = config.OPTIONS["pool"]
        try:
            option.parse(pool)
        except ValueError:
            raise OptionError(
                f"the queue {name!r}: pool is {pool!r}; allowed: {option.allowed}, or what each runner was started with"
            ) from None
    with _connection() as connection:
        if not force:
            _require_known(connection, names)
        if pool is None:
            return bool(storage.restore_queue_sizes(connection, names))
        return bool(storage.resize_queues(connection, names, pool=int(pool)))


def _checked(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repetitions."""
    if not names:
        raise OptionError("name at least one queue")
    return tuple(dict.fromkeys(check_queue_name(name, "queue", OptionError) for name in names))


def _require_known(connection: Connection, names: Sequence[str]) -> None:
    known = inspection.known_queues(connection, names)
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    others = [queue.name for queue in inspection.queues(connection)]
    near = difflib.get_close_matches(unknown[0], others, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(map(repr, others)) or 'none'}"
    raise UnknownQueue(f"the queue {unknown[0]!r} has no jobs, and no live runner serves it; {hint}")


@contextlib.contextmanager
def _connection() -> Iterator[Connection]:
    """A transaction in which statements may take their time."""
    with explained(), lender(config.current()).connection() as connection, storage.patiently(connection):
        yield connection
