"""Whether a job that has ended is kept, for how long, and what it returned.

Results are stored as arguments are: as JSON, by the annotation of what the function returns, where it has one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import orjson

from greenjobs import overrides
from greenjobs.durations import DURATION_FORMS, duration
from greenjobs.errors import JobDefinitionError, OptionError, PayloadMismatch
from greenjobs.shapes.annotations import AnnotationReader, resolve
from greenjobs.shapes.plain import Unfit
from greenjobs.shapes.shape import Shape

#: What stands for no result, as None is one.
NO_RESULT = object()


def checked_keep(job_name: str, keep: object, error: type[JobDefinitionError | OptionError]) -> float:
    """For how many seconds a job is kept, 0 for not at all; raises `error` for what is no age."""
    try:
        return duration(keep)
    except (ValueError, OverflowError):
        raise error(f"{job_name}: keep is {keep!r}; allowed: {DURATION_FORMS}; 0 keeps nothing") from None


def keep_seconds(declared: float, options: str | None) -> float:
    """For how long a job is kept whose row has these options: as they say, or as its `@job` does."""
    if options is None:
        return declared
    try:
        return duration(overrides.read(options).get("keep", declared))
    except (ValueError, OverflowError):  # somebody else's SQL
        return declared


class ResultCodec:
    """Writes what one job returns as JSON, and reads it again.

    Raises JobDefinitionError for a return annotation whose values could not come back as such.
    """

    __slots__ = ("_has_complained", "_job_name", "_shape")

    def __init__(self, function: Callable[..., object], *, job_name: str) -> None:
        self._job_name = job_name
        self._has_complained = False
        self._shape: Shape = _shape_of_result(function, job_name)

    def encode(self, value: Any, *, max_bytes: int) -> tuple[str | None, str | None]:
        """The JSON text of a result, and None; or None, and why it has none, which is said once."""
        try:
            text = orjson.dumps(self._shape.dump(value, 0))
        except Unfit as unfit:
            where = f"at {unfit.path} " if unfit.path else ""
            return None, self._complaint(f"returned a {type(value).__name__}, which {where}{unfit.reason}")
        except Exception as error:  # a value may do anything while it is looked at
            return None, self._complaint(
                f"returned a {type(value).__name__}, which could not be read ({type(error).__name__})"
            )
        if len(text) > max_bytes:
            return None, self._complaint(
                f"returned a {type(value).__name__} that is {len(text)} bytes of JSON, "
                f"which max_payload_bytes limits to {max_bytes}"
            )
        return text.decode(), None

    def decode(self, text: str) -> Any:
        """The result; raises PayloadMismatch when the stored one cannot be what is annotated by now."""
        try:
            return self._shape.load(orjson.loads(text))
        except Unfit as unfit:
            raise PayloadMismatch(
                f"{self._job_name}: the result {unfit.path}{' ' if unfit.path else ''}{unfit.reason}", path=unfit.path
            ) from unfit.__cause__

    def _complaint(self, reason: str) -> str | None:
        if self._has_complained:
            return None
        self._has_complained = True
        return reason


#: The codecs of the jobs of this process that keep their results, by every name that they have.
_codecs: dict[str, ResultCodec] = {}


def register(names: Iterable[str], codec: ResultCodec | None) -> None:
    """Read the results of jobs of these names so; None: as plain JSON."""
    for name in names:
        if codec is None:
            _codecs.pop(name, None)
        else:
            _codecs[name] = codec


def read_result(job_type: str, text: str) -> Any:
    """A result as the job that it is of says, if it is declared in this process, else as plain JSON."""
    codec = _codecs.get(job_type)
    return orjson.loads(text) if codec is None else codec.decode(text)


def _shape_of_result(function: Callable[..., object], job_name: str) -> Shape:
    annotation = inspect.signature(function).return_annotation
    if annotation is inspect.Signature.empty:
        annotation = Any
    resolved = resolve(annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    return AnnotationReader(job_name).shape_of(resolved, "what it returns, and keep_result keeps,")
