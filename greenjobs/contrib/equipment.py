"""What `greenjobs run` finds of the frameworks here: the application, its settings, and what is around its jobs."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Protocol

from greenjobs.errors import ConfigError
from greenjobs.loading import load_application

if TYPE_CHECKING:
    from greenjobs.runner import Runner, RunnerHandle

# From the outside inwards, as around a job. Looked at where they are loaded, for they need the frameworks.
_ROOMS = ("greenjobs.contrib.django.equipment", "greenjobs.contrib.wsgi", "greenjobs.contrib.flask")


class Equipment(Protocol):
    """What an application has of greenjobs."""

    app: Any

    def adopt(self) -> None:
        """Let its settings be those of the process."""

    def equip(self, runner: Runner) -> None:
        """Let the jobs of this runner run in its surroundings."""

    def check(self, handle: RunnerHandle) -> None:
        """Warn of what does not fit."""


def load(name: str | None) -> tuple[Any, list[Equipment]]:
    """The application of that name, or that the environment names; and what it has of greenjobs, once for each
    framework. Raises ConfigError, and whatever the application raises.
    """
    if name is None and "FLASK_APP" not in os.environ and os.environ.get("DJANGO_SETTINGS_MODULE"):
        found = _load_django()
    else:
        found = load_application(name)
    rooms = [sys.modules[room] for room in _ROOMS if room in sys.modules]
    equipment = [each for room in rooms if (each := room.equipment_of(found, name or "")) is not None]
    return (equipment[-1].app if equipment else found), equipment


def _load_django() -> Any:
    try:
        from greenjobs.contrib.django.loading import load_project
    except ImportError:
        raise ConfigError(
            "DJANGO_SETTINGS_MODULE is set, and Django cannot be imported; install it, or name another application "
            "with --app"
        ) from None
    return load_project()
