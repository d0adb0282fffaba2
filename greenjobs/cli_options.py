"""What the commands share: options that are settings, how a command begins, and how it says that something is wrong."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import click
import psycopg2

from greenjobs import config, grants, logs, migrate, pool, refusals
from greenjobs.errors import GreenjobsError
from greenjobs.supervisor import EXIT_MISTAKE

logger = logging.getLogger(__name__)

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


def configure(arguments: dict[str, str | None], *, loads_application: bool = False) -> config.Settings:
    """The settings with these arguments; and logging as they say, unless somebody has set it up, or, with
    `loads_application`, is about to."""
    config.configure(**arguments)
    settings = config.current()
    logs.set_up(settings, loads_application=loads_application)
    return settings


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that a person can mend are one line, not a traceback; the exit status is 2."""
    try:
        yield
    except GreenjobsError as error:
        _complain(str(error))
    except psycopg2.errors.InsufficientPrivilege as error:
        _complain(str(refusals.denied(error)))
    except psycopg2.Error as error:
        _complain(f"the database says: {str(error).strip()}")


@contextlib.contextmanager
def migrated_database(database_url: str | None) -> Iterator[None]:
    """Makes it the one that is meant, if it has been migrated; errors are plain ones."""
    with plain_errors():
        with pool.shared_pool(configure({"database_url": database_url})).connection() as connection:
            migrate.require_current(connection)
        yield


def _complain(message: str) -> NoReturn:
    message = on_one_line(message)  # what libpq says may have several
    if logs.writes_json():  # whoever reads the lines is to hear of this one, too
        logger.error("%s", message)
    else:
        click.echo(f"greenjobs: {message}", err=True)
    sys.exit(EXIT_MISTAKE)


def on_one_line(text: str) -> str:
    """Text from the table, or of others, on one line of a terminal."""
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """Text from the table, without the characters by which it could steer a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)


def show(text: str) -> None:
    """Print a text that somebody asked for to standard error: where lines are JSON, as one of them."""
    if logs.writes_json():
        logger.info("%s", text)
    else:
        click.echo(text, err=True)


def apply_migrations(url: str, wanted: Sequence[grants.Grant] = ()) -> list[str]:
    """Bring the tables up to date, give these rights, and print what was applied; returns that."""
    applied = migrate.migrate(url, grants=wanted)
    for label in applied:
        click.echo(f"applied {label}")
    return applied
