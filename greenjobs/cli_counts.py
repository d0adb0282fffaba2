"""`greenjobs counts`, and what `greenjobs status` says of the last minutes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from greenjobs import counts
from greenjobs.cli_options import migrated_database, on_one_line, setting_options


@click.command("counts")
@click.option("--since", default="1h", metavar="AGE", show_default=True, help="From so long ago, as in 90s or 7d.")
@click.option("--queue", multiple=True, metavar="NAME", help="Of this queue; again for more.")
@click.option("--type", "--job-type", "job_type", multiple=True, metavar="NAME", help="Of this type; again for more.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@setting_options("database_url")
def counts_command(
    since: str, queue: tuple[str, ...], job_type: tuple[str, ...], as_json: bool, database_url: str | None
) -> None:
    """Show how many jobs of each queue and type ended how, and how long they ran and waited."""
    with migrated_database(database_url):
        totals = counts.totals(since=since, queue=queue or None, job_type=job_type or None)
    if as_json:
        click.echo(json.dumps([total.as_dict() for total in totals], indent=2))
        return
    outcomes = ("done", "retried", "failed", "discarded", "cancelled", "snoozed")
    rows: list[tuple[str, ...]] = [("queue", "type", *outcomes, "run", "waited")]
    for total in totals:
        ended = [str(getattr(total, outcome)) for outcome in outcomes]
        rows.append((on_one_line(total.queue), on_one_line(total.job_type or ""), *ended, *_means(total)))
    _print_table(rows, names=2)


def print_rates(rates: Sequence[counts.Total]) -> None:
    """A table of the queues in which something ended lately, and an empty line; nothing if there are none."""
    if not rates:
        return
    rows = [(f"last {counts.RATE_MINUTES} minutes", "done/min", "failed/min", "run", "waited")]
    for rate in rates:
        per_minute = (f"{rate.done_per_minute:.1f}", f"{rate.failed_per_minute:.1f}")
        rows.append((on_one_line(rate.queue), *per_minute, *_means(rate)))
    _print_table(rows, names=1)
    click.echo()


def _means(total: counts.Total) -> tuple[str, str]:
    run, waited = total.mean_run_seconds, total.mean_waited_seconds
    return ("" if run is None else f"{run:.3g} s", "" if waited is None else f"{waited:.3g} s")


def _print_table(rows: Sequence[tuple[str, ...]], *, names: int) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:names], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[names:], widths[names:], strict=True)]
        click.echo("  ".join(cells).rstrip())
