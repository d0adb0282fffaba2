"""`manage.py greenjobs …`: the commands of greenjobs, with the settings of the project."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from django.core.management.base import BaseCommand, CommandError, handle_default_options
from django.db import connections

from greenjobs.contrib import commands


class Command(BaseCommand):  # type: ignore[misc]  # without stubs Django's classes are of any type
    """All words after the name of the command are for greenjobs, but for Django's options that find the project."""

    help = "Background jobs: run them, look at them, bring their tables up to date."
    requires_system_checks: Sequence[str] = ()

    def add_arguments(self, parser: Any) -> None:
        """For call_command, and for the list of commands; the command line goes its own way."""
        parser.add_argument("words", nargs=argparse.REMAINDER, help="what follows `greenjobs` on its command line")

    def run_from_argv(self, argv: list[str]) -> None:
        """As typed: errors are told as greenjobs tells them."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--settings")
        parser.add_argument("--pythonpath")
        given, words = parser.parse_known_args(argv[2:])
        handle_default_options(given)
        if words and words[0] in commands.ELSEWHERE:
            _run(words, folders=[given.pythonpath, _folder_of(argv[0])])
        try:
            commands.main().main(words, prog_name=f"{os.path.basename(argv[0])} {argv[1]}")
        finally:
            connections.close_all()

    def handle(self, *args: Any, words: Sequence[str] = (), **options: Any) -> None:
        """As called by call_command: errors are a CommandError."""
        words = [*map(str, args), *words]
        if words and words[0] in commands.ELSEWHERE:
            raise CommandError(
                f"`greenjobs {words[0]}` needs a process of its own; type it, or start it as a subprocess"
            )
        try:
            commands.main().main(words, prog_name="greenjobs", standalone_mode=False)
        except click.ClickException as error:
            raise CommandError(error.format_message()) from None
        except SystemExit as exit:
            if exit.code:
                status = exit.code if isinstance(exit.code, int) else 1
                raise CommandError(f"greenjobs {' '.join(words[:1])} ended with {status}", returncode=status) from None


def _run(words: list[str], *, folders: Sequence[str | None]) -> None:
    """Become a command of this project, which finds it as this process did, wherever the command was typed."""
    known = os.environ.get("PYTHONPATH")
    path = [folder for folder in folders if folder] + ([known] if known else [])
    if path:
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
    # What the environment of a shell may name, and this is not about.
    os.environ.pop("FLASK_APP", None)
    commands.run_elsewhere(words[0], words[1:])


def _folder_of(script: str) -> str | None:
    """The folder of manage.py, from which Python imports; None for django-admin and for `python -m django`."""
    path = Path(script)
    return str(path.resolve().parent) if path.name.endswith(".py") and path.parent != Path(sys.prefix) else None
