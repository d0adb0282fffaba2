"""Plain JSON: which values it can carry, checked with the path to the first one that it cannot."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import orjson

# Deeper than any payload has a reason to be, and well within what orjson writes (254 levels) and Python recurses.
MAX_DEPTH = 100
# What serde reads into i64 or u64, and all that orjson writes.
MIN_INT, MAX_INT = -(2**63), 2**64 - 1
# From here on orjson writes a float with an exponent. Of 4.397738565085685e16 jsonb makes 43977385650856850, which is
# read as an int, and not as the one that the float is; 43977385650856848.0 it keeps.
FIRST_WITH_EXPONENT = 1e16
# A key longer than this is cut where a path quotes it.
QUOTED_KEY_LENGTH = 40

DICTS = (dict, OrderedDict, defaultdict, Counter)


class Unfit(Exception):
    """A value that cannot be written or read; each container that it passes on its way up adds a step to the path."""

    def __init__(self, reason: str, *, bottom: object = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self._bottom = bottom
        self._steps: list[str] = []

    @property
    def path(self) -> str:
        """The steps from the outermost container to the value, as in `[2].name`."""
        return "".join(reversed(self._steps))

    def passes(self, container: object, step: str) -> None:
        """Add the step that leads from the container to the value."""
        # The container where the depth ran out is met again further up exactly when it contains itself.
        if container is self._bottom:
            self.reason = "contains itself, which JSON cannot"
            self._steps.clear()
        else:
            self._steps.append(step)


class Foreign(Unfit):
    """A value of a type that JSON does not have; an annotation might have helped."""


def plain(value: Any, depth: int) -> Any:
    """Return the value made of what orjson writes as plain JSON alone; `depth` counts the containers around it.

    Raises Unfit.
    """
    # By exact type, and without calling anything of the value's own: it may be an object of any behaviour.
    kind = type(value)
    if kind is str:
        return checked_text(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        if MIN_INT <= value <= MAX_INT:
            return value
        raise Unfit("is an integer of more than 64 bits: pass it as str")
    if kind is float:
        if not math.isfinite(value):
            raise Unfit(f"is {value}, which JSON does not have: pass None, or leave it out")
        if FIRST_WITH_EXPONENT <= abs(value) <= MAX_INT:
            return orjson.Fragment(f"{value:.1f}")
        return value
    if kind is list or kind is tuple:
        return dump_items(value, plain, depth)
    if kind in DICTS:
        return dump_dict(value, plain, depth)
    if not issubclass(kind, Enum):
        for base, as_base in _EXTENDABLE:
            if issubclass(kind, base):
                return plain(as_base(value), depth)
    raise Foreign(f"is of type {kind.__name__}, which JSON does not have: {_way_out(kind)}")


def checked_text(text: str) -> str:
    """Return the text; raises Unfit if it is not valid Unicode, or has the one character that jsonb cannot store."""
    if "\x00" in text:
        raise Unfit(r"contains \u0000, which PostgreSQL cannot store as jsonb: remove it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unfit(
                f"contains a lone surrogate (at index {error.start}), which is not valid Unicode: "
                'decode the bytes it came from with errors="replace"'
            ) from None
    return text


def dump_items(value: Iterable[Any], dump: Callable[[Any, int], Any], depth: int) -> list[Any]:
    """Dump each item into a list."""
    check_depth(value, depth)
    result: list[Any] = []
    try:
        for item in value:
            result.append(dump(item, depth + 1))
    except Unfit as unfit:
        unfit.passes(value, f"[{len(result)}]")
        raise
    return result


def dump_dict(value: dict[Any, Any], dump: Callable[[Any, int], Any], depth: int) -> dict[str, Any]:
    """Dump each value into a dict; the keys must be str."""
    check_depth(value, depth)
    result: dict[str, Any] = {}
    for key, item in value.items():
        name = _checked_key(key)
        if name in result:
            raise Unfit(f"has two keys that are both stored as {quoted(name)[1:-1]}")
        try:
            result[name] = dump(item, depth + 1)
        except Unfit as unfit:
            unfit.passes(value, quoted(name))
            raise
    return result


def load_items(value: list[Any], load: Callable[[Any], Any]) -> list[Any]:
    """Load each item into a list."""
    result: list[Any] = []
    try:
        for item in value:
            result.append(load(item))
    except Unfit as unfit:
        unfit.passes(value, f"[{len(result)}]")
        raise
    return result


def check_depth(container: object, depth: int) -> None:
    """Refuse a container with too many others around it, as there always are around one that contains itself."""
    if depth >= MAX_DEPTH:
        raise Unfit(f"is nested more than {MAX_DEPTH} levels deep: pass something flatter", bottom=container)


def canonical_json(value: Any) -> bytes:
    """Return plain JSON as bytes that are the same for equal values, whatever the order of their keys."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def quoted(key: str) -> str:
    """Return the step of a path that a key of a dict is."""
    return f"[{key!r}]" if len(key) <= QUOTED_KEY_LENGTH else f"[{key[:QUOTED_KEY_LENGTH]!r}...]"


def _checked_key(key: Any) -> str:
    kind = type(key)
    if not issubclass(kind, str) or issubclass(kind, Enum):
        raise Unfit(f"has a key of type {kind.__name__}; keys in JSON are text: use str keys")
    try:
        return checked_text(str.__str__(key))
    except Unfit as unfit:
        unfit.reason = f"has a key that {unfit.reason}"
        raise


# What returns the plain value of a subclass, without asking the subclass.
_EXTENDABLE: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)

# The first that the type extends says what to do; {} is the name of the type.
_WAYS_OUT: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (Enum, "annotate it as {}, or pass its .value"),
    (datetime, "annotate it as datetime, or pass .isoformat()"),
    (date, "annotate it as date, or pass .isoformat()"),
    (time, "annotate it as time, or pass .isoformat()"),
    (timedelta, "annotate it as timedelta, or pass .total_seconds()"),
    (UUID, "annotate it as UUID, or pass str(...) of it"),
    (Decimal, "annotate it as Decimal, or pass str(...) of it"),
    ((set, frozenset), "annotate it as {}, or pass a list"),
    ((bytes, bytearray, memoryview), "pass text (.decode(), base64), or store the bytes and pass where they are"),
    ((list, tuple), "pass list(...) of it"),
    (dict, "pass dict(...) of it"),
)

# Of Django, by name, for it need not be there.
_WAYS_OUT_OF_DJANGO = {
    "django.db.models.base.Model": "pass its primary key, .pk, and load it in the job",
    "django.db.models.query.QuerySet": "pass the primary keys, list(….values_list('pk', flat=True))",
    "django.utils.functional.LazyObject": "pass the .pk of what it stands for, if it is a model, as request.user is",
    "django.utils.functional.Promise": "pass str(...) of it, which is the text in the language of now",
}


def _way_out(kind: type) -> str:
    for base in kind.__mro__:
        of_django = _WAYS_OUT_OF_DJANGO.get(f"{base.__module__}.{base.__qualname__}")
        if of_django is not None:
            return of_django
    for known, way_out in _WAYS_OUT:
        if issubclass(kind, known):
            return way_out.format(kind.__name__)
    if is_dataclass(kind):
        return f"annotate it as {kind.__name__}"
    if hasattr(kind, "_get_current_object"):  # werkzeug.local.LocalProxy
        return "pass what the proxy stands for, ._get_current_object()"
    if hasattr(kind, "__index__"):  # numpy.int64
        return "pass int(...) of it"
    return "pass its id, or the plain values that the job needs"
