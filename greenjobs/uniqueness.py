"""What a job declares about being unique: which of its calls are the same, for how long, and what becomes of a second.

Decides, and makes keys; looks at no database. Which calls are the same is told from their payloads, so that a call, an
item of a bulk and the tick of a schedule with the same arguments are always the same.
"""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import orjson

from greenjobs.errors import JobDefinitionError, OptionError, PayloadError, PayloadMismatch, UniquenessError
from greenjobs.payload import Codec

Until = Literal["started", "finished"] | float | timedelta
OnConflict = Literal["keep", "replace", "extend", "merge"]
MakeKey = str | Callable[..., str | None]
Merge = Callable[[dict[str, Any], dict[str, Any]], Mapping[str, Any]]

LONGEST_WINDOW_SECONDS = 100 * 365 * 24 * 60 * 60.0

_ON_CONFLICT = ("keep", "replace", "extend", "merge")

_NEEDS_UNIQUE = "give unique=True, unique=(…names of parameters…) or unique_key=… as well"

_DeclarationError = type[JobDefinitionError] | type[OptionError]


@dataclass(frozen=True, slots=True)
class Uniqueness:
    """The rule of a job, or of one call of it.

    `identity` makes of the payload a JSON text that is the same for calls that are the same, or None for one that is
    not unique; it raises UniquenessError. `merge` makes one payload of that of the waiting job and that of the new one,
    of at most so many bytes; it raises UniquenessError and PayloadError.
    """

    identity: Callable[[str], str | None]
    until_finished: bool = False
    window_seconds: float | None = None
    on_conflict: OnConflict = "keep"
    merge: Callable[[str, str, int], str] | None = None

    def merger(self, max_bytes: int) -> Callable[[str, str], str] | None:
        """`merge` with this limit."""
        merge = self.merge
        return None if merge is None else lambda waiting, new: merge(waiting, new, max_bytes)


@dataclass(frozen=True, slots=True)
class UniqueSettings:
    """The settings of @job as they were given; None is what was not said."""

    unique: bool | Sequence[str] | None = None
    unique_key: MakeKey | None = None
    until: Until | None = None
    on_conflict: OnConflict | None = None
    merge: Merge | None = None

    def overridden(self, call: UniqueSettings) -> UniqueSettings:
        """These, but for what a call says otherwise."""
        which = self if call.unique is None and call.unique_key is None else call
        if which.unique is False and which.unique_key is None:
            return replace(call, unique=False)
        on_conflict = self.on_conflict if call.on_conflict is None else call.on_conflict
        return UniqueSettings(
            unique=which.unique,
            unique_key=which.unique_key,
            until=self.until if call.until is None else call.until,
            on_conflict=on_conflict,
            merge=self.merge if on_conflict == "merge" else None,
        )

    def rule(self, job_name: str, codec: Codec, error: _DeclarationError = JobDefinitionError) -> Uniqueness | None:
        """The rule that they come to, None for a job that is not unique; raises `error`, which names the job."""
        identity = self._identity(job_name, codec, error)
        until_finished, window_seconds = _checked_until(job_name, self.until, error)
        on_conflict = "keep" if self.on_conflict is None else self.on_conflict
        if not isinstance(on_conflict, str) or on_conflict not in _ON_CONFLICT:
            raise error(f"{job_name}: on_conflict is {on_conflict!r}; allowed: {', '.join(map(repr, _ON_CONFLICT))}")
        merge = None if self.merge is None else _checked_merge(job_name, self.merge, codec, error)
        if (merge is None) != (on_conflict != "merge"):
            raise error(f"{job_name}: on_conflict='merge' and merge=… at @job go together: give both, or neither")
        if identity is None:
            for name in ("until", "on_conflict", "merge"):
                if getattr(self, name) is not None:
                    raise error(f"{job_name}: {name} is for unique jobs, and this is none; {_NEEDS_UNIQUE}")
            return None
        return Uniqueness(identity, until_finished, window_seconds, on_conflict, merge)

    def _identity(self, job_name: str, codec: Codec, error: _DeclarationError) -> Callable[[str], str | None] | None:
        unique = self.unique
        if isinstance(unique, bool) or (unique is None and self.unique_key is not None):
            names: tuple[str, ...] = ()
        else:
            names = _checked_names(job_name, unique, codec, error)
        if self.unique_key is not None:
            if unique:
                raise error(f"{job_name}: give unique or unique_key, not both")
            return _identity_by_key(job_name, _checked_key(job_name, self.unique_key, codec, error), codec)
        if not unique:
            return None
        if unique is True or (codec.dataclass is not None and names == codec.parameters):
            return str
        return _identity_by_names(job_name, names, codec)


# --- which calls are the same -----------------------------------------------------------------------------------------


def _identity_by_names(job_name: str, names: Sequence[str], codec: Codec) -> Callable[[str], str]:
    """By some of the arguments; one that was left to its default is the same as one that was given that value."""
    stored_names = codec.stored_names()
    keys = [stored_names[name] for name in names]
    defaults = codec.stored_defaults()
    defaults = {key: defaults[key] for key in keys if key in defaults}

    def identity(data: str) -> str:
        arguments = orjson.loads(data)
        if not isinstance(arguments, dict):
            raise UniquenessError(f"{job_name}: the payload is no JSON object, so that its unique key cannot be told")
        arguments = {**defaults, **arguments}
        return orjson.dumps({key: arguments[key] for key in keys if key in arguments}).decode()

    return identity


