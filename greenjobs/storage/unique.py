"""Unique jobs come in: those whose keys are free are inserted, the others act on those that have them.

Both over and over until every job is settled: between a look and what is done about it, others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

from greenjobs.storage import conflicts

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor


# For jobs that take several statements, each of which has some from everywhere.
_DRAW_NUMBERS = """
SELECT nextval((SELECT pg_get_serial_sequence('background_jobs', 'id')::regclass))
FROM generate_series(1, %(count)s)
"""

_ACTIONS = {"keep": "kept", "replace": "replaced", "extend": "extended", "merge": "merged"}


class UniqueRule(NamedTuple):
    """For how long keys are taken, and what a job does to one that waits and has its key.

    A key is taken while its job waits; with `until_finished` while it runs, too; with `window_seconds` for so long, and
    by neither. `on_conflict` is "keep", "replace", "extend", or "merge", for which `merge` makes one JSON object, as
    text, of that of the waiting job and that of the new one.
    """

    until_finished: bool = False
    window_seconds: float | None = None
    on_conflict: str = "keep"
    merge: Callable[[str, str], str] | None = None

    def folded(self, items: Sequence[str]) -> str:
        """What these items of one key, the oldest first, come to as one job."""
        if self.on_conflict == "merge":
            assert self.merge is not None
            return reduce(self.merge, items)
        return items[-1] if self.on_conflict == "replace" else items[0]


class Portion(NamedTuple):
    """Jobs that are inserted in one statement, with their numbers, if these are drawn already."""

    data: Sequence[str]
    keys: Sequence[str | None]
    ids: Sequence[int] | None


# The data of all jobs that have a key, by that; and of each job that has none, by its place.
_Pending = dict[int | str, list[str]]


def enqueue_unique(
    cursor: Cursor,
    rule: UniqueRule,
    keys: Sequence[str | None],
    data: Sequence[str],
    new: conflicts.New,
    *,
    insert: Callable[[Portion], list[tuple[int, str | None]]],
    tell: Callable[[Sequence[conflicts.Changed]], None],
    at_once: int,
) -> list[tuple[int, str]]:
    """Enqueue jobs under these keys; returns id and action of each, in their order.

    `insert` inserts those whose keys are free, returns their ids and keys, and wakes whoever waits for them; `tell`
    does so for jobs that were changed. `new` says what else new jobs have. A job without a key is just inserted.
    """
    places = [place if key is None else key for place, key in enumerate(keys)]
    pending: _Pending = {}
    for place, item in zip(places, data, strict=True):
        pending.setdefault(place, []).append(item)
    found: dict[int | str, tuple[int, str]] = {}
    while pending:
        for some, ids in _portions(cursor, pending, at_once):
            inserted = insert(
                Portion(
                    data=[rule.folded(pending[place]) for place in some],
                    keys=[place if isinstance(place, str) else None for place in some],
                    ids=ids,
                )
            )
            without_key = (place for place in some if isinstance(place, int))
            for id, key in sorted(inserted):
                place = next(without_key) if key is None else key
                found[place] = (id, "enqueued")
                del pending[place]
        if pending:
            # The statement's snapshot may be older than the row it ran into, so that only a new look sees it. A job
            # that let go of its key between the two looks, or between the look and the change, is not among what was
            # met: once more, then.
            for key, met in _meet(cursor, rule, pending, new, tell).items():
                found[key] = met
                del pending[key]
    settled = []
    for place in places:
        id, action = found[place]
        settled.append((id, action))
        # Later ones of its key have done to it what new ones do, or have met one that cannot be changed.
        found[place] = (id, _ACTIONS[rule.on_conflict] if action == "enqueued" else action)
    return settled


def _portions(
    cursor: Cursor, pending: _Pending, at_once: int
) -> list[tuple[Sequence[int | str], Sequence[int] | None]]:
    """What to insert in one statement each, in the order of the keys, those that have none last.

    Every statement takes its keys in their order, too. So two who enqueue the same ones wait for one another, and never
    in a circle. The jobs are numbered in the order that they have.
    """
    if len(pending) <= at_once:
        return [(list(pending), None)]
    cursor.execute(_DRAW_NUMBERS, {"count": len(pending)})
    number = dict(zip(pending, sorted(row[0] for row in cursor.fetchall()), strict=True))
    places: list[int | str] = sorted(place for place in pending if isinstance(place, str))
    places += [place for place in pending if isinstance(place, int)]
    portions = [places[start : start + at_once] for start in range(0, len(places), at_once)]
    return [(some, [number[place] for place in some]) for some in portions]


def _meet(
    cursor: Cursor,
    rule: UniqueRule,
    pending: _Pending,
    new: conflicts.New,
    tell: Callable[[Sequence[conflicts.Changed]], None],
) -> dict[str, tuple[int, str]]:
    """Do to the jobs that have these keys what is to be done; returns id and action of those that were met, by key."""
    keys = [key for key in pending if isinstance(key, str)]
    if rule.window_seconds is not None:
        holders = conflicts.window_holders(cursor, keys)
    else:
        holders = conflicts.holders(cursor, keys, until_finished=rule.until_finished)
    met = {key: (holder.id, "kept") for key, holder in holders.items()}
    key_of = {holder.id: key for key, holder in sorted(holders.items(), key=lambda item: item[1]) if holder.waits}
    if rule.on_conflict == "keep" or not key_of:
        return met
    # The rows of jobs with a window have no key.
    waiting = {id: key if rule.window_seconds is None else None for id, key in key_of.items()}
    if rule.on_conflict == "merge":
        merge = rule.merge
        assert merge is not None
        ids = conflicts.merge(cursor, waiting, lambda id, data: reduce(merge, pending[key_of[id]], data), new)
    else:
        if rule.on_conflict == "replace":
            data = [rule.folded(pending[key]) for key in key_of.values()]
            changed = conflicts.replace(cursor, waiting, data, new)
        else:
            changed = conflicts.extend(cursor, waiting, new)
        tell(changed)
        ids = [each.id for each in changed]
    for key in key_of.values():
        del met[key]
    return met | {key_of[id]: (id, _ACTIONS[rule.on_conflict]) for id in ids}
