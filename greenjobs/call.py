"""One call of a job: its options, how its arguments are encoded, and how it is enqueued.

Nothing here needs gevent, and psycopg2 is loaded with the first job that is enqueued.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextvars import Context
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar

from greenjobs import alchemy, companions, config, current, events
from greenjobs.current import database_rooms, joined, lender
from greenjobs.errors import AccessDenied, PayloadError, SchemaError
from greenjobs.handle import JobHandle, note_transaction
from greenjobs.holding import Held, Hold
from greenjobs.surroundings import Enqueue, around_enqueues, enqueuing
from greenjobs.uniqueness import Uniqueness

if TYPE_CHECKING:
    from greenjobs.overlap import Exclusion
    from greenjobs.payload import Codec
    from greenjobs.storage import NewJobs

P = ParamSpec("P")
R = TypeVar("R")

# As many jobs as go in one statement: 1,000 keep the statement under a few hundred kB and the round trips negligible.
BATCH_SIZE = 1000

# PostgreSQL's error codes.
_UNDEFINED_TABLE = "42P01"
_INSUFFICIENT_PRIVILEGE = "42501"


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What one call says beside its arguments; None leaves a thing to the job."""

    queue: str | None = None
    priority: int | None = None
    delay_seconds: float = 0.0
    run_at: datetime | None = None
    expires_seconds: float | None = None
    expires_at: datetime | None = None
    overrides: tuple[tuple[str, float | str | Mapping[str, str]], ...] = ()
    connection: Any = None
    uniqueness: Uniqueness | None = None  # resolved: that of the job, unless the call says otherwise
    independent: bool = False


class Enqueueable(Protocol):
    """What a call asks its job: `@job` makes these."""

    name: str
    priority: int
    codec: Codec
    keep: float
    exclusion: Exclusion | None
    expires_seconds: float | None

    @property
    def queue(self) -> str:
        """The queue it goes to unless a call says otherwise."""