def _identity_by_key(job_name: str, make: Callable[[dict[str, Any]], Any], codec: Codec) -> Callable[[str], str | None]:
    """By a key made of all arguments, as the function gets them, those that were left to their defaults included."""

    def identity(data: str) -> str | None:
        try:
            key = make({**codec.defaults, **codec.arguments(data)})
        except PayloadMismatch as error:
            raise UniquenessError(f"no unique key can be made: {error}") from error
        except Exception as error:
            raise UniquenessError(f"{job_name}: unique_key failed: {type(error).__name__}: {error}") from error
        if key is None:
            return None
        if not isinstance(key, str) or not key:
            raise UniquenessError(
                f"{job_name}: unique_key returned {key!r}; allowed: a text that is not empty, or None for a call that "
                f"is not unique"
            )
        return orjson.dumps(key.encode("utf-8", "backslashreplace").decode()).decode()

    return identity


def _checked_names(job_name: str, given: Any, codec: Codec, error: _DeclarationError) -> tuple[str, ...]:
    if isinstance(given, (list, tuple)) and given and all(isinstance(name, str) for name in given):
        known = codec.stored_names()
        allowed = list(known) if codec.dataclass is None else [*codec.parameters, *known]
        unknown = next((name for name in given if name not in allowed), None)
        if unknown is not None:
            raise error(f"{job_name}: unique names {unknown!r}, which is no parameter; there are {_listed(allowed)}")
        names = tuple(dict.fromkeys(given))
        if codec.dataclass is not None and codec.parameters[0] in names and len(names) > 1:
            raise error(f"{job_name}: unique is {given!r}; name {codec.parameters[0]!r}, or fields of it, not both")
        return names
    raise error(f"{job_name}: unique is {given!r}; allowed: True, False, or a tuple of names of parameters")


def _checked_key(job_name: str, given: Any, codec: Codec, error: _DeclarationError) -> Callable[[dict[str, Any]], Any]:
    if isinstance(given, str):
        return _checked_format(job_name, given, codec, error)
    if not callable(given):
        raise error(f"{job_name}: unique_key is {given!r}; allowed: a function, or a text such as 'report-{{number}}'")
    # Any value will do to see whether the function takes what the job takes.
    args, kwargs = codec.as_call(dict.fromkeys(codec.own_parameters, ()))
    problem = _cannot_be_called(given, args, kwargs)
    if problem is not None:
        raise error(f"{job_name}: unique_key is called with the arguments of the job by name, but {problem}")

    def make(arguments: dict[str, Any]) -> Any:
        args, kwargs = codec.as_call(arguments)
        return given(*args, **kwargs)

    return make


def _checked_format(
    job_name: str, template: str, codec: Codec, error: _DeclarationError
) -> Callable[[dict[str, Any]], Any]:
    allowed = codec.own_parameters
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as problem:
        raise error(f"{job_name}: unique_key is {template!r}, which is no format string: {problem}") from None
    if not template:
        raise error(f"{job_name}: unique_key is ''; allowed: a function, or a text such as 'report-{{number}}'")
    for field in fields:
        name = field.partition(".")[0].partition("[")[0]
        if name not in allowed:
            raise error(
                f"{job_name}: unique_key is {template!r}, where {name!r} is no parameter; there are {_listed(allowed)}"
            )
    return lambda arguments: template.format_map(arguments)


# --- for how long -----------------------------------------------------------------------------------------------------


def _checked_until(job_name: str, until: Any, error: _DeclarationError) -> tuple[bool, float | None]:
    """Whether it is until the job is finished, and the seconds of a window."""
    if until is None or until == "started":
        return False, None
    if until == "finished":
        return True, None
    seconds = until.total_seconds() if isinstance(until, timedelta) else until
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise error(
            f"{job_name}: until is {until!r}; allowed: 'started', 'finished', a number of seconds, or a timedelta"
        )
    if not 0 < seconds <= LONGEST_WINDOW_SECONDS:
        raise error(f"{job_name}: until is {until!r}; allowed: more than 0, up to {LONGEST_WINDOW_SECONDS:.0f} seconds")
    return False, float(seconds)


# --- what becomes of a second one -------------------------------------------------------------------------------------


def _checked_merge(job_name: str, given: Any, codec: Codec, error: _DeclarationError) -> Callable[[str, str, int], str]:
    problem = _cannot_be_called(given, ({}, {}), {}) if callable(given) else "is no function"
    if problem is not None:
        raise error(f"{job_name}: merge is {given!r}; allowed: a function of two dicts, but {problem}")

    def merge(waiting: str, new: str, max_bytes: int) -> str:
        try:
            merged = given(codec.arguments(waiting), codec.arguments(new))
        except PayloadMismatch as mismatch:
            raise UniquenessError(f"the payloads cannot be merged: {mismatch}") from mismatch
        except Exception as failure:
            raise UniquenessError(f"{job_name}: merge failed: {type(failure).__name__}: {failure}") from failure
        if not isinstance(merged, Mapping) or not all(isinstance(name, str) for name in merged):
            raise UniquenessError(f"{job_name}: merge returned {merged!r}; allowed: a dict of arguments by name")
        try:
            args, kwargs = codec.as_call(merged)
            return codec.encode(args, kwargs, max_bytes=max_bytes)
        except PayloadError as refusal:
            raise PayloadError(f"merge of {refusal}", path=refusal.path) from refusal
        except (TypeError, PayloadMismatch) as misfit:
            raise UniquenessError(f"{job_name}: merge returned arguments that do not fit: {misfit}") from misfit

    return merge


def _cannot_be_called(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why a function cannot be called so; None when it can, as far as is known."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # such as some of those that are written in C
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as problem:
        return f"it cannot be: {problem}"
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
