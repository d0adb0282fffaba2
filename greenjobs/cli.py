"""The command line: `greenjobs run`, `migrate` and `status`."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import logging
import os
import platform
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click
import gevent

from greenjobs import config, counts, grants, health, inspection, logs, migrate, pool
from greenjobs.cli_counts import counts_command, print_rates
from greenjobs.cli_doctor import doctor_command, warn_at_start
from greenjobs.cli_health import health_command
from greenjobs.cli_jobs import jobs_group
from greenjobs.cli_options import configure, plain_errors, setting_options, show
from greenjobs.cli_queues import print_changed_queues, queues_group
from greenjobs.cli_schedules import schedules_group
from greenjobs.contrib import metrics_number
from greenjobs.contrib.equipment import Equipment, load
from greenjobs.embedded import is_embedded_url
from greenjobs.errors import ConfigError, GreenjobsError
from greenjobs.job import Job, registered_jobs
from greenjobs.metrics_folder import NUMBER
from greenjobs.redaction import redact
from greenjobs.runner import Runner, RunnerHandle
from greenjobs.supervised import Line
from greenjobs.supervisor import EXIT_MISTAKE
from greenjobs.systemd import Notifier
from greenjobs.version import __version__
from greenjobs.worker import Worker

logger = logging.getLogger(__name__)

EXIT_INTERRUPTED = 3

_QUEUE_FORM = "NAME[:POOL][:poll=SECONDS][:weight=NUMBER], such as emails:20 or indexing:5:poll=30"
_QUEUE_OPTIONS = {"poll": "poll_interval", "weight": "weight"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="greenjobs")
def main() -> None:
    """Background jobs for synchronous Python, in PostgreSQL, on gevent."""


main.add_command(counts_command)
main.add_command(doctor_command)
main.add_command(health_command)
main.add_command(jobs_group)
main.add_command(queues_group)
main.add_command(schedules_group)


@main.command()
@setting_options(
    "app",
    "database_url",
    "session_url",
    "session",
    "pool",
    "share",
    "poll_interval",
    "read_ahead",
    "max_retries",
    "max_crashes",
    "grace",
    "on_session_loss",
    "max_blocking",
    "threads",
    "job_processes",
    "processes",
    "max_jobs",
    "max_memory",
    "http",
    "default_queue",
    "log_level",
    "log_format",
)
@click.option(
    "--queue", "queues", multiple=True, metavar=_QUEUE_FORM.split(",")[0], help=f"{_QUEUE_FORM}; again for more."
)
@click.option("--until-empty", is_flag=True, help="Stop when nothing waits that could run now.")
@click.option("--migrate", "migrate_first", is_flag=True, help="Bring the tables up to date first.")
@click.option("--reload", is_flag=True, help="For development: start afresh when Python files here change.")
def run(queues: tuple[str, ...], until_empty: bool, migrate_first: bool, reload: bool, **arguments: str | None) -> None:
    """Run jobs until a signal says to stop.

    Without --queue it serves every queue that the jobs name. Each has a pool of its own; with --share, those that are
    listed have one together, in strict order or by their weights. The application is found as Flask finds it, unless
    --app names it. With --processes, --max-jobs, --max-memory or --reload, a supervisor keeps the processes at work.
    """
    with plain_errors():
        settings = configure(arguments, loads_application=True)
        line = Line.open(settings)
        if NUMBER in os.environ:  # before the application makes metrics
            metrics_number.take()
        notifier = Notifier.taken()
        if line is None and (reload or settings.needs_supervisor):
            raise ConfigError(
                "processes, max_jobs, max_memory and --reload need a supervisor, which is there when the command is "
                "`greenjobs run`, or `python -m greenjobs run`, and `run` its first argument"
            )
        application, equipment = _load_application(settings.app)
        logs.settle()
        for each in equipment:
            each.adopt()
        settings = config.current()
        url = settings.require_database_url()
        jobs = registered_jobs()
        if not jobs:
            raise ConfigError(f"{settings.app or application!r} declares no jobs; name the module that does with --app")
        if migrate_first:
            _migrate(settings.session_url or url)
        if settings.share is not None and arguments["pool"] is not None:
            raise ConfigError(
                f"--pool is {arguments['pool']!r}, but with a share ({settings.share}) queues have no pools of their "
                f"own; the most that one may have of it goes with its name, as in --queue bulk:10"
            )
        runner = Runner(url, context=application).register(*jobs.values())
        runner.application = settings.app or ""
        for each in equipment:
            each.equip(runner)
        for queue, options in _parse_queues(queues).items():
            runner.configure_queue(queue, **options)
        if until_empty:
            runner.shutdown_when_queue_empty()
        if line is not None:
            line.begin(settings)
        handle = runner.prepare()
        http = settings.http if line is None else line.http
        with health.serving(handle, http) as server, _measured(handle, settings):
            # Before the start, in which jobs may begin: from then on a signal must not just end the process.
            _handle_signals(handle)
            handle.start()
            if server is not None and line is None:
                logger.info("http: %s", server.address)
            _banner(url, handle, jobs)
            warn_at_start(settings, handle)
            for each in equipment:
                each.check(handle)
            if line is not None:
                line.report_up(handle)
            health.tell_systemd(handle, notifier, grace=settings.grace)
            handle.wait_for_shutdown()
        logger.info("stopped")
        if handle.gave_up_jobs:
            sys.exit(EXIT_INTERRUPTED)


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
        wanted = grants.parse(grant_texts)
        if wanted and (check or sql):
            raise ConfigError("--grant changes the database, which neither --check nor --sql does; leave one out")
        if sql:
            click.echo(migrate.as_sql(), nl=False)
            return
        settings = configure(arguments)
        url = settings.session_url or settings.require_database_url()
        if check:
            missing = migrate.pending(url)
            for migration in missing:
                click.echo(f"missing: {migration.label}")
            if missing:
                sys.exit(1)
            click.echo("up to date")
        else:
            if not _migrate(url, wanted):
                click.echo("up to date")
            for grant in wanted:
                click.echo(f"{grant.role} may {grant.right}")


@main.command()
@setting_options("database_url")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def status(as_json: bool, **arguments: str | None) -> None:
    """Show the queues, how much waits in them, how fast it goes, the live runners, and what waits for none of these."""
    with plain_errors():
        settings = configure(arguments)
        with pool.shared_pool(settings).connection() as connection:
            migrate.require_current(connection)
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
        }
        click.echo(json.dumps(document, default=str, indent=2))
        return
    _print_status(queues, rates, runners, unknown, changed)


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
                queue.queue or "(none yet)",
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
        click.echo(f"  {job_type.job_type}: {job_type.count}")


def _slots(options: Mapping[str, float]) -> str:
    """`20`, or `20 of 50` in a share."""
    return f"{options['pool']:g} of {options['share']:g}" if "share" in options else f"{options['pool']:g}"


def _load_application(name: str | None) -> tuple[Any, list[Equipment]]:
    """The application, and what it has of greenjobs."""
    try:
        return load(name)
    except GreenjobsError:
        raise
    except Exception:
        # The application's own mistake: its traceback says where, and the status, that another try is of no use.
        if logs.writes_json():
            logger.critical("the application cannot be loaded", exc_info=True)
        else:
            traceback.print_exc()
        sys.exit(EXIT_MISTAKE)


def _migrate(url: str, wanted: Sequence[grants.Grant] = ()) -> list[str]:
    applied = migrate.migrate(url, grants=wanted)
    for label in applied:
        click.echo(f"applied {label}")
    return applied


def _parse_queues(texts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    queues: dict[str, dict[str, Any]] = {}
    for text in texts:
        queue, options = _parse_queue(text)
        if queue in queues:
            raise ConfigError(f"--queue is {text!r}, but {queue!r} is given twice")
        queues[queue] = options
    return queues


def _parse_queue(text: str) -> tuple[str, dict[str, Any]]:
    """`emails:20:poll=5` in parts; what the parts may be is checked where every setting is."""
    name, *parts = text.split(":")
    options: dict[str, Any] = {}
    for part in parts:
        word, equals, value = part.partition("=")
        key = _QUEUE_OPTIONS.get(word, "pool") if equals else "pool"
        if key in options or not part:
            raise ConfigError(f"--queue is {text!r}; the form is {_QUEUE_FORM}")
        options[key] = part if key == "pool" else value
    return name, options


@contextlib.contextmanager
def _measured(handle: RunnerHandle, settings: config.Settings) -> Iterator[None]:
    """Measure the runner where somebody may ask for it: over HTTP, or in a way of the application's own."""
    is_asked_for = settings.http is not None or "greenjobs.contrib.prometheus" in sys.modules
    if not is_asked_for or importlib.util.find_spec("prometheus_client") is None:
        yield
        return
    from greenjobs.contrib import prometheus

    watch = prometheus.watch(handle)
    try:
        yield
    finally:
        watch.stop()


