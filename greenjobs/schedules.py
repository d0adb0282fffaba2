"""Schedules: jobs that are enqueued by the clock.

A schedule is declared in code, with `@job(cron=…)`, or in the settings; or it is made at run time, here, and then lives
in the database until it is removed. Its ticks are enqueued by the runners that know the job, each tick once; see
greenjobs.scheduler.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from greenjobs import config, inspection, pool, storage
from greenjobs.cron import Timetable
from greenjobs.current import lender
from greenjobs.errors import ConfigError, OptionError, PayloadError, UnknownJob, UnknownSchedule
from greenjobs.inspection import Schedule
from greenjobs.job import Job, find_job
from greenjobs.refusals import explained

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

_NAME = re.compile(r"\S(?:.{0,198}\S)?")

_LINE = re.compile(
    r"(?P<name>[^:]+):\s+(?P<call>\S.*)\s+at\s+(?P<cron>[^;]+?)(?:\s+in\s+(?P<zone>[^\s;]+))?\s*(?P<rest>;.*)?"
)
_CALL = re.compile(r"(?P<job>[\w.:/-]+)\s*(?:\((?P<arguments>.*)\))?")
_LINE_FORM = (
    "NAME: JOB at CRON, or NAME: JOB(arguments) at CRON in ZONE; catch_up=all; overlap=false; queue=NAME; priority=5, "
    'such as `nightly: report(kind="full") at 30 2 * * * in Europe/Paris`'
)
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Declaration:
    """A schedule that is not in the database yet. `data` is the JSON text of its arguments."""

    name: str
    job: Job[Any, Any]
    timetable: Timetable
    data: str
    source: str
    queue: str | None = None
    priority: int | None = None

    def begun(self, now: datetime) -> storage.NewSchedule:
        """The row to be kept, the ticks of which begin after this instant: what was before is nothing it missed."""
        return storage.NewSchedule(
            name=self.name,
            job_type=self.job.name,
            cron=self.timetable.cron,
            timezone=self.timetable.timezone,
            data=self.data,
            queue=self.queue,
            priority=self.priority,
            catch_up=self.timetable.catch_up,
            overlap=self.timetable.overlap,
            source=self.source,
            next_tick_at=self.timetable.next_after(now),
        )


def add(
    job: Job[..., Any],
    *,
    name: str,
    cron: str,
    timezone: str = "UTC",
    args: Iterable[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    queue: str | None = None,
    priority: int | None = None,
    catch_up: str = "last",
    overlap: bool = True,
    connection: Any = None,
) -> None:
    """Enqueue `job(*args, **kwargs)` by the clock from now on, committed when this returns; with `connection`, as for
    `.options`, from when the caller commits.

    `name` is one's own; a schedule of that name that was made here before is replaced. `timezone`, `catch_up` and
    `overlap` are those of greenjobs.cron.Timetable; a queue or a priority that is not given is that of the job. With
    `connection`, a psycopg2 connection or cursor, the schedule is made in its transaction: there when that commits.

    Raises OptionError for what cannot be, and when a declared schedule has the name; TypeError and PayloadError as
    `.delay`; DatabaseUnavailable; SchemaError; AccessDenied.
    """
    if not isinstance(job, Job):
        raise OptionError(f"add takes a job, a function decorated with @job, not {job!r}")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(f"{job.name}: name is {name!r}; allowed: 1 to 200 characters in one line")
    try:
        timetable = Timetable(cron, timezone, catch_up, overlap)
    except ValueError as error:
        raise OptionError(f"the schedule {name!r} of {job.name}: {error}") from None
    job.options(queue=queue, priority=priority)  # which refuses what cannot be
    data = job.codec.encode(tuple(args), dict(kwargs or {}), max_bytes=config.current().max_payload_bytes)
    _check_overlap_key(job, data)
    new = Declaration(name, job, timetable, data, "api", queue, priority)
    with _connection(connection) as lent:
        if not storage.keep_schedule(lent, new.begun(inspection.now(lent))):
            raise OptionError(f"the schedule {name!r} is declared in code or settings; choose another name")


def remove(name: str) -> None:
    """Remove a schedule; jobs that it has enqueued stay.

    Raises UnknownSchedule; and OptionError for one that a live runner declares, for it would come back.
    """
    with _connection() as connection:
        known = _find(connection, name)
        if known.declarer_lives:
            raise OptionError(
                f"the schedule {name!r} is declared in the {known.source} of runner {known.declared_by}; take it out "
                f"there, or pause it"
            )
        if not storage.drop_schedule(connection, name, declared_by=known.declared_by):
            raise UnknownSchedule(f"the schedule {name!r} was changed by somebody else just now; look again")


def pause(name: str) -> None:
    """Let a schedule enqueue nothing until it is resumed, whoever declares it. Raises UnknownSchedule."""
    with _connection() as connection:
        _find(connection, name)
        storage.pause_schedule(connection, name, paused=True)


def resume(name: str) -> None:
    """Let a paused schedule go on with its next tick; those of the pause are not caught up. Raises UnknownSchedule."""
    with _connection() as connection:
        known = _find(connection, name)
        next_tick_at = Timetable(known.cron, known.timezone).next_after(inspection.now(connection))
        storage.pause_schedule(connection, name, paused=False, next_tick_at=next_tick_at)


def find() -> list[Schedule]:
    """All schedules in the database, by name."""
    with _connection() as connection:
        return inspection.schedules(connection)


def declared(jobs: Mapping[str, Job[Any, Any]], lines: Iterable[str]) -> dict[str, Declaration]:
    """The schedules of these jobs by name, from code and from the lines of the settings.

    A line for a job that is declared in this process, and not among these, is left out. Raises ConfigError.
    """
    found: dict[str, Declaration] = {}
    unique_jobs = {job.name: job for job in jobs.values()}.values()
    from_code = [declaration for job in unique_jobs for declaration in _of_code(job)]
    from_settings = [each for each in map(_read_line, lines) if jobs.get(each.job.name) is each.job]
    for declaration in (*from_code, *from_settings):
        if declaration.name in found:
            raise ConfigError(f"two schedules are named {declaration.name!r}; a job's own is named as the job")
        found[declaration.name] = declaration
    return found


def _of_code(job: Job[Any, Any]) -> Iterator[Declaration]:
    for name, timetable, data, queue, priority in job.schedules():
        yield Declaration(name, job, timetable, data, "code", queue, priority)


def _read_line(line: str) -> Declaration:
    """One line of the option `schedules`."""
    try:
        return _declaration(line)
    except (ValueError, TypeError, SyntaxError, UnknownJob, OptionError, PayloadError) as error:
        reason = str(error)
    raise ConfigError(f"schedules has the line {line!r}: {reason}")


def _declaration(line: str) -> Declaration:
    match = _LINE.fullmatch(line.strip())
    call = _CALL.fullmatch(match["call"]) if match else None
    if match is None or call is None:
        raise ValueError(f"the form is {_LINE_FORM}")
    job = find_job(call["job"])
    args, kwargs = _literals(call["arguments"] or "")
    options = _options(match["rest"] or "")
    priority = int(options.pop("priority")) if "priority" in options else None
    queue = options.pop("queue", None)
    job.options(queue=queue, priority=priority)  # which refuses what cannot be
    if "overlap" in options:
        options["overlap"] = _BOOLEANS.get(options["overlap"].lower(), options["overlap"])
    data = job.codec.encode(args, kwargs, max_bytes=config.current().max_payload_bytes)
    _check_overlap_key(job, data)
    timetable = Timetable(match["cron"], match["zone"] or "UTC", **options)
    return Declaration(match["name"].strip(), job, timetable, data, "settings", queue, priority)


def _literals(arguments: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, plain values as Python writes them; nothing is evaluated."""
    call = ast.parse(f"call({arguments})", mode="eval").body
    if not isinstance(call, ast.Call) or any(word.arg is None for word in call.keywords):
        raise ValueError(f"({arguments}) are no arguments of a call")
    args = tuple(ast.literal_eval(each) for each in call.args)
    return args, {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


def _options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        key, equals, value = map(str.strip, part.partition("="))
        if not equals or key in options or key not in ("catch_up", "overlap", "queue", "priority"):
            raise ValueError(f"{part!r} is none of its options, or is there twice; the form is {_LINE_FORM}")
        options[key] = value
    return options


def _check_overlap_key(job: Job[..., Any], data: str) -> None:
    """Raise OptionError where these arguments have no key, which every tick would."""
    if job.exclusion is not None:
        job.exclusion.key_of(data)


def _find(connection: Connection, name: str) -> Schedule:
    found = inspection.schedules(connection, name=name)
    if not found:
        known = ", ".join(repr(schedule.name) for schedule in inspection.schedules(connection)) or "none"
        raise UnknownSchedule(f"no schedule is named {name!r}; known: {known}")
    return found[0]


@contextlib.contextmanager
def _connection(given: Any = None) -> Iterator[Connection]:
    """The connection that a caller gave, to be committed there, or one that commits each statement."""
    own = lender(config.current()).connection() if given is None else contextlib.nullcontext(pool.raw_connection(given))
    with explained(), own as connection:
        try:
            yield connection
        except BaseException as error:
            pool.forget_if_broken(given, error)
            raise
