"""Libraries that greenjobs goes along with by itself, as soon as somebody has loaded them: Sentry's.

None is ever loaded from here, and none is needed: where it is not loaded, a look costs one look into a dictionary. The
room of greenjobs.contrib that knows the library decides the rest, such as whether it has been set up.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

_ROOMS = {"sentry_sdk": "greenjobs.contrib.sentry"}
"""By name, the one place where anything knows of what is above it: who enqueues has imported nothing of contrib."""

_met: dict[str, Any] = {}


def meet(*, runs_jobs: bool = False) -> None:
    """Let those that are loaded by now turn themselves on. With `runs_jobs` a runner is about to start.

    Called before every enqueue and every start of a runner, for an application may set such a library up at any time.
    """
    for library, name in _ROOMS.items():
        if library in sys.modules:
            room = _met[library] if library in _met else _room(library, name)
            if room is not None:
                room.turn_on(runs_jobs=runs_jobs)


def _room(library: str, name: str) -> Any:
    try:
        _met[library] = importlib.import_module(name)
    except Exception:  # of a version that is too old, or still being imported
        _met[library] = None
        logger.warning("%s is loaded, but greenjobs cannot go along with it", library, exc_info=True)
    return _met[library]
