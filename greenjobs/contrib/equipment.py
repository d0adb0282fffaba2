"""What `greenjobs run` finds of the frameworks here: the application, its settings, and what is around its jobs."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from greenjobs.errors import ConfigError
from greenjobs.job import registered_jobs
from greenjobs.loading import load_application, name_of_application

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


@runtime_checkable
class LendsConnections(Protocol):
    """Equipment that knows how many connections to its own databases the application lends its jobs."""

    def narrow_pools(self, jobs: int) -> list[str]:
        """What is to be said of pools that lend fewer connections than so many jobs may want at a time."""


def load(name: str | None) -> tuple[Any, list[Equipment]]:
    """The application of that name, or that the environment names; and what it has of greenjobs, once for each
    framework. Raises ConfigError, and whatever the application raises.
    """
    found = _load_django() if _is_django(name) else load_application(name)
    registered_jobs()  # for modules that are imported no earlier may be of a framework
    rooms = [sys.modules[room] for room in _ROOMS if room in sys.modules]
    told = name_of(name) or ""
    equipment = [each for room in rooms if (each := room.equipment_of(found, told)) is not None]
    return (equipment[-1].app if equipment else found), equipment


def name_of(name: str | None) -> str | None:
    """What `load` would load; None where nothing is named, and nothing of the kind found."""
    return os.environ["DJANGO_SETTINGS_MODULE"] if _is_django(name) else name_of_application(name)


def _is_django(name: str | None) -> bool:
    return name is None and "FLASK_APP" not in os.environ and bool(os.environ.get("DJANGO_SETTINGS_MODULE"))


def _load_django() -> Any:
    try:
        from greenjobs.contrib.django.loading import load_project
    except ImportError:
        raise ConfigError(
            "DJANGO_SETTINGS_MODULE is set, and Django cannot be imported; install it, or name another application "
            "with --app"
        ) from None
    return load_project()
