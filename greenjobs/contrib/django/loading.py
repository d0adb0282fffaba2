"""How `greenjobs run` finds a Django project: as Django does, by DJANGO_SETTINGS_MODULE."""

from __future__ import annotations

import os
import sys

import django
from django.apps import apps

from greenjobs.errors import ConfigError
from greenjobs.job import registered_jobs


def load_project() -> None:
    """Set Django up, and with it the jobs of all apps. Raises ConfigError, and whatever the project raises."""
    set_up()
    if not registered_jobs():
        raise ConfigError(
            f"no app in INSTALLED_APPS of {os.environ['DJANGO_SETTINGS_MODULE']} declares jobs; they are looked for in "
            f"their jobs.py"
        )


def set_up() -> None:
    """Set Django up, unless it is. Raises ConfigError where it cannot be found, and where our app is not one of its."""
    settings = os.environ["DJANGO_SETTINGS_MODULE"]
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        django.setup()
    except ModuleNotFoundError as error:
        if error.name is None or not f"{settings}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"DJANGO_SETTINGS_MODULE is {settings!r}, but there is no module {error.name!r} in {folder} or on the "
            f"Python path; type the command where manage.py is, or `python manage.py greenjobs run`"
        ) from None
    if not apps.is_installed("greenjobs.contrib.django"):
        raise ConfigError(f'"greenjobs.contrib.django" is not in INSTALLED_APPS of {settings}; add it there')
