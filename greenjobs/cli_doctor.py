"""`greenjobs doctor`, and what `greenjobs run` says of itself when it starts."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import click
import gevent

from greenjobs import config
from greenjobs.cli_options import configure, plain_errors, setting_options
from greenjobs.config import Settings
from greenjobs.contrib.equipment import LendsConnections, load, name_of
from greenjobs.doctor import Application, Finding, at_start, examine
from greenjobs.errors import GreenjobsError
from greenjobs.job import registered_jobs
from greenjobs.redaction import redact
from greenjobs.runner import RunnerHandle

logger = logging.getLogger(__name__)

EXIT_FOUND = 1

# An application that waits for something before it is imported gives no sign of it.
_LOAD_SECONDS = 60.0

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": None}
_LEVEL_WIDTH = max(map(len, _COLOURS))


@click.command("doctor")
@setting_options("app", "database_url", "session_url", "session", "pool", "share", "processes")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--only", multiple=True, metavar="CHECK", help="Make this check, and what it needs; again for more.")
@click.option("--strict", is_flag=True, help="Exit with 1 also when there is nothing worse than warnings.")
def doctor_command(as_json: bool, only: tuple[str, ...], strict: bool, **arguments: str | None) -> None:
    """Look whether all that jobs need is there and works, and say what to do where it is not.

    Give it the options, the environment and the folder that runners get. It changes nothing. The exit status is 1 when
    something fails, and 0 when nothing does, warnings or not.
    """
    with plain_errors():
        settings = configure(arguments)
        application, settings = _application(settings)
        findings = examine(settings, application, only=only)
        levels = _print_json(findings) if as_json else _print(findings)
    if "fail" in levels or (strict and "warn" in levels):
        sys.exit(EXIT_FOUND)


def warn_at_start(settings: Settings, handle: RunnerHandle) -> None:
    """Log what a look at this process finds, without asking the database anything."""
    for finding in at_start(settings, Application(jobs_at_a_time=handle.slots)):
        logger.warning("%s: %s; %s", finding.name, finding.message, finding.remedy)


def _application(settings: Settings) -> tuple[Application, Settings]:
    """What there is of an application, and the settings with what it says itself."""
    name = name_of(settings.app)
    if name is None:
        return Application(), settings
    deadline = gevent.Timeout.start_new(_LOAD_SECONDS)
    try:
        # What it prints when it is imported is no part of what the doctor says.
        with contextlib.redirect_stdout(sys.stderr):
            _, equipment = load(settings.app)
        for each in equipment:
            each.adopt()
        pools = next((each.narrow_pools for each in equipment if isinstance(each, LendsConnections)), None)
        return Application(name, registered_jobs(), narrow_pools=pools), config.current()
    except gevent.Timeout as raised:
        if raised is not deadline:
            raise
        return Application(name, error=f"{name} was not imported within {_LOAD_SECONDS:g} s"), settings
    except GreenjobsError as error:
        return Application(name, error=str(error)), settings
    except (Exception, SystemExit) as error:
        return Application(name, error=_told(error)), settings
    finally:
        deadline.close()


def _told(error: BaseException) -> str:
    """An error of the application's in one line, without passwords of URLs that it quotes."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {redact(lines[0])}{where}"


def _print_json(findings: Iterator[Finding]) -> set[str]:
    found = list(findings)
    click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    return {finding.level for finding in found}


def _print(findings: Iterable[Finding]) -> set[str]:
    """A line for each as soon as it is there, what to do below it, and how many there were of each level."""
    counts = dict.fromkeys(_COLOURS, 0)
    area = ""
    for finding in findings:
        if finding.area != area:
            click.echo(f"\n{finding.area}" if area else finding.area)
            area = finding.area
        counts[finding.level] += 1
        # click leaves colours out where the output is no terminal.
        level = click.style(finding.level.ljust(_LEVEL_WIDTH), fg=_COLOURS[finding.level])
        # libpq says it in several lines.
        message = " ".join(line.strip() for line in finding.message.splitlines())
        click.echo(f"  {level}  {finding.name}: {message}")
        if finding.remedy:
            click.echo(f"  {' ' * _LEVEL_WIDTH}  -> {finding.remedy}")
    click.echo(f"\n{', '.join(f'{count} {level}' for level, count in counts.items())}")
    return {level for level, count in counts.items() if count}
