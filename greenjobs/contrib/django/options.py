"""GREENJOBS in the settings of a Django project, checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings

from greenjobs import config
from greenjobs.errors import ConfigError
from greenjobs.loading import EARLY_OPTIONS

TRANSACTION = ("join", "on_commit")

_OWN_KEYS = ("DATABASE", "TRANSACTION", "MIGRATE", "JOBS_MODULE")


@dataclass(frozen=True, slots=True)
class Options:
    """What is Django's of it; and `arguments`, the settings of greenjobs.

    `database` is the alias of the database that has the jobs; `transaction` what `.delay()` does inside of a
    transaction; `migrates` whether `manage.py migrate` brings our tables up to date; `jobs_module` the name of the
    modules in which apps have their jobs.
    """

    database: str
    transaction: str
    migrates: bool
    jobs_module: str
    arguments: Mapping[str, Any]


def read() -> Options:
    """Those of the settings as they are now. Raises ConfigError."""
    given = getattr(settings, "GREENJOBS", {})
    if not isinstance(given, Mapping):
        raise ConfigError(f"GREENJOBS is {given!r} (Django's settings); the value must be a dict")
    own = {key: value for key, value in given.items() if key in _OWN_KEYS}
    return Options(
        database=_one_of("DATABASE", own.get("DATABASE", "default"), tuple(settings.DATABASES) or ("default",)),
        transaction=_one_of("TRANSACTION", own.get("TRANSACTION", "join"), TRANSACTION),
        migrates=_one_of("MIGRATE", own.get("MIGRATE", True), (True, False)),
        jobs_module=_name(own.get("JOBS_MODULE", "jobs")),
        arguments=_arguments({key: value for key, value in given.items() if key not in _OWN_KEYS}),
    )


def _arguments(given: Mapping[Any, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        name = key.lower() if isinstance(key, str) else ""
        if name not in config.OPTIONS or key != name.upper():
            raise ConfigError(f"GREENJOBS has the key {key!r}, which is no option{_near(key)}")
        if name in EARLY_OPTIONS:
            raise ConfigError(
                f"GREENJOBS has the key {key!r}, which counts before the project is loaded; set it in the environment "
                f"(GREENJOBS_{key}), in setup.cfg or pyproject.toml, or on the command line"
            )
        arguments |= config.check({name: value}, f"{key!r} in GREENJOBS")
    return arguments


def _near(key: object) -> str:
    known = [*_OWN_KEYS, *(name.upper() for name in config.OPTIONS if name not in EARLY_OPTIONS)]
    near = difflib.get_close_matches(str(key).upper(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}."


def _one_of(key: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if not any(type(value) is type(each) and value == each for each in allowed):
        raise ConfigError(f"{key} is {value!r} (GREENJOBS); the value must be {' or '.join(map(repr, allowed))}.")
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.isidentifier():
        raise ConfigError(
            f"JOBS_MODULE is {value!r} (GREENJOBS); the value must be the name of a module, as in 'jobs'."
        )
    return value
