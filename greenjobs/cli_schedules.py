"""`greenjobs schedules`: list the schedules with their next and last runs; pause, resume and remove them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from greenjobs import schedules
from greenjobs.cli_options import migrated_database, on_one_line, setting_options
from greenjobs.cron import zone_named
from greenjobs.inspection import Schedule


@click.group("schedules", invoke_without_command=True)
@setting_options("database_url")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def schedules_group(context: click.Context, /, as_json: bool, database_url: str | None) -> None:
    """List what is enqueued by the clock, with its next and last runs; or pause, resume or remove it."""
    if context.invoked_subcommand is None:
        _list(as_json, database_url)
    else:
        context.obj = database_url


@schedules_group.command("list")
@setting_options("database_url")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def list_command(context: click.Context, /, as_json: bool, database_url: str | None) -> None:
    """List the schedules: what they enqueue, when they run next, and when they ran last."""
    assert context.parent is not None  # the group
    before = context.parent.params
    _list(as_json or before["as_json"], database_url or before["database_url"])


def _list(as_json: bool, database_url: str | None) -> None:
    with migrated_database(database_url):
        found = schedules.find()
    if as_json:
        click.echo(json.dumps([asdict(schedule) for schedule in found], default=_as_json, indent=2))
    elif not found:
        click.echo("no schedules")
    else:
        _print_table(found)


def _command(name: str, function: Callable[[str], None], done: str, help: str) -> None:
    @schedules_group.command(name, help=help)
    @click.argument("schedule", metavar="NAME")
    @setting_options("database_url")
    @click.pass_obj
    def command(given_before: str | None, /, schedule: str, database_url: str | None) -> None:
        with migrated_database(database_url or given_before):
            function(schedule)
            click.echo(f"{done} {schedule}")


_command("pause", schedules.pause, "paused", "Enqueue nothing for this schedule until it is resumed.")
_command("resume", schedules.resume, "resumed", "Let a paused schedule go on with its next tick.")
_command("remove", schedules.remove, "removed", "Remove a schedule that no live runner declares.")


def _print_table(found: Sequence[Schedule]) -> None:
    rows: list[tuple[str, ...]] = [("schedule", "job", "cron", "time zone", "next run", "last run", "from", "")]
    for schedule in found:
        rows.append(
            (
                *map(on_one_line, (schedule.name, schedule.job_type, schedule.cron, schedule.timezone)),
                "paused" if schedule.paused else _moment(schedule.next_tick_at, schedule.timezone),
                _last_run(schedule),
                schedule.source,
                "" if schedule.is_known else "no live runner knows the job",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _last_run(schedule: Schedule) -> str:
    if schedule.last_tick_at is None:
        return "never"
    state = "" if schedule.last_job_state is None else f" ({schedule.last_job_state})"
    return f"{_moment(schedule.last_tick_at, schedule.timezone)}{state}"


def _moment(at: datetime, zone: str) -> str:
    """As the schedule's own clock shows it, where its zone is known here."""
    with contextlib.suppress(ValueError):
        at = at.astimezone(zone_named(zone))
    return at.isoformat(" ", "seconds")


def _as_json(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
