"""The command line: sets up the arena and the runner, lets the players play, and judges by the ledger."""

from __future__ import annotations

import logging
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import click
import gevent
import psycopg2
from rich.console import Console
from rich.logging import RichHandler

import greenjobs
from examples.stress_test import game
from examples.stress_test.arena import arena
from examples.stress_test.display import Show, print_report, progress_display
from examples.stress_test.ledger import Ledger, Report
from greenjobs import GreenjobsError, Runner, config, migrate
from greenjobs.runner import RunnerHandle

EMBEDDED_URL = "embedded:.greenjobs/stress"

_LOOK_SECONDS = 0.25

_ERROR_STATUS = 2
_INTERRUPTED_STATUS = 130  # as shells have it: 128 and the number of SIGINT


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--jobs",
    type=click.IntRange(1, 1_000_000),
    default=250,
    show_default=True,
    help="How many times the players ask for a job.",
)
@click.option(
    "--workers",
    type=click.IntRange(3, 1_000),
    default=12,
    show_default=True,
    help="How many jobs run at a time: half of them of the queue journey, a quarter each of wild and training.",
)
@click.option(
    "--duration",
    type=click.IntRange(1, 3_600),
    default=60,
    show_default=True,
    help="Seconds after which the game is over, if it is not before. What runs then is finished.",
)
@click.option(
    "--database-url",
    metavar="URL",
    default=EMBEDDED_URL,
    show_default=True,
    help="Where to play: in a schema of its own, dropped at the end. Never taken from the environment.",
)
@click.option("--seed", type=int, help="Play the same moves, with the same luck, as another game.")
@click.option("--quiet", is_flag=True, help="Print the table only.")
def main(jobs: int, workers: int, duration: int, database_url: str, seed: int | None, quiet: bool) -> None:
    """Play a monster-collecting game with real jobs, and prove that none was lost and none ran twice.

    Ctrl-C ends the game: what runs is finished, or interrupted by a second Ctrl-C, and the table is printed. The exit
    status is 0 if every job is accounted for, 1 if a job was lost or ran twice, and 2 if there was no game.
    """
    console = Console()
    _log_to(console, quiet=quiet)
    seed = random.randrange(1_000_000) if seed is None else seed
    pools = game.share_workers(workers)
    try:
        greenjobs.configure(database_url=database_url)
        with arena(config.current().require_database_url()) as url:
            greenjobs.configure(database_url=url)
            migrate.migrate(url)
            if not quiet:
                shares = ", ".join(f"{queue} {pool}" for queue, pool in pools.items())
                said = f"{jobs} moves, {workers} jobs at a time ({shares}), seed {seed}"
                console.print(said, soft_wrap=True, highlight=False)
            with progress_display(console, game.JOBS, quiet=quiet) as show:
                report = play(url, jobs=jobs, pools=pools, duration_seconds=duration, seed=seed, show=show)
    except (GreenjobsError, psycopg2.Error) as error:
        click.echo(f"stress test: {str(error).strip()}", err=True)
        sys.exit(_ERROR_STATUS)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED_STATUS)
    print_report(console, report, game.JOBS, pools=pools)
    sys.exit(0 if report.is_clean else 1)


def play(
    database_url: str, *, jobs: int, pools: dict[str, int], duration_seconds: float, seed: int, show: Show
) -> Report:
    """Play one game in a migrated, empty schema; blocks until the runner has ended."""
    with closing(Ledger(database_url, kinds=[job.name for job in game.JOBS])) as ledger:
        ledger.create()
        world = game.World(ledger, seed)
        runner = Runner(database_url, context=world).register(*game.JOBS)
        for queue, pool in pools.items():
            runner.configure_queue(queue, pool=pool)
        game_over = threading.Event()
        handle = runner.start()
        _stop_on_signals(handle, game_over)
        ends_at = time.monotonic() + duration_seconds
        seconds_per_move = len(game.PLAYERS) / (game.MOVES_PER_SECOND_AND_WORKER * sum(pools.values()))
        try:
            with ThreadPoolExecutor(len(game.PLAYERS)) as executor:
                players = [
                    executor.submit(
                        game.play,
                        player,
                        moves=_share(jobs, place, len(game.PLAYERS)),
                        seconds_per_move=seconds_per_move,
                        world=world,
                        game_over=game_over,
                    )
                    for place, player in enumerate(game.PLAYERS)
                ]
                try:
                    _watch(handle, ledger, players, ends_at=ends_at, game_over=game_over, show=show)
                finally:
                    game_over.set()
            for player in players:
                player.result()  # raises what a player ran into
        finally:
            handle.shutdown(urgency=1)  # the first wish of that kind; those of signals come on top
            handle.wait_for_shutdown()
        return ledger.report()


def _watch(
    handle: RunnerHandle,
    ledger: Ledger,
    players: Sequence[Future[None]],
    *,
    ends_at: float,
    game_over: threading.Event,
    show: Show,
) -> None:
    """Show the progress until the game is over: somebody ended it, the time is up, or nothing is left to be done."""
    while not game_over.is_set():
        # Before the look at the queue: a player may enqueue one last job between the two.
        players_are_done = all(player.done() for player in players)
        remaining_seconds = ends_at - time.monotonic()
        progress = ledger.progress(remaining_seconds=remaining_seconds)
        show(progress)
        if remaining_seconds <= 0 or (players_are_done and not progress.outstanding):
            return
        if handle.wait_for_shutdown(_LOOK_SECONDS):
            return


def _share(whole: int, place: int, parts: int) -> int:
    """How many of the whole fall to this part, so that the parts differ by one at most."""
    return whole // parts + (place < whole % parts)


def _stop_on_signals(handle: RunnerHandle, game_over: threading.Event) -> None:
    """Let Ctrl-C, or SIGTERM, end the game; the second one also interrupts what runs."""

    def stop() -> None:
        game_over.set()
        handle.shutdown()

    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stop)


def _log_to(console: Console, *, quiet: bool) -> None:
    """Log warnings, and where the embedded server has its data; above the picture, if there is one."""
    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    handler.addFilter(_is_news)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    if not quiet:
        logging.getLogger("greenjobs.embedded").setLevel(logging.INFO)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record tells more than that a mishap happened, which is planned, counted, and comes often."""
    return not (record.exc_info and isinstance(record.exc_info[1], game.Mishap))
