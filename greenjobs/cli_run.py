"""`greenjobs run`: loads the application, makes its runner, and keeps it at work until somebody says to stop."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import platform
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import gevent

from greenjobs import config, green, health, logs
from greenjobs.cli_doctor import warn_at_start
from greenjobs.cli_options import apply_migrations, configure, plain_errors, setting_options, show
from greenjobs.contrib import metrics_number
from greenjobs.contrib.equipment import Equipment, load, name_of
from greenjobs.embedded import is_embedded_url
from greenjobs.errors import ConfigError, GreenjobsError
from greenjobs.job import registered_jobs
from greenjobs.metrics_folder import NUMBER
from greenjobs.redaction import redact
from greenjobs.runner import Runner, RunnerHandle
from greenjobs.supervised import Line
from greenjobs.supervisor import EXIT_MISTAKE
from greenjobs.systemd import Notifier
from greenjobs.version import __version__
from greenjobs.worker import Worker

# Of the command line as a whole, which is how logs and their filters know it.
logger = logging.getLogger("greenjobs.cli")

EXIT_INTERRUPTED = 3

_QUEUE_FORM = "NAME[:POOL][:poll=SECONDS][:weight=NUMBER], such as emails:20 or indexing:5:poll=30"
_QUEUE_OPTIONS = {"poll": "poll_interval", "weight": "weight"}


@click.command("run")
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
def run_command(
    queues: tuple[str, ...], until_empty: bool, migrate_first: bool, reload: bool, **arguments: str | None
) -> None:
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
        settings = config.current()
        url = settings.require_database_url()
        jobs = registered_jobs()
        if not jobs:
            raise ConfigError(f"{settings.app or application!r} declares no jobs; name the module that does with --app")
        if migrate_first:
            apply_migrations(settings.session_url or url)
        _check_pool(settings, arguments["pool"])
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
        _serve(handle, equipment, line, notifier)
        if handle.gave_up_jobs:
            sys.exit(EXIT_INTERRUPTED)


def _serve(handle: RunnerHandle, equipment: Sequence[Equipment], line: Line | None, notifier: Notifier) -> None:
    """Run until somebody says to stop, and tell those who want to know how it goes."""
    settings = config.current()
    http = settings.http if line is None else line.http
    with health.serving(handle, http) as server, _measured(handle, settings):
        # Before the start, in which jobs may begin: from then on a signal must not just end the process.
        _handle_signals(handle)
        handle.start()
        if server is not None and line is None:
            logger.info("http: %s", server.address)
        _banner(handle)
        warn_at_start(settings, handle)
        for each in equipment:
            each.check(handle)
        if line is not None:
            line.report_up(handle)
        health.tell_systemd(handle, notifier, grace=settings.grace)
        handle.wait_for_shutdown()
    logger.info("stopped")


def _load_application(name: str | None) -> tuple[Any, list[Equipment]]:
    """The application, and what it has of greenjobs, the settings of which count from now on."""
    try:
        application, equipment = load(name)
    except GreenjobsError:
        raise
    except Exception:
        # The application's own mistake: its traceback says where, and the status, that another try is of no use.
        if logs.writes_json():
            logger.critical("the application cannot be loaded", exc_info=True)
        else:
            traceback.print_exc()
            click.echo(f"greenjobs: app is {name_of(name)!r}, and it cannot be loaded: see above", err=True)
        sys.exit(EXIT_MISTAKE)
    # It may have put psycogreen's wait callback in the place of ours, by patch_psycopg.
    green.patch()
    logs.settle()
    for each in equipment:
        each.adopt()
    return application, equipment


def _check_pool(settings: config.Settings, given: str | None) -> None:
    if settings.share is not None and given is not None:
        raise ConfigError(
            f"--pool is {given!r}, but with a share ({settings.share}) queues have no pools of their own; the most "
            f"that one may have of it goes with its name, as in --queue bulk:10"
        )


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


def _banner(handle: RunnerHandle) -> None:
    url = config.current().require_database_url()
    queues = ", ".join(_described(worker, handle.queues[queue]) for queue, worker in handle.workers.items())
    if handle.share is not None:
        queues += f"; together {handle.share.slots} at a time, {'by weight' if handle.share.by_weight else 'in order'}"
    logger.info("greenjobs %s, Python %s, %s", __version__, platform.python_version(), handle.name)
    logger.info("database: %s%s", redact(url), " (for development)" if is_embedded_url(url) else "")
    if handle.session == "lease":
        logger.info("session: by lease and polling, for a pooler is in between; session_url can name a direct way")
    logger.info("queues: %s", queues)
    logger.info("jobs: %s", ", ".join(sorted(registered_jobs())))


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