def _banner(url: str, handle: RunnerHandle, jobs: dict[str, Job[Any, Any]]) -> None:
    queues = ", ".join(_described(worker, handle.queues[queue]) for queue, worker in handle.workers.items())
    if handle.share is not None:
        queues += f"; together {handle.share.slots} at a time, {'by weight' if handle.share.by_weight else 'in order'}"
    logger.info("greenjobs %s, Python %s, %s", __version__, platform.python_version(), handle.name)
    logger.info("database: %s%s", redact(url), " (for development)" if is_embedded_url(url) else "")
    if handle.session == "lease":
        logger.info("session: by lease and polling, for a pooler is in between; session_url can name a direct way")
    logger.info("queues: %s", queues)
    logger.info("jobs: %s", ", ".join(sorted(jobs)))


def _described(worker: Worker, options: Mapping[str, float]) -> str:
    weight = f", weight {options['weight']:g}" if "weight" in options else ""
    return f"{worker.queue} ({worker.pool} at a time{weight}{', paused' if worker.is_paused else ''})"


def _handle_signals(handle: RunnerHandle) -> None:
    """Handlers only set events, or print; gevent runs them in the event loop, never in the middle of a job."""
    # Signals are counted here, for a supervisor may have told the runner to stop as well.
    signals = itertools.count(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, lambda: handle.shutdown(urgency=next(signals)))
    # The terminal was closed, or the supervisor killed; nohup makes it ignored, and so it stays.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        gevent.signal_handler(signal.SIGHUP, lambda: handle.shutdown(urgency=1))
    gevent.signal_handler(signal.SIGQUIT, lambda: show(handle.stacks()))
