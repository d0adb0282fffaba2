"""From annotation to shape: decides, when a job is declared, how each of its arguments is stored."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import sys
import types
import typing
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn

from greenjobs.errors import JobDefinitionError
from greenjobs.shapes.scalars import SCALARS, enum_shape
from greenjobs.shapes.shape import (
    ANY_KIND,
    KINDS,
    NULL,
    NUMBER,
    OBJECT,
    STRING,
    FixedTuple,
    Float,
    Items,
    Keyed,
    OneOf,
    Plain,
    Shape,
    Unresolved,
)

if TYPE_CHECKING:
    from greenjobs.shapes.dataclass_shape import StoredField

_SEQUENCES = (
    list,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Collection,
    collections.abc.Iterable,
    collections.abc.Reversible,
    collections.abc.Container,
)
_SETS: dict[Any, type] = {
    set: set,
    frozenset: frozenset,
    collections.abc.Set: set,
    collections.abc.MutableSet: set,
}
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class UnresolvedAnnotation:
    """An annotation that names something that cannot be found at run time, such as an import under TYPE_CHECKING."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def resolve(annotation: Any, global_names: dict[str, Any], local_names: dict[str, Any] | None = None) -> Any:
    """Return the annotation with the names in it looked up, or an UnresolvedAnnotation."""
    holder: Any = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, global_names, local_names)["it"]
    except Exception:  # NameError, AttributeError, SyntaxError, or whatever evaluating the text happens to raise
        return UnresolvedAnnotation(str(annotation))


