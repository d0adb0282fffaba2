"""The command line: `greenjobs run`, `migrate` and `status`."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import click

from greenjobs import counts, grants, inspection, migrate, pool, storage
from greenjobs.cli_counts import counts_command, print_rates
from greenjobs.cli_doctor import doctor_command
from greenjobs.cli_health import health_command
from greenjobs.cli_jobs import jobs_group
from greenjobs.cli_options import apply_migrations, configure, on_one_line, plain_errors, setting_options
from greenjobs.cli_queues import print_changed_queues, queues_group
from greenjobs.cli_run import run_command
from greenjobs.cli_schedules import schedules_group
from greenjobs.errors import ConfigError
from greenjobs.version import __version__

logger = logging.getLogger(__name__)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="greenjobs")
def main() -> None:
    """Background jobs for synchronous Python, in PostgreSQL, on gevent."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that it cannot print is better than none at all


main.add_command(counts_command)
main.add_command(doctor_command)
main.add_command(health_command)
main.add_command(jobs_group)
main.add_command(queues_group)
main.add_command(run_command)
main.add_command(schedules_group)


@main.command("migrate")
@setting_options("database_url", "session_url")
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 when something would be.")
@click.option("--sql", is_flag=True, help="Print the SQL of all migrations, for those who migrate in another way.")
@click.option(
    "--grant",
    "grant_texts",
    multiple=True,
    metavar="RIGHT=ROLE",
    help="Give a role of the database the right to enqueue, replace, run or read, and no more; again for more.",
)
def migrate_command(check: bool, sql: bool, grant_texts: tuple[str, ...], **arguments: str | None) -> None:
    """Bring the tables up to date. Any number of processes may do it at once; again is harmless."""
    with plain_errors():
        if check and sql:
            raise ConfigError("--check looks at a database, and --sql prints what is the same for all; leave one out")
        wanted = grants.parse(grant_texts)
        if wanted and (check or sql):
            raise ConfigError("--grant changes the database, which neither --check nor --sql does; leave one out")
        if sql:
            click.echo(migrate.as_sql(), nl=False)
            return
        settings = configure(arguments)
        url = settings.session_url or settings.require_database_url()
        if check:
            found = migrate.standing(url)
            for migration in found.missing:
                click.echo(f"missing: {migration.label}")
            if found.missing:
                sys.exit(1)
            click.echo(_up_to_date(found.later))
        else:
            if not apply_migrations(url, wanted):
                click.echo(_up_to_date(migrate.standing(url).later))
            for grant in wanted:
                click.echo(f"{grant.role} may {grant.right}")


def _up_to_date(later: Sequence[str]) -> str:
    if not later:
        return "up to date"
    return f"nothing to do: a later release has applied {', '.join(later)}, and this one works with that"


@main.command()
@setting_options("database_url")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def status(as_json: bool, **arguments: str | None) -> None:
    """Show the queues, how much waits in them, how fast it goes, the live runners, and what waits for none of these."""
    with plain_errors():
        settings = configure(arguments)
        with pool.shared_pool(settings).connection() as connection, storage.patiently(connection):
            later = migrate.require_current(connection)
            queues = inspection.queue_statuses(connection)
            runners = inspection.live_runners(connection)
            unknown = inspection.unknown_job_types(connection)
            changed = inspection.queue_settings(connection)
        rates = counts.rates()
    if as_json:
        document = {
            "queues": [asdict(queue) for queue in queues],
            "rates": [rate.as_dict() for rate in rates],
            "runners": [asdict(runner) for runner in runners],
            "unknown_job_types": [asdict(job_type) for job_type in unknown],
            "changed_queues": {name: setting._asdict() for name, setting in changed.items()},
            "later_migrations": later,
        }
        click.echo(json.dumps(document, default=str, indent=2))
        return
    _print_status(queues, rates, runners, unknown, changed)
    if later:
        click.echo(f"\na later release has applied {', '.join(later)}; this one works with that")


def _print_status(
    queues: list[inspection.QueueStatus],
    rates: list[counts.Total],
    runners: list[inspection.RunnerStatus],
    unknown: list[inspection.UnknownJobType],
    changed: dict[str, inspection.QueueSetting],
) -> None:
    rows = [("queue", "available", "running", "scheduled", "failed", "oldest waiting")]
    for queue in queues:
        oldest = queue.oldest_waiting_seconds
        rows.append(
            (
                on_one_line(queue.queue or "(none yet)"),
                str(queue.available),
                str(queue.running),
                str(queue.scheduled),
                str(queue.failed),
                "" if oldest is None else f"{oldest:.1f} s",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join(cells).rstrip())
    click.echo()
    print_rates(rates)
    print_changed_queues(changed)
    if not runners:
        click.echo("no live runners")
    for runner in runners:
        served = ", ".join(f"{name} ({_slots(options)})" for name, options in runner.queues.items())
        since = runner.started_at.isoformat(" ", "seconds")
        click.echo(f"runner {runner.id}: {runner.hostname}:{runner.pid}, since {since}, serves {served}")
    if unknown:
        click.echo()
        click.echo("waiting, and no live runner knows the job type:")
    for job_type in unknown:
        click.echo(f"  {on_one_line(job_type.job_type)}: {job_type.count}")


def _slots(options: Mapping[str, float]) -> str:
    """`20`, or `20 of 50` in a share."""
    return f"{options['pool']:g} of {options['share']:g}" if "share" in options else f"{options['pool']:g}"
