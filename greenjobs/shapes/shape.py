"""How the values of one annotation are written as JSON and read again: the plain, and the containers of others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from greenjobs.shapes.plain import (
    DICTS,
    Foreign,
    Unfit,
    canonical_json,
    dump_dict,
    dump_items,
    load_items,
    plain,
    quoted,
)

STRING, NUMBER, BOOLEAN, ARRAY, OBJECT, NULL = "a string", "a number", "a boolean", "an array", "an object", "null"
KINDS: dict[type, str] = {
    str: STRING,
    int: NUMBER,
    float: NUMBER,
    bool: BOOLEAN,
    list: ARRAY,
    dict: OBJECT,
    type(None): NULL,
}
ANY_KIND = frozenset(KINDS.values())


class Shape(ABC):
    """How the values of one annotation are stored.

    `expected` is the annotation, for messages; `kinds` are the kinds of JSON value that `dump` may return.
    """

    __slots__ = ("expected", "kinds")

    def __init__(self, expected: str, kinds: Iterable[str]) -> None:
        self.expected = expected
        self.kinds = frozenset(kinds)

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Whether the value is of the type annotated; what is inside it is not looked at."""

    @abstractmethod
    def dump(self, value: Any, depth: int) -> Any:
        """Return the value as plain JSON; `depth` counts the containers around it. Raises Unfit."""

    @abstractmethod
    def load(self, value: Any) -> Any:
        """Return what was dumped, from the JSON that it became. Raises Unfit."""

    def unexpected(self, value: Any) -> Unfit:
        """Return the error for a value that is not of the annotated type."""
        if value is None:
            return Unfit(f"is None, where {self.expected} is annotated: annotate it as {self.expected} | None")
        return Unfit(f"is of type {type(value).__name__}, where {self.expected} is annotated")

    def unreadable(self, value: Any) -> Unfit:
        """Return the error for stored JSON of another kind than `dump` writes."""
        return Unfit(f"is {KINDS[type(value)]} in the stored payload, where {self.expected} is annotated")


class Plain(Shape):
    """JSON as it is, of whatever kind: annotations such as str or list[int] are not enforced."""

    __slots__ = ()

    def accepts(self, value: Any) -> bool:
        return KINDS.get(type(value)) in self.kinds

    def dump(self, value: Any, depth: int) -> Any:
        return plain(value, depth)

    def load(self, value: Any) -> Any:
        return value


class Unresolved(Plain):
    """Plain JSON for want of knowing better: the annotation names something that does not exist at run time."""

    __slots__ = ()

    def dump(self, value: Any, depth: int) -> Any:
        try:
            return plain(value, depth)
        except Foreign as unfit:
            unfit.reason += (
                f" (its annotation, {self.expected}, could not be resolved and was not used: "
                "define or import the name at module level, not under TYPE_CHECKING)"
            )
            raise


