"""Which jobs exclude one another: all of one type, or those of a type whose arguments give the same key."""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from greenjobs.errors import JobDefinitionError, OptionError, PayloadMismatch
from greenjobs.payload import Codec

_ROOT = re.compile(r"[^.\[]*")


class Exclusion:
    """Says for every call of a job under which key it excludes others; under "" all calls of the job do.

    `key` is a format string over the parameters, such as "customer-{customer_id}", or a function that takes the
    arguments and returns a text or an integer. Raises JobDefinitionError for what cannot be one.
    """

    __slots__ = ("_codec", "_job_name", "_key", "_signature")

    def __init__(self, key: object, function: Callable[..., Any], codec: Codec, *, job_name: str) -> None:
        if key is not None and not callable(key) and (not isinstance(key, str) or not key):
            raise JobDefinitionError(
                f"{job_name}: overlap_key is {key!r}; "
                f"allowed: a text such as 'customer-{{customer_id}}', or a function of the job's arguments"
            )
        self._job_name = job_name
        self._signature = inspect.signature(function)
        self._codec = codec
        self._key: str | Callable[..., Any] | None = key
        if isinstance(key, str):
            self._check_format(key)

    def key_of(self, data: str) -> str:
        """The key of the call with these arguments, as they are stored. Raises OptionError when there is none."""
        if self._key is None:
            return ""
        try:
            args, kwargs = self._codec.decode(data)
        except PayloadMismatch:
            return ""  # it fails before it runs; only what a schedule has kept since another release can be so
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        try:
            if isinstance(self._key, str):
                return self._key.format_map(self._named(bound.arguments))
            key = self._key(*bound.args, **bound.kwargs)
        except Exception as error:
            raise OptionError(
                f"{self._job_name}: overlap_key {self._key!r} fails for this call: {type(error).__name__}: {error}"
            ) from error
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise OptionError(
                f"{self._job_name}: overlap_key {self._key!r} answered {key!r}; allowed: a text or an integer"
            )
        return str(key)

    def _check_format(self, key: str) -> None:
        parameters = self._signature.parameters.values()
        if any(each.kind is each.VAR_KEYWORD for each in parameters):
            return
        names = [each.name for each in parameters]
        try:
            roots = [name for _, name, _, _ in string.Formatter().parse(key) if name is not None]
        except ValueError as error:
            raise JobDefinitionError(f"{self._job_name}: overlap_key is {key!r}: {error}") from None
        for root in (_ROOT.match(name)[0] for name in roots):  # type: ignore[index]  # it matches everything
            if root not in names:
                raise JobDefinitionError(
                    f"{self._job_name}: overlap_key is {key!r}, but {{{root}}} is no parameter of the job; "
                    f"allowed: {', '.join(f'{{{name}}}' for name in names) or 'none, for it has no parameters'}"
                )

    def _named(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, those that **extra takes among them."""
        extra = [each.name for each in self._signature.parameters.values() if each.kind is each.VAR_KEYWORD]
        named = dict(arguments)
        for name in extra:
            named = {**named.pop(name), **named}
        return named


def declared(
    overlap: object, key: object, function: Callable[..., Any], codec: Codec, *, job_name: str
) -> Exclusion | None:
    """What `overlap` and `overlap_key` of @job mean; None for jobs that exclude nothing. Raises JobDefinitionError."""
    if overlap is not None and not isinstance(overlap, bool):
        raise JobDefinitionError(f"{job_name}: overlap is {overlap!r}; allowed: True or False")
    if overlap is False:
        return Exclusion(key, function, codec, job_name=job_name)
    if key is not None:
        raise JobDefinitionError(f"{job_name}: overlap_key is for jobs with overlap=False")
    return None