class AnnotationReader:
    """Reads the annotations of one job; raises JobDefinitionError for one whose values could not come back as such.

    `where` is the place for messages, as in "the parameter 'to'".
    """

    __slots__ = ("_aliases", "_dataclasses", "_job_name")

    def __init__(self, job_name: str) -> None:
        self._job_name = job_name
        # Both also end the recursion of a dataclass or an alias that refers to itself.
        self._dataclasses: dict[type, Shape] = {}
        self._aliases: set[int] = set()

    def shape_of_argument(self, annotation: Any, default: Any, where: str) -> Shape:
        """Return the shape of a parameter or field; the default None makes it optional, as in `when: date = None`."""
        shape = self.shape_of(annotation, where)
        if default is None and NULL not in shape.kinds:
            return OneOf(shape.expected, [shape], nullable=True)
        return shape

    def dataclass_of(self, shape: Shape | None) -> type | None:
        """Return the dataclass that the shape is of; None for any other shape."""
        return next((python_type for python_type, known in self._dataclasses.items() if known is shape), None)

    def shape_of(self, annotation: Any, where: str) -> Shape:
        """Return the shape of one annotation."""
        if isinstance(annotation, UnresolvedAnnotation):
            return Unresolved(annotation.text, ANY_KIND)
        if hasattr(annotation, "__supertype__"):  # NewType
            return self.shape_of(annotation.__supertype__, where)
        origin = typing.get_origin(annotation)
        if origin in (typing.Union, types.UnionType):
            return self._union(annotation, where)
        if origin is typing.Literal:
            return self._literal(annotation, where)
        if origin is typing.Annotated:
            return self.shape_of(typing.get_args(annotation)[0], where)
        python_type = origin or annotation
        if type(python_type).__name__ == "TypeAliasType":  # `type Name = ...` of Python 3.12, or of typing_extensions
            return self._alias(python_type, where)
        if python_type is Any or not isinstance(python_type, type):  # a TypeVar, Unpack[...], "what it is for"
            return Plain(_text(annotation), ANY_KIND)
        if hasattr(python_type, "__required_keys__"):  # TypedDict, also that of typing_extensions
            return Plain(_text(annotation), [OBJECT])
        return self._class(python_type, annotation, where)

    def _class(self, python_type: type, annotation: Any, where: str) -> Shape:
        if python_type in SCALARS:
            return SCALARS[python_type]
        if python_type is float:
            return Float()
        if issubclass(python_type, Enum):
            return self._enum(python_type, annotation, where)
        if dataclasses.is_dataclass(python_type):
            return self._dataclass(python_type, annotation, where)
        if python_type is tuple:
            return self._tuple(annotation, where)
        if python_type in _SETS:
            return Items(_text(annotation), _SETS[python_type], self._item(annotation, where))
        if python_type in _SEQUENCES:
            item = self._item(annotation, where)
            if not isinstance(item, Plain):
                return Items(_text(annotation), list, item)
        if python_type in _MAPPINGS and typing.get_args(annotation):
            key, item = (self.shape_of(argument, where) for argument in typing.get_args(annotation))
            self._check_key(key, annotation, where)
            if not (isinstance(key, Plain) and isinstance(item, Plain)):
                return Keyed(_text(annotation), key, item)
        try:
            kinds = {kind for json_type, kind in KINDS.items() if issubclass(json_type, python_type)}
        except TypeError:  # a Protocol that does not answer
            kinds = set(ANY_KIND)
        if not kinds:
            self._refuse(where, annotation, f"which JSON cannot carry: {_way_out(python_type)}")
        return Plain(_text(annotation), kinds)

    def _enum(self, enum: type[Enum], annotation: Any, where: str) -> Shape:
        shape = enum_shape(enum)
        if shape is None:
            self._refuse(
                where, annotation, "whose values lead nowhere: give every member a str, int, float or bool of its own"
            )
        return shape

    def _tuple(self, annotation: Any, where: str) -> Shape:
        arguments = typing.get_args(annotation)
        if arguments == ((),):  # what Python 3.10 has for the empty tuple
            arguments = ()
        any_item = annotation in (tuple, typing.Tuple)  # noqa: UP006
        if any_item or any(_is_unpacked(argument) for argument in arguments):
            return Items(_text(annotation), tuple, Plain("Any", ANY_KIND))
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return Items(_text(annotation), tuple, self.shape_of(arguments[0], where))
        return FixedTuple(_text(annotation), [self.shape_of(argument, where) for argument in arguments])

    def _item(self, annotation: Any, where: str) -> Shape:
        arguments = typing.get_args(annotation)
        return self.shape_of(arguments[0], where) if arguments else Plain("Any", ANY_KIND)

    def _check_key(self, key: Shape, annotation: Any, where: str) -> None:
        if isinstance(key, Plain) and STRING in key.kinds or key.kinds == {STRING}:
            return
        self._refuse(where, annotation, "but keys in JSON are text: annotate them as str, and convert them in the job")

    def _literal(self, annotation: Any, where: str) -> Shape:
        python_types = {type(value) for value in typing.get_args(annotation)}
        if python_types <= KINDS.keys():
            return Plain(_text(annotation), {KINDS[python_type] for python_type in python_types})
        (python_type, *others) = python_types
        if others or not issubclass(python_type, Enum):
            self._refuse(where, annotation, "which is neither all str, int, bool and None, nor all of one Enum")
        return self._enum(python_type, annotation, where)

    def _alias(self, alias: Any, where: str) -> Shape:
        if id(alias) in self._aliases:
            return Plain(alias.__name__, ANY_KIND)
        try:
            value = alias.__value__
        except Exception:  # it is evaluated now; what resolve() says holds here as well
            return Unresolved(alias.__name__, ANY_KIND)
        self._aliases.add(id(alias))
        try:
            return self.shape_of(value, where)
        finally:
            self._aliases.discard(id(alias))

    def _union(self, annotation: Any, where: str) -> Shape:
        arguments = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        nullable = len(arguments) < len(typing.get_args(annotation))
        members = [self.shape_of(argument, where) for argument in arguments]
        plain = [member for member in members if isinstance(member, Plain)]
        if any(NUMBER in member.kinds for member in plain):
            # Of `int | float` jsonb may give either back for the other, and an int where a float was suits both.
            members = [member for member in members if not isinstance(member, Float)]
        if len(members) == len(plain):
            kinds = {kind for member in plain for kind in member.kinds}
            return Plain(_text(annotation), kinds | {NULL} if nullable else kinds)
        for index, member in enumerate(members):
            for other in members[index + 1 :]:
                shared = (member.kinds & other.kinds) - {NULL}
                if shared and not (isinstance(member, Plain) and isinstance(other, Plain)):
                    self._refuse(
                        where,
                        annotation,
                        f"but {member.expected} and {other.expected} are both stored as {min(shared)}, and nothing "
                        "would tell them apart: annotate one of them, or use a parameter for each",
                    )
        return OneOf(_text(annotation), members, nullable=nullable)

    def _dataclass(self, python_type: type, annotation: Any, where: str) -> Shape:
        from greenjobs.shapes import dataclass_shape  # most jobs have none, and an import should cost them nothing

        if typing.get_args(annotation):
            self._refuse(where, annotation, "which is generic: annotate a dataclass that has the types written out")
        if python_type in self._dataclasses:
            return self._dataclasses[python_type]
        if dataclass_shape.has_own_methods(python_type):
            return self._dataclasses.setdefault(python_type, dataclass_shape.OwnMethods(python_type))
        shape = dataclass_shape.Dataclass(python_type)
        self._dataclasses[python_type] = shape
        self._check_constructor(python_type)
        class_config: dict[str, Any] = getattr(python_type, "dataclass_json_config", None) or {}
        annotations = _field_annotations(python_type)
        undefined = self._undefined_field(python_type, class_config, annotations)
        fields = [
            self._field(python_type, field, annotations[field.name], class_config)
            for field in dataclasses.fields(python_type)
            if field.name != undefined
        ]
        json_names = [field.json_name for field in fields]
        for name in json_names:
            if json_names.count(name) > 1:
                self._fail(f"two fields of {python_type.__name__} are both named {name!r} in JSON: rename one of them")
        shape.define(fields, class_config, undefined)
        return shape

    def _field(
        self, python_type: type, field: dataclasses.Field[Any], annotation: Any, class_config: dict[str, Any]
    ) -> StoredField:
        from greenjobs.shapes import dataclass_shape

        where = f"the field {python_type.__name__}.{field.name}"
        options: dict[str, Any] = dict(field.metadata.get("dataclasses_json", {}))
        global_encoder, global_decoder = dataclass_shape.global_coders(annotation)
        encoder = options.get("encoder") or global_encoder
        decoder = options.get("decoder") or global_decoder
        required = field.init and not dataclass_shape.has_default(field)
        if options.get("exclude") and required:
            self._fail(f"{where} can be excluded from JSON, but has no default to come back as: give it one")
        shape = None
        if encoder is None or decoder is None:
            shape = self.shape_of_argument(annotation, field.default, where)
        letter_case = options.get("letter_case") or class_config.get("letter_case")
        return dataclass_shape.StoredField(
            name=field.name,
            json_name=letter_case(field.name) if letter_case else field.name,
            owner_name=python_type.__name__,
            shape=shape,
            encoder=encoder,
            decoder=decoder,
            in_init=field.init,
            required=required,
            options=options,
        )

    def _check_constructor(self, python_type: type) -> None:
        parameters = inspect.signature(python_type).parameters.values()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        taken = {parameter.name for parameter in parameters if parameter.kind not in variadic}
        stored = {field.name for field in dataclasses.fields(python_type) if field.init}
        for name in sorted(taken - stored):
            self._fail(
                f"{python_type.__name__} is made from {name!r} (an InitVar?), which is not a field, and so would be "
                "lost: make it one"
            )
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            for name in sorted(stored - taken):
                self._fail(
                    f"the __init__ of {python_type.__name__} does not take its field {name!r}: let it, by keyword"
                )

    def _undefined_field(
        self, python_type: type, class_config: dict[str, Any], annotations: dict[str, Any]
    ) -> str | None:
        from greenjobs.shapes import dataclass_shape

        if not dataclass_shape.includes_undefined(class_config):
            return None
        names = [name for name, annotation in annotations.items() if dataclass_shape.is_catch_all(annotation)]
        if len(names) != 1:
            self._fail(f"{python_type.__name__} is to include undefined fields: give it one field annotated CatchAll")
        return names[0]

    def _refuse(self, where: str, annotation: Any, reason: str) -> NoReturn:
        self._fail(f"{where} is annotated as {_text(annotation)}, {reason}")

    def _fail(self, reason: str) -> NoReturn:
        raise JobDefinitionError(f"job {self._job_name!r}: {reason}")