class Call(Generic[P]):
    """A job with the options of one call, ready for its arguments."""

    __slots__ = ("_job", "_options")

    def __init__(self, job: Enqueueable, options: CallOptions) -> None:
        self._job = job
        self._options = options

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """As Job.delay."""
        settings = config.current()
        data = self._job.codec.encode(args, kwargs, max_bytes=settings.max_payload_bytes)
        return self._enqueue(settings, [data])[0]

    def delay_many(self, calls: Iterable[Any]) -> list[JobHandle]:
        """As Job.delay_many."""
        settings = config.current()
        encoded = self._encoded(settings, calls)
        return self._enqueue(settings, encoded) if encoded else []

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """As Job.adelay."""
        settings = config.current()
        data = self._job.codec.encode(args, kwargs, max_bytes=settings.max_payload_bytes)
        return (await _in_thread(self._enqueue, settings, [data]))[0]

    async def adelay_many(self, calls: Iterable[Any]) -> list[JobHandle]:
        """As Job.adelay_many."""
        settings = config.current()
        encoded = self._encoded(settings, calls)
        return await _in_thread(self._enqueue, settings, encoded) if encoded else []

    def _encoded(self, settings: config.Settings, calls: Iterable[Any]) -> list[str]:
        encode = self._job.codec.encode_item
        encoded = []
        for place, call in enumerate(calls):
            try:
                encoded.append(encode(call, max_bytes=settings.max_payload_bytes))
            except PayloadError as error:
                raise PayloadError(f"call {place} of {self._job.name}: {error}", path=error.path) from error
            except TypeError as error:
                raise TypeError(f"call {place} of {self._job.name}: {error}") from error
        return encoded

    def prepare(self, *args: P.args, **kwargs: P.kwargs) -> tuple[Any, NewJobs]:
        """What `delay` would enqueue, for a test that runs it without."""
        data = self._job.codec.encode(args, kwargs, max_bytes=config.current().max_payload_bytes)
        return self._job, self._new_jobs(database_rooms()[1], [data])

    def enqueue_data(self, data: str) -> JobHandle:
        """Enqueue a call whose arguments are JSON already."""
        return self._enqueue(config.current(), [data])[0]

    def enqueue_tick(self, data: str, *, tick_at: datetime, schedule: Mapping[str, str]) -> JobHandle:
        """The same for this tick of a schedule, which keeps the arguments; `schedule` is what `current_job.schedule` is
        to be.
        """
        overrides = (*self._options.overrides, ("tick_at", tick_at.isoformat()), ("schedule", schedule))
        call: Call[P] = Call(self._job, replace(self._options, overrides=overrides))
        # In a context of its own: what surrounds it takes two ticks of one loop for two things, not for one trace.
        return Context().run(call.enqueue_data, data)

    def _enqueue(self, settings: config.Settings, data: list[str]) -> list[JobHandle]:
        companions.meet()
        given = self._transaction(settings)
        if isinstance(given, Hold):
            held = Held(self._job.name, len(data), partial(self._enqueue_held, settings, data))
            given.take(held)
            return held.handles
        if not around_enqueues:
            handles = self._insert(settings, data, given)
        else:
            with enqueuing(Enqueue(self._job.name, self._queue, len(data))) as headers:
                handles = self._with_headers(headers)._insert(settings, data, given)
        if events.enqueue_handlers:
            count = sum(not handle.duplicate for handle in handles)
            if count:
                events.publish(events.JobsEnqueued(self._job.name, self._queue, count))
        return handles

    def _enqueue_held(self, settings: config.Settings, data: list[str], connection: Any) -> list[JobHandle]:
        options = replace(self._options, connection=connection, independent=connection is None)
        return Call(self._job, options)._enqueue(settings, data)

    @property
    def _queue(self) -> str:
        return self._options.queue if self._options.queue is not None else self._job.queue

    def _with_headers(self, headers: Mapping[str, str]) -> Call[P]:
        if not headers:
            return self
        overrides = (*self._options.overrides, ("headers", headers))
        return Call(self._job, replace(self._options, overrides=overrides))

    def _insert(self, settings: config.Settings, data: list[str], given: Any) -> list[JobHandle]:
        pool, storage = database_rooms()
        if current.stage is not None:  # in the tests of an application
            new = self._new_jobs(storage, data)
            handles: list[JobHandle] = current.stage.enqueue(self._job, new, connection=given)
            return handles
        try:
            if given is not None:
                connection = pool.raw_connection(given)
                # In autocommit every statement commits by itself, so all or nothing takes a single one.
                batches = self._batches(storage, data, len(data) if connection.autocommit else BATCH_SIZE)
                try:
                    two_phases = alchemy.is_in_two_phases(given)
                    enqueued = storage.enqueue_inside(connection, batches, in_two_phases=two_phases)
                except BaseException as error:
                    pool.forget_if_broken(given, error)
                    raise
            else:
                with lender(settings).connection() as connection, pool.bounded(settings.enqueue_timeout):
                    enqueued = storage.enqueue(connection, self._batches(storage, data, BATCH_SIZE))
        except Exception as error:
            code = getattr(error, "pgcode", None)
            if code == _INSUFFICIENT_PRIVILEGE:
                raise AccessDenied(
                    f"{self._job.name} was not enqueued: {str(error).strip()}; the owner of the tables can give the "
                    f"role the right to, with `greenjobs migrate --grant enqueue=ROLE`, or replace=ROLE as well where "
                    f"jobs replace, extend or merge with others"
                ) from error
            if code != _UNDEFINED_TABLE:
                raise
            place = connection.info
            raise SchemaError(
                f"{self._job.name} was not enqueued: the tables of greenjobs are not in the database {place.dbname!r} "
                f"on {place.host!r}, or not in a schema of its search_path; type `greenjobs migrate`"
            ) from error
        name = self._job.name
        handles = [JobHandle(id, name, action != "enqueued", action) for id, action in enqueued]
        if given is not None:
            note_transaction(handles, connection)
        return handles

    def _transaction(self, settings: config.Settings) -> Any:
        """What to enqueue on: what the call names, that in which the job that runs here completes, or the session of
        the application; None for a connection of ours. A Hold, where the application has jobs held."""
        if self._options.connection is not None:
            return self._options.connection
        if self._options.independent:
            return None
        given = joined()
        if given is None and current.ambient is not None and current.stage is None:
            given = current.ambient(lender(settings).database_url, self._job.name)
        return given

    def _batches(self, storage: Any, data: list[str], size: int) -> list[NewJobs]:
        return [self._new_jobs(storage, data[start : start + size]) for start in range(0, len(data), size)]

    def _new_jobs(self, storage: Any, data: list[str]) -> NewJobs:
        job, options = self._job, self._options
        # On the row, too, for those who end it and do not know the job.
        overrides = (("keep", job.keep), *options.overrides) if job.keep else options.overrides
        new: NewJobs = storage.NewJobs(
            job_type=job.name,
            data=data,
            queue=self._queue,
            priority=options.priority if options.priority is not None else job.priority,
            delay_seconds=options.delay_seconds,
            run_at=options.run_at,
            options=json.dumps(dict(overrides)) if overrides else None,
        )
        if job.exclusion is not None:
            key_of = job.exclusion.key_of
            new = new._replace(exclusive_key_of=lambda data: storage.exclusive_key(job.name, key_of(data)))
        if options.expires_at is not None:
            new = new._replace(expires_at=options.expires_at)
        elif options.expires_seconds is not None or job.expires_seconds is not None:
            new = new._replace(expires_seconds=options.expires_seconds or job.expires_seconds)
        return new if options.uniqueness is None else _with_keys(storage, new, options.uniqueness)


def _with_keys(storage: Any, new: NewJobs, rule: Uniqueness) -> NewJobs:
    identities = [rule.identity(one) for one in new.data]
    if not any(identities):
        return new
    return new._replace(
        unique_keys=[None if each is None else storage.unique_key(new.job_type, each) for each in identities],
        unique_rule=storage.UniqueRule(
            until_finished=rule.until_finished,
            window_seconds=rule.window_seconds,
            on_conflict=rule.on_conflict,
            merge=rule.merger(config.current().max_payload_bytes),
        ),
    )


async def _in_thread(call: Callable[..., R], *args: Any) -> R:
    import asyncio  # not at the top: it brings ssl along, and whoever awaits has it

    return await asyncio.to_thread(call, *args)