class Float(Shape):
    """A float; also where an int was passed, or jsonb has made one of what another program stored."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("float", [NUMBER])

    def accepts(self, value: Any) -> bool:
        return type(value) in (float, int)

    def dump(self, value: Any, depth: int) -> Any:
        return plain(value, depth)

    def load(self, value: Any) -> Any:
        return float(value) if type(value) is int else value


class Items(Shape):
    """A list, tuple of any length, set or frozenset, of items of one shape; written as an array.

    Lists and tuples may be passed for each other and come back as annotated; so may sets and frozensets.
    """

    __slots__ = ("_item", "_type")

    def __init__(self, expected: str, python_type: type, item: Shape) -> None:
        super().__init__(expected, [ARRAY])
        self._type = python_type
        self._item = item

    def accepts(self, value: Any) -> bool:
        return type(value) in ((list, tuple) if self._type in (list, tuple) else (set, frozenset))

    def dump(self, value: Any, depth: int) -> Any:
        if not self.accepts(value):
            raise self.unexpected(value)
        written = dump_items(value, self._item.dump, depth)
        if self._type in (list, tuple):
            return written
        if isinstance(self._item, Plain) and any(type(item) is list for item in written):
            raise Unfit("holds tuples, which come back as lists and fit in no set: annotate it as set[tuple[...]]")
        return sorted(written, key=canonical_json)

    def load(self, value: Any) -> Any:
        if type(value) is not list:
            raise self.unreadable(value)
        items = load_items(value, self._item.load)
        try:
            return items if self._type is list else self._type(items)
        except TypeError as error:
            raise Unfit(f"holds what cannot be in {self.expected} ({error})") from error


class FixedTuple(Shape):
    """A tuple of so many items, each with a shape of its own; written as an array."""

    __slots__ = ("_items",)

    def __init__(self, expected: str, items: list[Shape]) -> None:
        super().__init__(expected, [ARRAY])
        self._items = items

    def accepts(self, value: Any) -> bool:
        return type(value) in (list, tuple)

    def dump(self, value: Any, depth: int) -> Any:
        if not self.accepts(value):
            raise self.unexpected(value)
        self._check_length(value)
        shapes = iter(self._items)
        return dump_items(value, lambda item, depth: next(shapes).dump(item, depth), depth)

    def load(self, value: Any) -> Any:
        if type(value) is not list:
            raise self.unreadable(value)
        self._check_length(value)
        shapes = iter(self._items)
        return tuple(load_items(value, lambda item: next(shapes).load(item)))

    def _check_length(self, value: Any) -> None:
        if len(value) != len(self._items):
            raise Unfit(f"has {len(value)} items, where {self.expected} is annotated")


class Keyed(Shape):
    """A dict whose keys, written as strings, have one shape, and its values another; written as an object."""

    __slots__ = ("_item", "_key")

    def __init__(self, expected: str, key: Shape, item: Shape) -> None:
        super().__init__(expected, [OBJECT])
        self._key = key
        self._item = item

    def accepts(self, value: Any) -> bool:
        return type(value) in DICTS

    def dump(self, value: Any, depth: int) -> Any:
        if not self.accepts(value):
            raise self.unexpected(value)
        if isinstance(self._key, Plain):
            return dump_dict(value, self._item.dump, depth)
        return dump_dict({self._key.dump(key, depth): item for key, item in value.items()}, self._item.dump, depth)

    def load(self, value: Any) -> Any:
        if type(value) is not dict:
            raise self.unreadable(value)
        result = {}
        for key, item in value.items():
            try:
                result[self._key.load(key)] = self._item.load(item)
            except Unfit as unfit:
                unfit.passes(value, quoted(key))
                raise
        return result


class OneOf(Shape):
    """One of several shapes that write different kinds of JSON, so that the kind tells which one it was."""

    __slots__ = ("_by_kind", "_converting", "_nullable", "_otherwise")

    def __init__(self, expected: str, members: list[Shape], *, nullable: bool) -> None:
        kinds = {kind for member in members for kind in member.kinds}
        super().__init__(expected, kinds | {NULL} if nullable else kinds)
        self._by_kind = {kind: member for member in members for kind in member.kinds}
        self._converting = [member for member in members if not isinstance(member, Plain)]
        self._nullable = nullable
        # What belongs to no member goes to the plain one, which enforces nothing, or to one that says what it wants.
        self._otherwise = next((member for member in members if isinstance(member, Plain)), members[0])

    def accepts(self, value: Any) -> bool:
        if value is None and self._nullable:
            return True
        return any(member.accepts(value) for member in (*self._converting, self._otherwise))

    def dump(self, value: Any, depth: int) -> Any:
        if value is None and self._nullable:
            return None
        for member in self._converting:
            if member.accepts(value):
                return member.dump(value, depth)
        return self._otherwise.dump(value, depth)

    def load(self, value: Any) -> Any:
        if value is None and self._nullable:
            return None
        return self._by_kind.get(KINDS[type(value)], self._otherwise).load(value)
