"""`@job`, what it makes of a function, and which there are.

Nothing here needs gevent: a job is declared and enqueued in any server, thread or script.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar, overload

from greenjobs import config, expiry, keeping, policy
from greenjobs.call import Call, CallOptions
from greenjobs.cron import Timetable
from greenjobs.errors import (
    ConfigError,
    JobDefinitionError,
    OptionError,
    UnknownJob,
)
from greenjobs.events import Handler
from greenjobs.handle import JobHandle
from greenjobs.overlap import declared as declared_exclusion
from greenjobs.payload import Codec
from greenjobs.retry import Backoff
from greenjobs.uniqueness import MakeKey, Merge, OnConflict, UniqueSettings, Until

P = ParamSpec("P")
R = TypeVar("R")
J = TypeVar("J", bound="Job[Any, Any]")

HIGHEST_PRIORITY = 32767
LOWEST_PRIORITY = -32767  # PostgreSQL's smallint goes one further, but that one has no negation
LONGEST_DELAY_SECONDS = 100 * 365 * 24 * 60 * 60.0

_MOST_BYTES_OF_NO_ARGUMENTS = 2  # {}

_UNSAID = UniqueSettings()

_JOB_NAME = re.compile(r"[\w.:/-]{1,200}")


class JobSchedule(NamedTuple):
    """A schedule that a job brings along. `data` is the JSON text of its arguments; what is None is that of the job."""

    name: str
    timetable: Timetable
    data: str = "{}"
    queue: str | None = None
    priority: int | None = None


class Job(Generic[P, R]):
    """A function that can also be enqueued. Calling it calls the function, here and now."""

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None = None,
        queue: str | None = None,
        priority: int = 0,
        max_retries: int | None = None,
        unique: bool | Sequence[str] = False,
        unique_key: MakeKey | None = None,
        until: Until | None = None,
        on_conflict: OnConflict | None = None,
        merge: Merge | None = None,
        aliases: Iterable[str] = (),
        cron: str | Iterable[str] | None = None,
        timezone: str | None = None,
        catch_up: str | None = None,
        overlap: bool | None = None,
        overlap_key: str | Callable[..., str | int] | None = None,
        expires: float | timedelta | None = None,
        keep: float | timedelta | str | None = None,
        keep_result: bool = False,
        **attempts: Any,
    ) -> None:
        if not callable(function):
            raise JobDefinitionError(f"@job takes a function, or keyword arguments such as queue=…, not {function!r}")
        # First of all, because it also copies whatever attributes the function has, under any name.
        functools.update_wrapper(self, function)
        self.name = name if name is not None else getattr(function, "__name__", "")
        self.function = function
        self._queue = queue
        self.priority = priority
        self._max_retries = max_retries
        self.unique = unique
        self._check()
        self.aliases = _checked_aliases(aliases, self.name)
        self.policy = policy.declared(self.name, **attempts)
        self.expires_seconds = (
            None if expires is None else expiry.checked_seconds(self.name, expires, JobDefinitionError)
        )
        self.codec = Codec(function, job_name=self.name)
        self.exclusion = declared_exclusion(overlap, overlap_key, function, self.codec, job_name=self.name)
        self._unique_settings = UniqueSettings(unique, unique_key, until, on_conflict, merge)
        self.uniqueness = self._unique_settings.rule(self.name, self.codec)
        self.timetables = self._read_timetables(
            cron, overlap=self.exclusion is None, timezone=timezone, catch_up=catch_up
        )
        self.keep = 0.0 if keep is None else keeping.checked_keep(self.name, keep, JobDefinitionError)
        self.results = self._read_results(keep_result)
        self._plain_call: Call[P] = Call(self, CallOptions(uniqueness=self.uniqueness))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<job {self.name} of {self.function.__module__}.{self.function.__qualname__}>"

    @property
    def queue(self) -> str:
        """The queue it goes to unless a call says otherwise."""
        return self._queue if self._queue is not None else config.current().default_queue

    @property
    def max_retries(self) -> int:
        """How often it is tried again after a failure; then it stays as failed."""
        return self._max_retries if self._max_retries is not None else config.current().max_retries

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """Enqueue a call, committed when this returns.

        Raises TypeError when the function could not be called so, PayloadError when an argument cannot be stored,
        DatabaseUnavailable when the database does not take it within `enqueue_timeout` seconds, and SchemaError when it
        has not been migrated.
        """
        return self._plain_call.delay(*args, **kwargs)

    def delay_many(self, calls: Iterable[Any]) -> list[JobHandle]:
        """Enqueue many calls, all of them or none: each a tuple of positional arguments, a dict of keyword arguments,
        or the job's dataclass. One round trip per thousand; handles in the order of the calls.
        """
        return self._plain_call.delay_many(calls)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """As delay, for coroutines of asyncio: the event loop goes on while a thread waits for the database.

        The arguments are encoded before that. A call that is cancelled meanwhile may have been enqueued all the same.
        """
        return await self._plain_call.adelay(*args, **kwargs)

    async def adelay_many(self, calls: Iterable[Any]) -> list[JobHandle]:
        """As delay_many, for coroutines; see adelay."""
        return await self._plain_call.adelay_many(calls)

    def options(
        self,
        *,
        queue: str | None = None,
        priority: int | None = None,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        expires: float | timedelta | datetime | None = None,
        max_retries: int | None = None,
        timeout: float | timedelta | None = None,
        hard_timeout: float | timedelta | None = None,
        unique: bool | Sequence[str] | None = None,
        unique_key: MakeKey | None = None,
        until: Until | None = None,
        on_conflict: OnConflict | None = None,
        keep: float | timedelta | str | None = None,
        connection: Any = None,
        independent: bool = False,
    ) -> Call[P]:
        """Options for one call: `job.options(priority=10, delay=60).delay(…)`.

        `delay` is in seconds; `run_at` is an aware datetime; `expires` is in seconds from when the job is due, or an
        aware datetime; `max_retries`, the timeouts, `keep`, and what makes it unique are as for @job. With
        `connection`, a psycopg2 connection or cursor, or a SQLAlchemy Connection or Session, the job is inserted in its
        transaction: there when that commits, gone when it rolls back. With `independent`, it joins no transaction, nor
        the session of a Flask application. Raises OptionError.
        """
        if delay is not None and run_at is not None:
            raise OptionError(f"{self.name}: give delay or run_at, not both")
        if not isinstance(independent, bool):
            raise OptionError(f"{self.name}: independent is {independent!r}; allowed: True or False")
        if independent and connection is not None:
            raise OptionError(f"{self.name}: give connection or independent, not both")
        if queue is not None:
            queue = check_queue_name(queue, f"{self.name}: queue", OptionError)
        if priority is not None:
            _check_priority(priority, self.name, OptionError)
        try:
            checked_retries = config.check({"max_retries": max_retries}).get("max_retries")
        except ConfigError as error:
            raise OptionError(f"{self.name}: {error}") from None
        soft, hard = policy.checked_timeouts(self.name, timeout, hard_timeout, OptionError)
        uniqueness = self.uniqueness
        unique_settings = UniqueSettings(unique, unique_key, until, on_conflict)
        if unique_settings != _UNSAID:
            uniqueness = self._unique_settings.overridden(unique_settings).rule(self.name, self.codec, OptionError)
        aware_run_at = None if run_at is None else _aware(run_at, self.name)
        expires_seconds, expires_at = expiry.of_call(self.name, expires, aware_run_at)
        overrides = {"max_retries": checked_retries, "timeout": soft, "hard_timeout": hard}
        overrides["keep"] = None if keep is None else keeping.checked_keep(self.name, keep, OptionError)
        return Call(
            self,
            CallOptions(
                overrides=tuple((name, value) for name, value in overrides.items() if value is not None),
                queue=queue,
                priority=priority,
                delay_seconds=0.0 if delay is None else _seconds(delay, self.name),
                run_at=aware_run_at,
                expires_seconds=expires_seconds,
                expires_at=expires_at,
                connection=connection,
                uniqueness=uniqueness,
                independent=independent,
            ),
        )

    def schedules(self) -> Iterator[JobSchedule]:
        """The schedules that code declares for it; asked for by each runner that starts."""
        for timetable in self.timetables:
            yield JobSchedule(self.name if len(self.timetables) == 1 else f"{self.name} {timetable.cron}", timetable)

    def _check(self) -> None:
        if not isinstance(self.name, str) or not _JOB_NAME.fullmatch(self.name):
            raise JobDefinitionError(
                f"the job name {self.name!r} is not one: 1 to 200 letters, digits, '_', '.', ':', '/' or '-'; "
                f"set it with @job(name=…)"
            )
        if self._queue is not None:
            self._queue = check_queue_name(self._queue, f"{self.name}: queue", JobDefinitionError)
        _check_priority(self.priority, self.name, JobDefinitionError)
        try:
            self._max_retries = config.check({"max_retries": self._max_retries}).get("max_retries")
        except ConfigError as error:
            raise JobDefinitionError(f"{self.name}: {error}") from None

    def _read_results(self, keep_result: object) -> keeping.ResultCodec | None:
        if not isinstance(keep_result, bool):
            raise JobDefinitionError(f"{self.name}: keep_result is {keep_result!r}; allowed: True or False")
        if keep_result and not self.keep:
            raise JobDefinitionError(
                f"{self.name}: keep_result is for jobs that are kept; say how long, as in @job(keep='1 day')"
            )
        return keeping.ResultCodec(self.function, job_name=self.name) if keep_result else None

    def _read_timetables(
        self, cron: str | Iterable[str] | None, *, overlap: bool, **options: Any
    ) -> tuple[Timetable, ...]:
        given = {name: value for name, value in options.items() if value is not None}
        if cron is None:
            if given:
                raise JobDefinitionError(f"{self.name}: {next(iter(given))} is for jobs with cron, and this has none")
            return ()
        expressions = (cron,) if isinstance(cron, str) else tuple(cron) if isinstance(cron, Iterable) else ()
        if not expressions:
            raise JobDefinitionError(f"{self.name}: cron is {cron!r}; allowed: an expression, or a list of them")
        try:
            timetables = tuple(Timetable(expression, overlap=overlap, **given) for expression in expressions)
        except ValueError as error:
            raise JobDefinitionError(f"{self.name}: {error}") from None
        try:
            self.codec.encode((), {}, max_bytes=_MOST_BYTES_OF_NO_ARGUMENTS)
        except TypeError as error:
            raise JobDefinitionError(
                f"{self.name}: cron enqueues it without arguments, but {error}; give the arguments with "
                f"greenjobs.schedules.add(…) or in the settings instead, or give the parameters defaults"
            ) from None
        return timetables


@overload
def job(function: Callable[P, R], /) -> Job[P, R]: ...


@overload
def job(
    *,
    name: str | None = None,
    queue: str | None = None,
    priority: int = 0,
    max_retries: int | None = None,
    unique: bool | Sequence[str] = False,
    unique_key: MakeKey | None = None,
    until: Until | None = None,
    on_conflict: OnConflict | None = None,
    merge: Merge | None = None,
    aliases: Iterable[str] = (),
    cron: str | Iterable[str] | None = None,
    timezone: str | None = None,
    catch_up: str | None = None,
    overlap: bool | None = None,
    overlap_key: str | Callable[..., str | int] | None = None,
    expires: float | timedelta | None = None,
    keep: float | timedelta | str | None = None,
    keep_result: bool = False,
    backoff: Backoff | Sequence[float] | float | None = None,
    retry_on: policy.ErrorTypes | None = None,
    discard_on: policy.ErrorTypes = (),
    timeout: float | timedelta | None = None,
    hard_timeout: float | timedelta | None = None,
    on_failure: Handler | None = None,
    on_discard: Handler | None = None,
    keep_log: bool | int = False,
    executor: policy.Where = "greenlet",
    on_blocking: Literal["thread"] | None = None,
) -> Callable[[Callable[P, R]], Job[P, R]]: ...


def job(function: Callable[..., Any] | None = None, /, **settings: Any) -> Any:
    """Make a plain synchronous function a job: `@job`, or `@job(queue="emails")`.

    `name` is what rows call it (default: the function's name; keep it when the function is renamed or moves);
    `priority` is larger for earlier, -32767 to 32767; `max_retries` counts tries after the first; `aliases` are names
    that it had before, whose rows it runs, too.

    With `unique`, a call with the same arguments, or the same of those that it names, is not enqueued again; nor, with
    `unique_key`, a text such as "report-{number}" or a function of the arguments, one with the same key. That is so
    `until` the first one has "started" (the default) or "finished", or for so many seconds. `on_conflict` is what then
    becomes of the first if it waits: "keep", "replace", "extend" or "merge", which calls `merge` with both.

    `backoff` says when a failed job runs again, see greenjobs.retry; `retry_on` are the errors after which it does
    (default: all), `discard_on` those that end it quietly. After `timeout` seconds JobTimeout is raised in it, after
    `hard_timeout` JobHardTimeout. `on_failure` and `on_discard` are called with an AttemptEnded when it comes to that.
    With `keep_log`, True or a number, the newest lines of `current_job.log` are kept with the job.

    `executor` is where it runs: in a "greenlet" of the event loop, which it shares with others; in a "thread"; or in a
    "process", for what blocks or computes. With on_blocking="thread" it is moved to threads when it often blocks.

    Raises JobDefinitionError, when the module is imported.

    `cron` enqueues it by the clock, without arguments: an expression such as "*/5 * * * *", or a list of them, in
    `timezone` (default: UTC). `catch_up` ("none", "last" or "all"; default: "last") is for ticks that came while no
    runner was there; with overlap=False a tick is left out while the job of the one before waits or runs.

    With overlap=False one job of the type at most runs at any time over all runners, or one of each `overlap_key`: a
    format string over the parameters, or a function of the arguments. A job that has not begun `expires` seconds after
    it was due is discarded.

    With `keep`, seconds or a text such as "7 days", a job that is done, discarded or cancelled stays for so long in the
    history; with `keep_result` what it returned, too, as JSON.
    """
    if function is None:
        return lambda decorated: register(Job(decorated, **settings))
    return register(Job(function))


before_listing: list[Callable[[], None]] = []
"""Called by registered_jobs: set by greenjobs.contrib, where modules of jobs are imported no earlier than that."""

# By name and by alias.
_registry: dict[str, Job[Any, Any]] = {}


def registered_jobs() -> dict[str, Job[Any, Any]]:
    """All jobs declared in this process, by name; each is there once, whatever other names it has."""
    for declare in tuple(before_listing):
        declare()
    return {name: job for name, job in _registry.items() if name == job.name}


def find_job(name: str) -> Job[Any, Any]:
    """The job of that name, or that had it before; raises UnknownJob."""
    try:
        return _registry[name]
    except KeyError:
        known = ", ".join(sorted(_registry)) or "none"
        raise UnknownJob(f"no job is named {name!r} here; known: {known}") from None


def register(new: J) -> J:
    """Declare a job of a class of one's own, as `@job` does. Raises JobDefinitionError when its name is taken."""
    for name in (new.name, *new.aliases):
        known = _registry.get(name)
        # The same function again, under the same name: its module was reloaded, or is both __main__ and itself.
        if known is not None and (known.name != new.name or _origin(known) != _origin(new)):
            raise JobDefinitionError(
                f"two jobs are named {name!r}: {known!r} and {new!r}; give one of them another with @job(name=…), "
                f"or take the name out of the aliases of one"
            )
    former = _registry.get(new.name)
    for alias in former.aliases if former is not None else ():
        del _registry[alias]
    _registry.update(dict.fromkeys((new.name, *new.aliases), new))
    keeping.register((new.name, *new.aliases), new.results)
    return new


def _origin(job: Job[Any, Any]) -> tuple[str, str]:
    code = getattr(job.function, "__code__", None)
    return (code.co_filename if code else repr(job.function), job.function.__qualname__)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_queue_name(queue: object, where: str, error: type[Exception]) -> str:
    """The name, if it is one; else raises `error`, whose message begins with `where`."""
    try:
        return config.queue_name(queue)
    except ValueError:
        raise error(f"{where} is {queue!r}; allowed: {config.OPTIONS['default_queue'].allowed}") from None


def _checked_aliases(aliases: object, name: str) -> tuple[str, ...]:
    if isinstance(aliases, str) or not isinstance(aliases, Iterable):
        raise JobDefinitionError(f"{name}: aliases is {aliases!r}; allowed: a list of names that the job had before")
    names = tuple(aliases)
    for alias in names:
        if not isinstance(alias, str) or not _JOB_NAME.fullmatch(alias):
            raise JobDefinitionError(
                f"{name}: the alias {alias!r} is no job name: 1 to 200 letters, digits, '_', '.', ':', '/' or '-'"
            )
        if alias == name:
            raise JobDefinitionError(f"{name}: the alias {alias!r} is its name; leave it out")
    return tuple(dict.fromkeys(names))


def _check_priority(priority: object, name: str, error: type[Exception]) -> None:
    if type(priority) is not int or not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        raise error(f"{name}: priority is {priority!r}; allowed: {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}")


def _seconds(delay: object, name: str) -> float:
    seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise OptionError(f"{name}: delay is {delay!r}; allowed: a number of seconds, or a timedelta")
    # NaN is refused, too: no comparison holds for it.
    if not 0 <= seconds <= LONGEST_DELAY_SECONDS:
        raise OptionError(f"{name}: delay is {delay!r}; allowed: 0 to {LONGEST_DELAY_SECONDS:.0f} seconds")
    return float(seconds)


def _aware(run_at: object, name: str) -> datetime:
    if not isinstance(run_at, datetime):
        raise OptionError(f"{name}: run_at is {run_at!r}; allowed: an aware datetime")
    if run_at.utcoffset() is None:
        raise OptionError(
            f"{name}: run_at is {run_at!r}, which has no time zone; "
            f"use an aware one, such as datetime.now(timezone.utc) + timedelta(hours=1)"
        )
    return run_at
