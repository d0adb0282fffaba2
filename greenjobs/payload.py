"""The arguments of one job as `data`, the JSON object of a job row, and back.

Hides how a call is bound and how its values are stored. `data` has the arguments that were passed, by parameter name;
or, where the one parameter of the job is a dataclass, the fields of that dataclass. This is what the crate's serde
writes for the same job, so that each language can enqueue for the other. `shapes` says what each type is stored as.

- Arguments left to their defaults are not stored: a release that changes a default changes it for waiting jobs, too.
- Equal calls give equal text, whether arguments were passed by position or by name: the parameters stand in the order
  of the signature, and keys inside of them in alphabetical order (jsonb keeps no order of its own).
- `*args` is stored as a list under its name. What `**extra` takes is stored beside the other arguments, by name.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import orjson

from greenjobs.errors import JobDefinitionError, PayloadError, PayloadMismatch
from greenjobs.shapes.annotations import AnnotationReader, resolve
from greenjobs.shapes.dataclass_shape import Dataclass
from greenjobs.shapes.plain import Unfit, canonical_json, checked_text
from greenjobs.shapes.shape import ANY_KIND, ARRAY, Items, Plain, Shape

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ANY = Plain("Any", ANY_KIND)
_SCALARS = frozenset({str, int, bool, type(None)})


class Codec:
    """Writes the arguments of one job as JSON and reads them again.

    `parameters` are the names of the function's parameters, in its order. `dataclass` is the dataclass whose fields are
    the payload, if the function has one parameter, annotated so and without a default; else None.

    Everything is decided when the codec is made, from the signature and the annotations. Raises JobDefinitionError,
    which names the job, the parameter and the way out, for what could not make the round trip.
    """

    __slots__ = (
        "_by_name",
        "_converting",
        "_defaults",
        "_extra",
        "_extra_shape",
        "_function_name",
        "_is_plain",
        "_job_name",
        "_names",
        "_positional",
        "_positional_only",
        "_required",
        "_rest",
        "_shapes",
        "_signature",
        "dataclass",
        "parameters",
    )

    def __init__(self, function: Callable[..., object], *, job_name: str) -> None:
        self._job_name = job_name
        self._signature = _signature_of(function, job_name)
        self._function_name = function.__name__
        parameters = self._signature.parameters.values()
        self.parameters = tuple(each.name for each in parameters)
        self._positional = tuple(each.name for each in parameters if each.kind in _POSITIONAL)
        self._positional_only = tuple(each.name for each in parameters if each.kind is each.POSITIONAL_ONLY)
        self._by_name = tuple(each.name for each in parameters if each.kind in _BY_NAME)
        self._rest = next((each.name for each in parameters if each.kind is each.VAR_POSITIONAL), None)
        self._extra = next((each.name for each in parameters if each.kind is each.VAR_KEYWORD), None)
        self._defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        self._required = frozenset(self._positional + self._by_name) - self._defaults.keys()
        # All that can be a key of `data`, but for the names that **extra takes.
        self._names = frozenset(self.parameters) - {self._extra}
        reader = AnnotationReader(job_name)
        self._shapes = self._read_annotations(function, reader)
        self._extra_shape = _ANY if self._extra is None else self._shapes.pop(self._extra)
        self._converting = [(name, shape) for name, shape in self._shapes.items() if not isinstance(shape, Plain)]
        self._is_plain = all(type(shape) is Plain for shape in (*self._shapes.values(), self._extra_shape))
        only_shape = self._shapes[self.parameters[0]] if len(self.parameters) == len(self._required) == 1 else None
        self.dataclass = reader.dataclass_of(only_shape)

    def encode(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, max_bytes: int) -> str:
        """Return the JSON text of one call.

        Raises TypeError, as the call itself would, when the arguments do not fit the signature; PayloadError, with the
        path, when a value cannot be stored, and when the text would be longer than `max_bytes` of UTF-8.
        """
        bound = self._bind(args, kwargs)
        text = _json_of_scalars(bound) if self._is_plain else None
        if text is None:
            text = self._json_of(bound)
        if len(text) > max_bytes:
            raise PayloadError(
                f"{self._job_name}: the payload is {len(text)} bytes of JSON, which max_payload_bytes limits to "
                f"{max_bytes}: store the data elsewhere and pass its id, or raise max_payload_bytes"
            )
        return text.decode()

    def encode_item(self, item: Any, *, max_bytes: int) -> str:
        """Return the JSON text of one item of `delay_many`.

        An item is a tuple of positional arguments, a dict of keyword arguments, or an instance of the job's dataclass.
        Raises as `encode` does, and TypeError for any other item.
        """
        if isinstance(item, tuple):
            return self.encode(item, {}, max_bytes=max_bytes)
        if isinstance(item, dict) and all(isinstance(name, str) for name in item):
            return self.encode((), item, max_bytes=max_bytes)
        if self.dataclass is not None and type(item) is self.dataclass:
            args, kwargs = ((item,), {}) if self._positional else ((), {self.parameters[0]: item})
            return self.encode(args, kwargs, max_bytes=max_bytes)
        instance = self.dataclass.__name__ if self.dataclass is not None else "the dataclass that is its one parameter"
        raise TypeError(
            f"a call of {self._function_name}() is a tuple of positional arguments, a dict of keyword arguments, or an "
            f"instance of {instance}; not {type(item).__name__}"
        )

    def decode(self, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) to call the function with.

        Raises PayloadMismatch, with the path, when the stored object does not fit the signature, as after a deploy that
        changed it: no object, a missing or unknown argument or field, a value that cannot be what is annotated.
        """
        try:
            arguments = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise self._mismatch(f"the stored payload is not JSON: {error}", "") from error
        if arguments is None:  # what the crate writes for a job without fields
            arguments = {}
        if type(arguments) is not dict:
            raise self._mismatch("the stored payload is not a JSON object", "")
        if self.dataclass is not None:
            arguments = {self.parameters[0]: arguments}
        if not self._required <= arguments.keys():
            missing = next(name for name in self.parameters if name in self._required and name not in arguments)
            raise self._mismatch(f"the stored payload lacks the argument {missing!r}", missing)
        if self._extra is None and not arguments.keys() <= self._names:
            unknown = min(arguments.keys() - self._names)
            raise self._mismatch(
                f"the stored payload has the argument {unknown!r}, which {self._function_name}() does not take", unknown
            )
        if self._converting or self._extra is not None:
            self._load(arguments)
        if self._positional_only or self._rest in arguments:
            return self._take_positional(arguments), arguments
        return (), arguments

    def arguments(self, text: str) -> dict[str, Any]:
        """Return what `decode` does by parameter name, in the order of the signature; what **extra takes beside it.

        Arguments that were left to their defaults are not in it. Raises as `decode` does.
        """
        args, kwargs = self.decode(text)
        return self._bind(args, kwargs)

    def as_call(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) for arguments by name. Raises TypeError for one that must be there and is not."""
        named = dict(arguments)
        missing = next((name for name in self.parameters if name in self._required and name not in named), None)
        if missing is not None:
            raise TypeError(f"{self._function_name}() lacks the argument {missing!r}")
        if self._rest in named:
            named[self._rest] = list(named[self._rest])
        return self._take_positional(named), named

    @property
    def own_parameters(self) -> tuple[str, ...]:
        """The names of the parameters but for **extra, which takes arguments under names of their own."""
        return tuple(name for name in self.parameters if name in self._names)

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults by parameter name; of *args none are the default."""
        return self._defaults if self._rest is None else {**self._defaults, self._rest: ()}

    def stored_defaults(self) -> dict[str, Any]:
        """The defaults by parameter name as they would be stored, without those that no call could pass."""
        stored = {}
        for name, value in self.defaults.items():
            with contextlib.suppress(Unfit):
                stored[name] = orjson.loads(orjson.dumps(self._shapes[name].dump(value, 1)))
        return stored

    def stored_names(self) -> dict[str, str]:
        """The keys of `data` by parameter name; where a dataclass is the payload, by the names of its fields."""
        if self.dataclass is None:
            return {name: name for name in self.own_parameters}
        shape = self._shapes[self.parameters[0]]
        return shape.json_names if isinstance(shape, Dataclass) else {}

    def _read_annotations(self, function: Callable[..., object], reader: AnnotationReader) -> dict[str, Shape]:
        global_names = getattr(inspect.unwrap(function), "__globals__", {})
        result: dict[str, Shape] = {}
        for each in self._signature.parameters.values():
            annotation = Any if each.annotation is each.empty else resolve(each.annotation, global_names)
            shape = reader.shape_of_argument(annotation, each.default, f"the parameter {each.name!r}")
            if each.kind is each.VAR_POSITIONAL:
                is_plain = isinstance(shape, Plain)
                shape = Plain(shape.expected, [ARRAY]) if is_plain else Items(f"*{shape.expected}", list, shape)
            result[each.name] = shape
        return result

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by parameter name, in the order of the signature: Signature.bind, but faster."""
        bound = dict(zip(self._positional, args, strict=False))
        count = len(args)
        if self._rest is not None and count > len(bound):
            bound[self._rest] = args[len(bound) :]
            count = len(bound)
        if kwargs:
            for name in self._by_name:
                if name in kwargs:
                    bound[name] = kwargs[name]
        # Fewer, where an argument was one too many, was given twice, or is no parameter.
        if len(bound) == count + len(kwargs) and self._required <= bound.keys():
            return bound
        return self._bind_slowly(args, kwargs)

    def _bind_slowly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """As _bind; also for **extra, and to say what is wrong."""
        try:
            bound = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{self._function_name}() {error}") from None
        extra: dict[str, Any] = bound.pop(self._extra, {}) if self._extra is not None else {}
        for name in sorted(extra):
            if name in self._names:
                raise PayloadError(
                    f"{self._job_name}: {name} is given to **{self._extra}, but is a parameter as well, and JSON has "
                    "each name only once: pass it under another one",
                    path=name,
                )
            try:
                bound[checked_text(str.__str__(name))] = extra[name]
            except Unfit as unfit:
                raise PayloadError(f"{self._job_name}: the name {name!r} of an argument {unfit.reason}") from None
        return bound

    def _json_of(self, bound: dict[str, Any]) -> bytes:
        data: dict[str, Any] = {}
        name = ""
        try:
            for name, value in bound.items():
                data[name] = self._shapes.get(name, self._extra_shape).dump(value, 1)
        except Unfit as unfit:
            path = name + unfit.path
            raise PayloadError(f"{self._job_name}: {path} {unfit.reason}", path=path) from unfit.__cause__
        return _json_object(data if self.dataclass is None else data[name])

    def _load(self, arguments: dict[str, Any]) -> None:
        name = ""
        try:
            for name, shape in self._converting:
                if name in arguments:
                    arguments[name] = shape.load(arguments[name])
            for name in arguments.keys() - self._names:
                arguments[name] = self._extra_shape.load(arguments[name])
        except Unfit as unfit:
            path = name + unfit.path
            raise self._mismatch(f"{path} {unfit.reason}", path) from unfit.__cause__
        except RecursionError as error:
            raise self._mismatch(f"{name} is nested too deeply to be read", name) from error

    def _take_positional(self, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """Take out of the arguments those that must be passed by position, with the defaults that stand before them."""
        rest = arguments.pop(self._rest, []) if self._rest is not None else []
        if type(rest) is not list:
            raise self._mismatch(f"{self._rest} is not an array in the stored payload", str(self._rest))
        leading = self._positional if rest else self._positional_only
        while not rest and leading and leading[-1] not in arguments:
            leading = leading[:-1]
        return (*(arguments.pop(name) if name in arguments else self._defaults[name] for name in leading), *rest)

    def _mismatch(self, reason: str, path: str) -> PayloadMismatch:
        return PayloadMismatch(f"{self._job_name}: {reason}", path=path)


def _signature_of(function: Callable[..., object], job_name: str) -> inspect.Signature:
    """Return the signature of a plain synchronous function, and refuse everything else."""

    def refuse(reason: str) -> NoReturn:
        raise JobDefinitionError(f"job {job_name!r} {reason}")

    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        refuse(
            "is an async function; a job is a plain one: declare it with def; "
            "for an event loop, run a child process: gevent has its own"
        )
    if inspect.isgeneratorfunction(function):
        refuse("is a generator function, and calling one runs nothing: do the work in a function without yield")
    if not inspect.isfunction(function):
        refuse(f"is of type {type(function).__name__}, not a function: declare a function that calls it")
    if function.__name__ == "<lambda>":
        refuse("is a lambda, and so has no name to be stored by: declare it with def")
    signature = inspect.signature(function)
    class_name = function.__qualname__.rpartition(".")[0]
    first = next(iter(signature.parameters), None)
    if class_name and not class_name.endswith("<locals>") and first in ("self", "cls"):
        refuse("is a method, whose object cannot be stored: make it a function outside of the class, and pass an id")
    return signature


def _json_of_scalars(data: dict[str, Any]) -> bytes | None:
    """Return the JSON of what most calls pass, or None where something has to be looked at more closely."""
    if not _SCALARS.issuperset(map(type, data.values())):
        return None
    try:
        text = orjson.dumps(data)
    except TypeError:  # a lone surrogate, too large an integer: the closer look says which
        return None
    return None if b"\\u0000" in text else text


def _json_object(data: dict[str, Any]) -> bytes:
    """Return the JSON of an object whose own keys stay in order; those further down are sorted."""
    for name, value in data.items():
        if type(value) in (list, dict):
            data[name] = orjson.Fragment(canonical_json(value))
    return orjson.dumps(data)
