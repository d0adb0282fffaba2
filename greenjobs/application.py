"""The application whose jobs are run: loaded, and with what it has of greenjobs if it is one of Flask's."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from greenjobs.loading import load_application

if TYPE_CHECKING:
    from greenjobs.contrib.flask import Equipment


def load(name: str | None) -> tuple[Any, Equipment | None]:
    """The application of this name, or that Flask would find, and its equipment if it uses the extension.

    Raises ConfigError, and whatever the application raises while it is imported.
    """
    application = load_application(name)
    if "greenjobs.contrib.flask" not in sys.modules:  # which needs Flask
        return application, None
    from greenjobs.contrib.flask import equipment_of

    equipment = equipment_of(application, name or "")
    return (application, None) if equipment is None else (equipment.app, equipment)
