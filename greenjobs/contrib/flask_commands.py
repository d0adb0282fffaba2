"""`flask greenjobs …`: the commands of greenjobs, with the settings of the application."""

from __future__ import annotations

import os
from pathlib import Path

import click
from flask.cli import ScriptInfo

from greenjobs import loading
from greenjobs.contrib import commands


class _Commands(click.Group):
    """Those of the command line of greenjobs, looked up when one is typed."""

    def list_commands(self, context: click.Context) -> list[str]:
        return commands.main().list_commands(context)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        command = commands.main().get_command(context, name)
        return command if name not in commands.ELSEWHERE or command is None else _run_elsewhere(name, command)


group = _Commands("greenjobs", help="Background jobs: run them, look at them, bring their tables up to date.")


def _run_elsewhere(name: str, command: click.Command) -> click.Command:
    @click.pass_context
    def run(context: click.Context) -> None:
        arguments = list(context.args)
        if not any(word == "--app" or word.startswith("--app=") for word in arguments):
            arguments = ["--app", _application_name(context), *arguments]
        commands.run_elsewhere(name, arguments)

    return click.Command(
        name,
        callback=run,
        short_help=command.get_short_help_str(),
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )


def _application_name(context: click.Context) -> str:
    """What `flask --app` or FLASK_APP says, or the file that it finds without them."""
    info = context.find_object(ScriptInfo)
    name = info.app_import_path if info is not None else None
    name = name or os.environ.get("FLASK_APP")
    if name:
        return name
    if info is not None and info.create_app is not None:
        raise click.UsageError(
            "this command was given its application as an object, and jobs need a fresh interpreter that can "
            "import it; name it, as in --app 'myapp:create_app()', or type `greenjobs run --app …`"
        )
    return next((file for file in loading.DEFAULT_FILES if Path(file).is_file()), "app.py")
