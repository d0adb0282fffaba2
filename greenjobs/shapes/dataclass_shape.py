"""Dataclasses in payloads, written and read by dataclasses-json.

Names, aliases, encoders, decoders, excluded and undefined fields are thus what `@dataclass_json` and `config()` say.
Left to itself, though, the library writes a datetime as a float, reads a Union as its first member, leaves what is in
nested generics as dicts, and knows a missing field only as a KeyError. So it is given a mirror of the class, with the
same fields and options, where every field has an encoder and a decoder made from its annotation. Neither the user's
class nor the library's global configuration is touched.

- Fields that the class does not know are ignored when reading, unless it says `undefined=Undefined.RAISE` or `INCLUDE`.
- A field that is missing gets its default from the class; without one the payload does not fit.
- A field with `init=False` is stored like any other, and set again after `__post_init__` has run.
- An instance of a subclass is refused where the base class is annotated: it would lose what it adds.

Importing dataclasses-json takes about 100 ms, so it is done for the first job that has a dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from greenjobs.shapes.plain import Unfit, check_depth, plain
from greenjobs.shapes.shape import OBJECT, Shape

# What a field of the mirror holds where the object, or the stored payload, has none.
_ABSENT: Any = object()


class _Held(NamedTuple):
    """The value of a field in the mirror, with what its encoder must know and the library does not pass on."""

    value: Any
    depth: int
    owner: object


@dataclass(frozen=True, slots=True)
class StoredField:
    """One field of a dataclass and how it is stored: by its shape, where the user has not given a coder."""

    name: str
    json_name: str
    owner_name: str
    shape: Shape | None
    encoder: Callable[[Any], Any] | None
    decoder: Callable[[Any], Any] | None
    in_init: bool
    required: bool
    options: dict[str, Any]

    def mirrored(self) -> Any:
        """Return this field for the mirror, with the options that dataclasses-json looks for."""
        options = {**self.options, "encoder": self._encode, "decoder": self._decode, "exclude": self._is_excluded}
        return dataclasses.field(default=_ABSENT, metadata={"dataclasses_json": options})

    def checked(self, value: Any) -> Any:
        """Return a value that was read; the library shows None to no decoder, so whether it may be is seen here."""
        return self._decode(None) if value is None and self.decoder is None else value

    def _is_excluded(self, held: _Held) -> bool:
        exclude = self.options.get("exclude")
        return held.value is _ABSENT or (exclude is not None and bool(exclude(held.value)))

    def _encode(self, held: _Held) -> Any:
        try:
            if self.encoder is None and self.shape is not None:
                return self.shape.dump(held.value, held.depth)
            return plain(self._call(self.encoder, held.value, "encoder"), held.depth)
        except Unfit as unfit:
            unfit.passes(held.owner, f".{self.name}")
            raise

    def _decode(self, value: Any) -> Any:
        if value is _ABSENT:
            return value
        try:
            if self.decoder is None and self.shape is not None:
                return self.shape.load(value)
            return self._call(self.decoder, value, "decoder")
        except Unfit as unfit:
            unfit.passes(self, f".{self.name}")
            raise

    def _call(self, coder: Any, value: Any, role: str) -> Any:
        try:
            return coder(value)
        except Exception as error:  # the user's code
            raise Unfit(f"is refused by the {role} of {self.owner_name}.{self.name}: {_said(error)}") from error


class Dataclass(Shape):
    """A dataclass; written as the object of its fields."""

    __slots__ = ("_fields", "_from_dict", "_json_names", "_mirror", "_to_dict", "_undefined", "python_type")

    def __init__(self, python_type: type) -> None:
        super().__init__(python_type.__name__, [OBJECT])
        self.python_type = python_type

    def define(self, fields: list[StoredField], class_config: dict[str, Any], undefined: str | None) -> None:
        """Give the shape its fields; not in the constructor, for a field may be of this very dataclass.

        `class_config` is what `@dataclass_json(...)` was told; `undefined` is the name of the CatchAll field.
        """
        from dataclasses_json import CatchAll, DataClassJsonMixin

        self._fields = fields
        self._json_names = {field.json_name for field in fields}
        self._undefined = undefined
        mirrored: list[tuple[str, Any, Any]] = [(field.name, Any, field.mirrored()) for field in fields]
        if undefined is not None:
            original = next(field for field in dataclasses.fields(self.python_type) if field.name == undefined)
            default = dataclasses.field(default=_ABSENT) if has_default(original) else dataclasses.field()
            mirrored.append((undefined, CatchAll, default))
        self._mirror: Any = dataclasses.make_dataclass(
            self.python_type.__name__, mirrored, namespace={"dataclass_json_config": class_config}, kw_only=True
        )
        self._to_dict: Any = DataClassJsonMixin.to_dict
        self._from_dict: Any = vars(DataClassJsonMixin)["from_dict"].__func__

    @property
    def json_names(self) -> dict[str, str]:
        """What its fields are called in the stored object, by their names."""
        return {field.name: field.json_name for field in self._fields}

    def accepts(self, value: Any) -> bool:
        return type(value) is self.python_type

    def dump(self, value: Any, depth: int) -> Any:
        if not self.accepts(value):
            raise self.unexpected(value)
        check_depth(value, depth)
        try:
            held: dict[str, Any] = {
                field.name: _Held(getattr(value, field.name, _ABSENT), depth + 1, value) for field in self._fields
            }
            if self._undefined is not None:
                held[self._undefined] = self._undefined_fields(value, self._undefined, depth)
            return self._to_dict(self._mirror(**held))
        except Unfit:
            raise
        except Exception as error:  # a property of the class, or a predicate given as exclude=
            raise Unfit(f"cannot be written as {self.expected}: {_said(error)}") from error

    def load(self, value: Any) -> Any:
        if type(value) is not dict:
            raise self.unreadable(value)
        mirror = self._read(value)
        arguments: dict[str, Any] = {}
        afterwards: dict[str, Any] = {}
        for field in self._fields:
            loaded = getattr(mirror, field.name)
            if loaded is not _ABSENT:
                (arguments if field.in_init else afterwards)[field.name] = field.checked(loaded)
            elif field.required:
                raise Unfit(f"lacks the field {field.json_name!r}, which {self.expected} needs")
        if self._undefined is not None and (undefined := getattr(mirror, self._undefined)) is not _ABSENT:
            arguments[self._undefined] = undefined
        try:
            result = self.python_type(**arguments)
        except Exception as error:  # its __post_init__ may refuse
            raise Unfit(f"is refused by {self.expected}: {_said(error)}") from error
        for name, loaded in afterwards.items():
            object.__setattr__(result, name, loaded)  # of a frozen dataclass, too
        return result

    def _read(self, value: dict[str, Any]) -> Any:
        from dataclasses_json.undefined import UndefinedParameterError

        try:
            return self._from_dict(self._mirror, value)
        except UndefinedParameterError as error:
            unknown = ", ".join(sorted(repr(name) for name in value.keys() - self._json_names))
            raise Unfit(f"has fields that {self.expected} does not know: {unknown}") from error

    def _undefined_fields(self, value: Any, name: str, depth: int) -> Any:
        undefined = getattr(value, name)
        if undefined is None:
            return None
        try:
            written = plain(undefined, depth + 1)
            if type(written) is not dict:
                raise Unfit(f"is of type {type(undefined).__name__}; undefined fields are kept in a dict")
            if clash := written.keys() & {name, *self._json_names, *(field.name for field in self._fields)}:
                raise Unfit(f"has the key {min(clash)!r}, which is a field already")
            return written
        except Unfit as unfit:
            unfit.passes(value, f".{name}")
            raise


class OwnMethods(Shape):
    """A dataclass of dataclasses-json that overrides its to_dict or from_dict: both are taken at their word."""

    __slots__ = ("python_type",)

    def __init__(self, python_type: type) -> None:
        super().__init__(python_type.__name__, [OBJECT])
        self.python_type: Any = python_type

    def accepts(self, value: Any) -> bool:
        return type(value) is self.python_type

    def dump(self, value: Any, depth: int) -> Any:
        if not self.accepts(value):
            raise self.unexpected(value)
        try:
            written = value.to_dict()
        except Exception as error:
            raise Unfit(f"is refused by {self.expected}.to_dict: {_said(error)}") from error
        if type(written) is not dict:
            raise Unfit(f"is written by {self.expected}.to_dict as {type(written).__name__}, not as a dict")
        return plain(written, depth)

    def load(self, value: Any) -> Any:
        if type(value) is not dict:
            raise self.unreadable(value)
        try:
            return self.python_type.from_dict(value)
        except Exception as error:
            raise Unfit(f"is refused by {self.expected}.from_dict: {_said(error)}") from error


def has_default(field: dataclasses.Field[Any]) -> bool:
    """Whether the dataclass can be made without the field."""
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def has_own_methods(python_type: Any) -> bool:
    """Whether the class belongs to dataclasses-json and has a to_dict or from_dict of its own."""
    from dataclasses_json import DataClassJsonMixin

    if not issubclass(python_type, DataClassJsonMixin):
        return False
    theirs = vars(DataClassJsonMixin)
    from_dict = getattr(python_type.from_dict, "__func__", None)
    return python_type.to_dict is not theirs["to_dict"] or from_dict is not theirs["from_dict"].__func__


def is_catch_all(annotation: Any) -> bool:
    """Whether a field has the annotation of dataclasses-json for the one that keeps undefined fields."""
    from dataclasses_json import CatchAll

    return bool(annotation == CatchAll)


def includes_undefined(class_config: dict[str, Any]) -> bool:
    """Whether the class was told to keep undefined fields."""
    from dataclasses_json import Undefined

    return class_config.get("undefined") is Undefined.INCLUDE


def global_coders(annotation: Any) -> tuple[Any, Any]:
    """Return the encoder and decoder that the library's global configuration has for a class, or None for either."""
    from dataclasses_json import global_config

    if not isinstance(annotation, type):
        return None, None
    return global_config.encoders.get(annotation), global_config.decoders.get(annotation)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
