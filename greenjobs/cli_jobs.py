"""`greenjobs jobs`: look at the jobs in the table, and retry, cancel, discard or prune them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from greenjobs import jobs
from greenjobs.cli_options import Command, migrated_database, on_one_line, setting_options, visible
from greenjobs.errors import OptionError
from greenjobs.jobs import FinishedJob, Outcome, Plan, StoredJob
from greenjobs.progress import Progress

# What was asked for by id could not be done, or not for all.
EXIT_LEFT_ALONE = 1

_LIST_LIMIT = 100
_SHOWN_LEFT_ALONE = 10
_LONGEST_ERROR = 80

_DONE = {"retry": "retried", "cancel": "cancelled", "discard": "discarded", "prune": "pruned"}


@click.group("jobs")
def jobs_group() -> None:
    """Look at jobs, and retry, cancel, discard or prune them.

    Jobs are named by id, by filters, or both; all that is said must hold. An AGE is in seconds or as in 90s, 12h,
    "7 days": since the job failed, if it is failed, since it ended, if it is kept, else since it was enqueued.
    """


def _filters(command: Command) -> Command:
    type_flags = ("--type", "--job-type", "job_type")
    options: list[Callable[[Command], Command]] = [
        click.option("--queue", multiple=True, metavar="NAME", help="Jobs in this queue; again for more."),
        click.option(*type_flags, multiple=True, metavar="NAME", help="Jobs of this type; again for more."),
        click.option("--error", metavar="TEXT", help="Jobs with this in their last error, in any case."),
        click.option("--older-than", metavar="AGE", help="Jobs of at least this age."),
        click.option("--newer-than", metavar="AGE", help="Jobs of at most this age."),
        click.option("--limit", type=int, metavar="COUNT", help="So many jobs at most, the newest ones."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs."),
        setting_options("database_url"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _state_option(states: Sequence[str]) -> Callable[[Command], Command]:
    help = f"Jobs that are {', '.join(states[:-1])} or {states[-1]}; again for more."
    return click.option("--state", multiple=True, metavar="STATE", help=help)


_ids = click.argument("ids", type=int, nargs=-1, metavar="[ID]...")


def _named(command: Command) -> Command:
    return _ids(_state_option(jobs.STATES)(command))


def _careful(command: Command) -> Command:
    command = click.option("--yes", is_flag=True, help="Do not ask, where it is more than one job.")(command)
    return click.option("--dry-run", is_flag=True, help="Change nothing; print what would be.")(command)


@jobs_group.command("list")
@_ids
@_state_option((*jobs.STATES, *jobs.KEPT_OUTCOMES))
@_filters
def list_command(
    ids: tuple[int, ...], limit: int | None, as_json: bool, database_url: str | None, **filters: Any
) -> None:
    """List jobs, the newest first; finished ones that are kept where they are named by id or --state."""
    with migrated_database(database_url):
        limit = _LIST_LIMIT if limit is None else limit
        given = _given(filters)
        found = jobs.find(*ids, limit=limit, **given)
        total = len(found) if len(found) < limit else jobs.count(*ids, **given)
    if as_json:
        _print_json([asdict(job) for job in found])
        return
    _print_table(found)
    if total > len(found):
        click.echo(f"\n{len(found)} of {total} jobs; --limit shows more")


@jobs_group.command("show")
@click.argument("ids", type=int, nargs=-1, required=True, metavar="ID...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@setting_options("database_url")
def show_command(ids: tuple[int, ...], as_json: bool, database_url: str | None) -> None:
    """Show all that is known of jobs, finished ones that are kept included: arguments, attempts, errors, results."""
    with migrated_database(database_url):
        by_id = {job.id: job for job in jobs.find(*ids, limit=None)}
    found = [by_id[id] for id in dict.fromkeys(ids) if id in by_id]
    if as_json:
        _print_json([asdict(job) for job in found])
    else:
        click.echo("\n\n".join(_description(job) for job in found), nl=bool(found))
    missing = [id for id in ids if id not in by_id]
    for id in missing:
        click.echo(f"greenjobs: there is no job {id}; it is done, or was deleted, or never was", err=True)
    if missing:
        sys.exit(EXIT_LEFT_ALONE)


@jobs_group.command("retry")
@_named
@_filters
@_careful
def retry_command(**arguments: Any) -> None:
    """Make jobs available now, with all their retries before them.

    That is failed jobs; and scheduled ones, where they are named by id or --state.
    """
    _act("retry", **arguments)


@jobs_group.command("cancel")
@_named
@_filters
@_careful
def cancel_command(**arguments: Any) -> None:
    """End jobs: those that wait are deleted, those that run are asked to end."""
    _act("cancel", **arguments)


@jobs_group.command("discard")
@_named
@_filters
@_careful
def discard_command(**arguments: Any) -> None:
    """Delete jobs that do not run.

    That is failed jobs; and waiting ones, where they are named by id or --state.
    """
    _act("discard", **arguments)


@jobs_group.command("prune")
@_state_option(("failed", *jobs.KEPT_OUTCOMES))
@_filters
@_careful
def prune_command(**arguments: Any) -> None:
    """Delete jobs that failed longer ago than --older-than, or than keep_failed of the settings.

    With --state, finished ones that are kept, too, which ended longer ago than --older-than.
    """
    _act("prune", **arguments)


def _act(
    action: jobs.Action,
    *,
    ids: tuple[int, ...] = (),
    limit: int | None,
    as_json: bool,
    database_url: str | None,
    dry_run: bool,
    yes: bool,
    **filters: Any,
) -> None:
    with migrated_database(database_url):
        plan = jobs.plan(action, *ids, limit=limit, **_given(filters))
        if not dry_run and len(plan.ids) > 1 and not yes:
            _confirm(plan)
        outcome = Outcome(plan.ids, (), plan.left_alone) if dry_run else plan.carry_out()
    if as_json:
        _print_json({"action": action, "dry_run": dry_run, **asdict(outcome)})
    else:
        _print_outcome(action, outcome, dry_run=dry_run)
    if any(id in outcome.left_alone for id in ids):
        sys.exit(EXIT_LEFT_ALONE)


def _confirm(plan: Plan) -> None:
    """Ask whether so many jobs are meant, where there is somebody to ask; end the command if they are not."""
    count = len(plan.ids)
    if not sys.stdin.isatty():
        raise OptionError(
            f"this would {plan.action} {count} jobs, and nobody is here to be asked whether that is meant; "
            f"say --yes, or --dry-run to see which"
        )
    click.confirm(f"{plan.action} {count} jobs?", abort=True, err=True)


def _given(filters: dict[str, Any]) -> Any:
    """The filters as greenjobs.jobs takes them: where an option may be repeated, click says () for not given."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in filters.items() if value != ()}


