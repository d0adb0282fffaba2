"""What a command line asks of a supervisor, found out before anything is patched or loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from greenjobs import config
from greenjobs.errors import ConfigError

SUPERVISED = "GREENJOBS_SUPERVISED_BY"
"""The environment variable that tells a child of its supervisor: "PID:FD", the descriptor being its end of the line."""

# What concerns the supervisor itself.
_OWN_OPTIONS = ("processes", "max_jobs", "max_memory", "http", "log_level", "log_format")


@dataclass(frozen=True, slots=True)
class Order:
    """What a command line asks of a supervisor."""

    settings: config.Settings
    until_empty: bool
    reload: bool


def order_in(arguments: Sequence[str]) -> Order | None:
    """What this command line (without the program's name) asks of a supervisor; None when it needs none.

    Looks for a handful of options only, before anything is patched. The children parse the whole line and say what is
    wrong with it; where the settings are wrong, nobody is asked for, and the command itself says so.
    """
    if SUPERVISED in os.environ or list(arguments[:1]) != ["run"] or not {"-h", "--help"}.isdisjoint(arguments):
        return None
    try:
        settings = config.load(**{name: _last_value(arguments, name) for name in _OWN_OPTIONS})
    except ConfigError:
        return None
    reload = "--reload" in arguments
    if not (reload or settings.needs_supervisor):
        return None
    return Order(settings, until_empty="--until-empty" in arguments, reload=reload)


def _last_value(arguments: Sequence[str], name: str) -> str | None:
    flag, value = "--" + name.replace("_", "-"), None
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value
