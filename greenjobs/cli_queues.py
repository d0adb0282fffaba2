"""`greenjobs queues`: list the queues, pause and resume them, and change their pools while runners serve them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from greenjobs import queues
from greenjobs.cli_options import migrated_database, on_one_line, setting_options
from greenjobs.errors import OptionError, UnknownQueue
from greenjobs.inspection import QueueSetting
from greenjobs.queues import Queue

_DEFAULT = "default"


@click.group("queues", invoke_without_command=True)
@setting_options("database_url")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def queues_group(context: click.Context, /, as_json: bool, database_url: str | None) -> None:
    """List the queues; or pause, resume or resize them, in all runners and at once."""
    if context.invoked_subcommand is None:
        _list(as_json, database_url)
    else:
        context.obj = database_url


@queues_group.command("list")
@setting_options("database_url")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def list_command(context: click.Context, /, as_json: bool, database_url: str | None) -> None:
    """List the queues: what waits and runs in them, who serves them, which are paused or resized."""
    assert context.parent is not None  # the group
    before = context.parent.params
    _list(as_json or before["as_json"], database_url or before["database_url"])


def _list(as_json: bool, database_url: str | None) -> None:
    with migrated_database(database_url):
        found = queues.find()
    if as_json:
        click.echo(json.dumps([asdict(queue) for queue in found], default=_as_json, indent=2))
    elif not found:
        click.echo("no queues")
    else:
        _print_table(found)


@queues_group.command("pause")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--yes", is_flag=True, help="Also a queue that has no jobs and that no live runner serves.")
@setting_options("database_url")
@click.pass_obj
def pause_command(given_before: str | None, /, names: tuple[str, ...], yes: bool, database_url: str | None) -> None:
    """Let no further job of these queues start, in no runner, until they are resumed.

    What runs goes on, and jobs can be enqueued.
    """
    with migrated_database(database_url or given_before), _hint_at_yes():
        changed = queues.pause(*names, force=yes)
    _print_changes(names, changed, "paused", "was paused already")


@queues_group.command("resume")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@setting_options("database_url")
@click.pass_obj
def resume_command(given_before: str | None, /, names: tuple[str, ...], database_url: str | None) -> None:
    """Let jobs of these queues start again, at once."""
    with migrated_database(database_url or given_before):
        changed = queues.resume(*names)
    _print_changes(names, changed, "resumed", "was not paused")


@queues_group.command("resize")
@click.argument("name", metavar="NAME")
@click.argument("size", metavar="POOL")
@click.option("--yes", is_flag=True, help="Also a queue that has no jobs and that no live runner serves.")
@setting_options("database_url")
@click.pass_obj
def resize_command(given_before: str | None, /, name: str, size: str, yes: bool, database_url: str | None) -> None:
    """Let POOL jobs of this queue run at a time in every runner; "default": what each was started with.

    More jobs start at once; where it is fewer, those that run go on.
    """
    with migrated_database(database_url or given_before), _hint_at_yes():
        pool = None if size == _DEFAULT else _number(name, size)
        changed = queues.resize(name, pool, force=yes)
    now = (
        "has the pools that its runners were started with" if pool is None else f"has a pool of {pool} in every runner"
    )
    click.echo(f"{name} {now}{'' if changed else ', as before'}")


def _number(name: str, size: str) -> int:
    try:
        return int(size)
    except ValueError:
        raise OptionError(
            f"the queue {name!r}: the pool is {size!r}; allowed: a whole number, or {_DEFAULT!r} for what each runner "
            f"was started with"
        ) from None


@contextlib.contextmanager
def _hint_at_yes() -> Iterator[None]:
    try:
        yield
    except UnknownQueue as error:
        raise UnknownQueue(f"{error}; if you mean it, say --yes") from None


# --- what is printed --------------------------------------------------------------------------------------------------


def print_changed_queues(changed: Mapping[str, QueueSetting]) -> None:
    """A line for each queue that is paused or resized."""
    for name, setting in sorted(changed.items()):
        facts = (["is paused"] if setting.paused else []) + (
            [] if setting.pool is None else [f"has a pool of {setting.pool} in every runner"]
        )
        click.echo(f"queue {on_one_line(name)} {' and '.join(facts)}")


def _print_changes(names: Iterable[str], changed: Sequence[str], done: str, otherwise: str) -> None:
    for name in dict.fromkeys(name.strip() for name in names):
        click.echo(f"{done} {name}" if name in changed else f"{name} {otherwise}")


def _print_table(found: Sequence[Queue]) -> None:
    rows = [("queue", "waiting", "running", "scheduled", "failed", "pool", "runners", "")]
    for queue in found:
        rows.append(
            (
                on_one_line(queue.name),
                str(queue.waiting),
                str(queue.running),
                str(queue.scheduled),
                str(queue.failed),
                _pool(queue),
                ", ".join(str(server.runner) for server in queue.servers) or "none",
                f"paused since {_moment(queue.changed_at)}" if queue.paused else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = zip(row, widths, range(len(row)), strict=True)
        click.echo(
            "  ".join(cell.rjust(w) if 1 <= column <= 4 else cell.ljust(w) for cell, w, column in cells).rstrip()
        )


def _pool(queue: Queue) -> str:
    """`20`; `20, 50` where runners differ; `10 (20)` where it was changed; `10 of 50` in a share."""
    started_with = ", ".join(
        dict.fromkeys(
            f"{server.pool}" if server.share is None else f"{server.pool} of {server.share}" for server in queue.servers
        )
    )
    if queue.pool is None:
        return started_with
    return f"{queue.pool} ({started_with})" if started_with else str(queue.pool)


def _moment(at: datetime | None) -> str:
    return "" if at is None else at.isoformat(" ", "seconds")


def _as_json(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
