"""What the commands share: options that are settings, how a command begins, and how it says that something is wrong."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
import psycopg2

from greenjobs import config
from greenjobs.errors import GreenjobsError
from greenjobs.loading import load_application
from greenjobs.supervisor import EXIT_MISTAKE, LOG_FORMAT

if TYPE_CHECKING:
    from greenjobs.contrib.flask import Equipment

Command = Callable[..., Any]


def setting_options(*names: str) -> Callable[[Command], Command]:
    """The command line options for these settings; their values are checked where every other source's are."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            flag = "--" + name.replace("_", "-")
            metavar = name.split("_")[-1].upper()
            command = click.option(flag, name, metavar=metavar, help=config.OPTIONS[name].help)(command)
        return command

    return decorate


def configure(arguments: dict[str, str | None]) -> config.Settings:
    """The settings with these arguments; and logging as they say, unless somebody has set it up."""
    config.configure(**arguments)
    settings = config.current()
    if not logging.getLogger().handlers:
        logging.basicConfig(level=settings.log_level, format=LOG_FORMAT, stream=sys.stderr)
    return settings


def find_application(name: str | None) -> tuple[Any, Equipment | None]:
    """The application, and what it has of greenjobs if it is one of Flask's that uses the extension.

    Raises ConfigError when there is none, and whatever the application raises.
    """
    application = load_application(name)
    if "greenjobs.contrib.flask" not in sys.modules:  # which needs Flask
        return application, None
    from greenjobs.contrib.flask import equipment_of

    equipment = equipment_of(application, name or "")
    return (application, None) if equipment is None else (equipment.app, equipment)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that a person can mend are one line, not a traceback; the exit status is 2."""
    try:
        yield
    except GreenjobsError as error:
        click.echo(f"greenjobs: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except psycopg2.Error as error:
        click.echo(f"greenjobs: the database says: {str(error).strip()}", err=True)
        sys.exit(EXIT_MISTAKE)
