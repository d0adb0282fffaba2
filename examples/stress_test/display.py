"""What a person sees: the game while it goes on, and the table at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from examples.stress_test.ledger import ALL, Progress, Report, Score
from greenjobs.job import Job

Show: TypeAlias = Callable[[Progress], None]
Kind: TypeAlias = Job[..., Any]

_SECONDS_BETWEEN_LINES = 2.0

_BAR_WIDTH = 16

# More ids than this tell nobody more.
_NAMED_JOBS = 10


def progress_display(console: Console, kinds: Sequence[Kind], *, quiet: bool) -> AbstractContextManager[Show]:
    """Something to call with the progress several times a second: a picture on a terminal, lines elsewhere."""
    if quiet:
        return nullcontext(lambda progress: None)
    return _live_picture(console, kinds) if console.is_terminal else _lines(console)


@contextmanager
def _live_picture(console: Console, kinds: Sequence[Kind]) -> Iterator[Show]:
    started = time.monotonic()
    # Refreshed by hand: there is nothing new to see between two looks into the ledger.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda progress: live.update(_picture(progress, kinds, time.monotonic() - started), refresh=True)


def _picture(progress: Progress, kinds: Sequence[Kind], seconds: float) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("job", "queue", "done"):
        table.add_column(heading)
    for heading in ("", "running", "waiting", "to retry", "failed"):
        table.add_column(heading, justify="right")
    for name, queue in [*((kind.name, kind.queue) for kind in kinds), (ALL, "")]:
        standing = progress.standings[name]
        table.add_row(
            name,
            queue,
            ProgressBar(total=max(standing.enqueued, 1), completed=standing.done, width=_BAR_WIDTH),
            f"{standing.done}/{standing.enqueued}",
            Text(str(standing.running), "bold green" if standing.running else "dim"),
            str(standing.waiting),
            str(standing.awaiting_retry),
            Text(str(standing.failed), "yellow" if standing.failed else "dim"),
        )
    total = progress.standings[ALL]
    moves = f"{seconds:.1f} s, {total.enqueued + total.deduplicated} moves, {total.deduplicated} of them deduplicated"
    return Group("", table, "", Text(moves, "dim"))


@contextmanager
def _lines(console: Console) -> Iterator[Show]:
    started = time.monotonic()
    next_at = started

    def show(progress: Progress) -> None:
        nonlocal next_at
        now = time.monotonic()
        if now < next_at:
            return
        next_at = now + _SECONDS_BETWEEN_LINES
        total = progress.standings[ALL]
        console.print(
            f"{now - started:5.1f} s: {total.enqueued} enqueued, {total.deduplicated} deduplicated, "
            f"{total.running} running, {total.waiting} waiting, {total.awaiting_retry} to retry, {total.done} done",
            soft_wrap=True,
            highlight=False,
        )

    yield show


def print_report(console: Console, report: Report, kinds: Sequence[Kind], *, pools: Mapping[str, int]) -> None:
    """Print the table, a column for each kind, and below it the verdict."""
    console.print()
    console.print(_score_table(report, kinds, pools))
    for line in _remarks(report.scores[ALL]):
        console.print(line, soft_wrap=True, highlight=False)
    for style, line in _verdict(report):
        console.print(line, style=style, soft_wrap=True, highlight=False)


def _score_table(report: Report, kinds: Sequence[Kind], pools: Mapping[str, int]) -> Table:
    scores = [report.scores[name] for name in (*(kind.name for kind in kinds), ALL)]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for kind in kinds:
        table.add_column(kind.name, justify="right")
    table.add_column(ALL, justify="right", style="bold")

    def add(heading: str, cell: Callable[[Score], object]) -> None:
        table.add_row(heading, *(str(cell(score)) for score in scores))

    table.add_row("queue", *(kind.queue for kind in kinds), "")
    table.add_row("at a time", *(str(pools[kind.queue]) for kind in kinds), str(sum(pools.values())))
    table.add_row("priority", *(str(kind.priority) for kind in kinds), "")
    table.add_row()
    add("enqueued", lambda score: score.enqueued)
    add("deduplicated", lambda score: score.deduplicated)
    add("done", lambda score: score.done)
    add("failed attempts", lambda score: score.failed)
    add("retried", lambda score: score.retried)
    add("awaiting retry", lambda score: score.awaiting_retry)
    add("given up", lambda score: score.given_up)
    add("not started", lambda score: score.not_started)
    add("lost", lambda score: score.lost)
    add("ran twice", lambda score: score.ran_twice)
    table.add_row()
    add("wait p50", lambda score: _seconds(score.wait_p50))
    add("wait p95", lambda score: _seconds(score.wait_p95))
    add("run p50", lambda score: _seconds(score.run_p50))
    add("run p95", lambda score: _seconds(score.run_p95))
    add("jobs/s", lambda score: f"{score.done_per_second:.1f}")
    add("peak concurrency", lambda score: score.peak)
    return table


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s"


def _remarks(total: Score) -> Iterator[str]:
    yield ""
    if total.awaiting_retry:
        yield f"Awaiting retry: {total.awaiting_retry}. They failed or were interrupted, and then the game was over."
    if total.given_up:
        yield f"Given up: {total.given_up}. They failed as often as they may."
    if total.not_started:
        yield f"Not started: {total.not_started}. They waited when the game was over (see --duration and --workers)."


def _verdict(report: Report) -> Iterator[tuple[str, str]]:
    if report.lost:
        yield "bold red", f"LOST: job {_some(report.lost)}"
    if report.ran_twice:
        yield "bold red", f"RAN TWICE: job {_some(report.ran_twice)}"
    if report.is_clean:
        yield "bold green", "No job was lost and none ran twice: so says the ledger in the database."


def _some(jobs: Sequence[int]) -> str:
    named = ", ".join(map(str, jobs[:_NAMED_JOBS]))
    more = len(jobs) - _NAMED_JOBS
    return named + (f" and {more} more" if more > 0 else "")