def _field_annotations(python_type: type) -> dict[str, Any]:
    """Return the resolved annotation of each field, looked up where its class was defined."""
    result = {}
    for field in dataclasses.fields(python_type):
        owner = next((base for base in python_type.__mro__ if field.name in inspect.get_annotations(base)), python_type)
        module = sys.modules.get(owner.__module__)
        # The class itself is among the names, so that one defined in a function can refer to itself.
        result[field.name] = resolve(field.type, vars(module) if module else {}, {owner.__name__: owner})
    return result


def _is_unpacked(argument: Any) -> bool:
    """Whether it is `*Items`, for any number of items, among the items of a tuple."""
    return getattr(argument, "__unpacked__", False) or "Unpack" in str(typing.get_origin(argument))


def _text(annotation: Any) -> str:
    return inspect.formatannotation(annotation)


def _way_out(python_type: type) -> str:
    if issubclass(python_type, (bytes, bytearray, memoryview)):
        return "annotate it as str and pass text (.decode(), base64), or store the bytes and pass where they are"
    if issubclass(python_type, tuple):
        return "annotate it as tuple[...], or make it a dataclass"
    for base in (str, int, float, list, dict):
        if issubclass(python_type, base):
            return f"annotate it as {base.__name__}, and convert it in the job"
    return "pass its id and load it in the job, or annotate a dataclass of the plain values that the job needs"