# --- what is printed --------------------------------------------------------------------------------------------------


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, default=_as_json, indent=2))


def _as_json(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _print_table(found: Sequence[StoredJob | FinishedJob]) -> None:
    rows = [("id", "type", "queue", "state", "age", "failures", "last error")]
    for job in found:
        error = on_one_line(job.error or "")
        rows.append(
            (
                str(job.id),
                on_one_line(job.job_type),
                on_one_line(job.queue or "(none yet)"),
                job.state,
                _age(job.age_seconds),
                str(job.retries),
                error if len(error) <= _LONGEST_ERROR else f"{error[: _LONGEST_ERROR - 1]}…",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    adjust: list[Callable[[str, int], str]] = [str.rjust, str.ljust, str.ljust, str.ljust, str.rjust, str.rjust]
    adjust.append(str.ljust)
    for row in rows:
        cells = [each(cell, width) for each, cell, width in zip(adjust, row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _description(job: StoredJob | FinishedJob) -> str:
    facts = _facts_of_finished(job) if isinstance(job, FinishedJob) else _facts(job)
    lines = [f"job {job.id}: {on_one_line(job.job_type)}", *[f"  {name:14}{value}" for name, value in facts]]
    for error in job.errors:
        where = f"attempt {error.get('attempt')} at {error.get('at')} on {error.get('runner')}"
        lines += ["", visible(f"  {where}: {error.get('error')}: {error.get('message')}")]
        lines += [f"    {line}" for line in visible(str(error.get("traceback") or "")).splitlines()]
    if job.log:
        lines += ["", "  log:"]
    for said in job.log:
        where = f"attempt {said.get('attempt')} at {said.get('at')}"
        lines.append(visible(f"    {where}: {said.get('level')} {said.get('message')}"))
    return "\n".join(lines)


def _facts_of_finished(job: FinishedJob) -> list[tuple[str, str]]:
    seconds = [("ran for", job.run_seconds), ("waited for", job.waited_seconds)]
    return [
        ("state", job.state if job.runner is None else f"{job.state}, on {job.runner}"),
        ("queue", on_one_line(job.queue or "(none yet)")),
        ("priority", str(job.priority)),
        ("created at", _moment(job.created_at)),
        *([("started at", _moment(job.started_at))] if job.started_at is not None else []),
        ("ended at", _moment(job.ended_at)),
        ("kept until", _moment(job.keep_until)),
        *[(name, f"{length:.3f} s") for name, length in seconds if length is not None],
        ("claims", str(job.attempt)),
        ("failures", str(job.retries)),
        ("crashes", str(job.crashes)),
        ("arguments", visible(json.dumps(job.data, ensure_ascii=False))),
        *([("result", visible(json.dumps(job.result, ensure_ascii=False)))] if job.has_result else []),
        *([("progress", on_one_line(_progress(job.progress)))] if job.progress is not None else []),
    ]


def _facts(job: StoredJob) -> list[tuple[str, str]]:
    times = [
        ("created at", job.created_at),
        ("to run at", job.run_at),
        ("expires at", job.expires_at),
        ("last tried at", job.last_retry),
        ("told to end at", job.cancel_asked_at),
    ]
    return [
        ("state", job.state if job.runner is None else f"{job.state}, on {job.runner} since {_moment(job.claimed_at)}"),
        ("queue", on_one_line(job.queue or "(none yet)")),
        ("priority", str(job.priority)),
        *[(name, _moment(at)) for name, at in times if at is not None],
        ("claims", str(job.attempt)),
        ("failures", str(job.retries)),
        ("crashes", str(job.crashes)),
        *([("unique key", on_one_line(job.unique_key))] if job.unique_key is not None else []),
        *([("waits for", f"job {job.waits_for}, with the same overlap key")] if job.waits_for is not None else []),
        *([("options", visible(json.dumps(job.options)))] if job.options else []),
        ("arguments", visible(json.dumps(job.data, ensure_ascii=False))),
        *([("progress", on_one_line(_progress(job.progress)))] if job.progress is not None else []),
    ]


def _progress(progress: Progress) -> str:
    done, total = f"{progress.done:,}", progress.total
    share = "" if not total else f" of {total:,} ({100 * progress.done / total:.0f} %)"
    message = "" if progress.message is None else f": {progress.message}"
    at = "" if progress.at is None else f", at {_moment(progress.at)}"
    return f"{done}{share}{message}{at}"


def _moment(at: datetime | None) -> str:
    return "" if at is None else at.isoformat(" ", "seconds")


def _print_outcome(action: jobs.Action, outcome: Outcome, *, dry_run: bool) -> None:
    done = f"would {action}" if dry_run else _DONE[action]
    if outcome.ids or not outcome.asked:
        click.echo(f"{done} {_jobs(outcome.ids)}")
    if outcome.asked:
        click.echo(f"asked {_jobs(outcome.asked)} to end")
    if outcome.left_alone:
        click.echo(f"left alone {_jobs(list(outcome.left_alone))}")
        for id, why in list(outcome.left_alone.items())[:_SHOWN_LEFT_ALONE]:
            click.echo(f"  {id}: {why}")


def _jobs(ids: Sequence[int]) -> str:
    """How many, and which where they are few: `2 jobs: 17, 18`."""
    if not ids:
        return "no jobs"
    listed = ", ".join(map(str, ids[:_SHOWN_LEFT_ALONE])) + (", …" if len(ids) > _SHOWN_LEFT_ALONE else "")
    return f"{len(ids)} job{'s' if len(ids) > 1 else ''}: {listed}"
