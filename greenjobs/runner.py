"""One process at work: its queues, its session, and how it starts and stops.

A runner must not be started where gevent has not patched the process: jobs would wait one after the other, and none of
the promises about timing would hold. It says so instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import gevent
import psycopg2
from gevent.event import Event
from gevent.lock import BoundedSemaphore

from greenjobs import companions, config, events, green, inspection, lending, logs, migrate, pool, storage, surroundings
from greenjobs.acknowledger import Acknowledger
from greenjobs.blocking import Blocking, check_application
from greenjobs.counting import Counting
from greenjobs.current import Place
from greenjobs.errors import ConfigError, DatabaseUnavailable, JobInterrupted, JobsFailed, NotPatched
from greenjobs.job import Job, check_queue_name
from greenjobs.lease import LEASE_SECONDS, Lease
from greenjobs.listener import Listener
from greenjobs.maintenance import Maintenance
from greenjobs.processes import Origin
from greenjobs.scheduler import Scheduler
from greenjobs.service import Service
from greenjobs.share import Share
from greenjobs.surroundings import Surrounding
from greenjobs.turns import Turns
from greenjobs.version import __version__
from greenjobs.worker import Worker

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from greenjobs.current import Attempt
    from greenjobs.inspection import QueueSetting
    from greenjobs.pool import ConnectionPool

logger = logging.getLogger(__name__)

R = TypeVar("R")

_CONNECT_SECONDS = 10.0

# How long interrupted jobs have to tidy up, and how long claims and outcomes may take at the end.
_TIDY_SECONDS = 5.0
_ANSWER_SECONDS = 10.0

# A runner that is to stop when its queues are empty asks itself this often.
_EMPTY_LOOK_SECONDS = 0.05


class Runner:
    """Runs the registered jobs from the queues of one database.

    `database_url` is taken from the settings when it is not given; `context` is handed to every job as
    `current_job.context`. The methods that configure return the runner, so that they can be chained.
    """

    def __init__(self, database_url: str | None = None, *, context: Any = None) -> None:
        self.settings = config.current()
        given = config.check({"database_url": database_url})
        self.database_url: str = given.get("database_url") or self.settings.require_database_url()
        self.context = context
        self.application = self.settings.app
        """What the processes of jobs are to load, as the setting `app` has it; "": what Flask would find."""
        self._jobs: dict[str, Job[Any, Any]] = {}
        self._queues: dict[str, dict[str, Any]] = {}
        self._slots = self.settings.share
        self._stops_when_empty = False
        self._surroundings: list[Surrounding] = []

    def register(self, *jobs: Job[Any, Any]) -> Runner:
        """Let it run these jobs, rows under their aliases included.

        A queue that is nobody's yet gets a pool of its own when the runner starts.
        """
        for job in jobs:
            if not isinstance(job, Job):
                raise ConfigError(f"register takes jobs, functions decorated with @job, not {job!r}")
            for name in (job.name, *job.aliases):
                known = self._jobs.setdefault(name, job)
                if known is not job:
                    raise ConfigError(f"two jobs are named {name!r}: {known!r} and {job!r}")
        return self

    def configure_queue(
        self,
        queue: str,
        *,
        pool: int | None = None,
        poll_interval: float | None = None,
        weight: float | None = None,
    ) -> Runner:
        """Serve this queue, `pool` jobs at a time; look every `poll_interval` seconds for work that nobody announced.

        Once a queue is configured, only configured ones are served. In a share, `pool` is the most slots that the queue
        may have, and `weight` its part of them, see `share`.
        """
        queue = check_queue_name(queue, "queue", ConfigError)
        try:
            given = config.check({"pool": pool, "poll_interval": poll_interval})
        except ConfigError as error:
            raise ConfigError(f"the queue {queue!r}: {error}") from None
        if weight is not None:
            given["weight"] = _checked_weight(weight, queue)
        self._queues[queue] = given
        return self

    def share(self, slots: int) -> Runner:
        """Run `slots` jobs of all configured queues together at a time, in place of a pool for each.

        Where no queue has a weight, they come in the order in which they were configured: a job starts only while none
        of a queue before its own waits. Where all have one, each queue gets slots in proportion to it while all have
        jobs waiting, and what one does not need is for the others.
        """
        self._slots = config.check({"share": slots}).get("share")
        return self

    def surround(self, make: Surrounding) -> Runner:
        """Enter `make()`, a context manager, around every attempt of every job; see greenjobs.surroundings."""
        self._surroundings.append(surroundings.checked(make))
        return self

    def shutdown_when_queue_empty(self) -> Runner:
        """Stop by itself when nothing waits that could run now; jobs for later, and retries, are not waited for."""
        self._stops_when_empty = True
        return self

    def start(self) -> RunnerHandle:
        """Start; returns at once.

        Raises NotPatched, ConfigError, DatabaseUnavailable, or SchemaError when the tables are not there.
        """
        handle = self.prepare()
        handle.start()
        return handle

    def prepare(self) -> RunnerHandle:
        """A handle that can be told to stop, and is not started yet. Raises NotPatched or ConfigError."""
        missing = green.missing_patches()
        if missing:
            raise NotPatched(
                f"not cooperative in this process: {', '.join(missing)}; start it with `greenjobs run`, or call "
                f"greenjobs.green.patch() before anything else is imported"
            )
        if not self._jobs:
            raise ConfigError("this runner has no jobs: register some, or name the module that declares them (--app)")
        queues = self._queues or {queue: {} for queue in sorted({job.queue for job in self._jobs.values()})}
        _check_share(self._slots, queues, are_configured=bool(self._queues))
        defaults = {
            "pool": self.settings.pool if self._slots is None else self._slots,
            "poll_interval": self.settings.poll_interval,
            **({} if self._slots is None else {"share": self._slots}),
        }
        complete = {queue: {**defaults, **given} for queue, given in queues.items()}
        check_application(self._jobs.values(), self.application)
        companions.meet(runs_jobs=True)
        around = (*surroundings.everywhere, *self._surroundings)
        return RunnerHandle(self, complete, self._jobs, stops_when_empty=self._stops_when_empty, surroundings=around)

    def check_for_failed_jobs(self) -> None:
        """Raise JobsFailed when jobs have failed at least once and are still there."""
        with pool.shared_pool(self.settings, self.database_url).connection() as connection:
            count = inspection.failed_count(connection)
        if count:
            raise JobsFailed(f"{count} jobs failed", count=count)


def _checked_weight(weight: object, queue: str) -> float:
    try:
        return config.queue_weight(weight)
    except ValueError:
        message = f"the queue {queue!r}: weight is {weight!r}; the value must be {config.WEIGHT_ALLOWED}."
    raise ConfigError(message)


def _check_share(slots: int | None, queues: Mapping[str, Mapping[str, Any]], *, are_configured: bool) -> None:
    """Raise ConfigError where a share, and what was said of the queues in it, do not go together."""
    weighted = [queue for queue, given in queues.items() if "weight" in given]
    if slots is None:
        if weighted:
            raise ConfigError(
                f"the queue {weighted[0]!r} has a weight, which says what it gets of the slots that queues share, and "
                f"there is no share; say how many jobs of all of them run at a time, such as --share 50"
            )
        return
    if not are_configured:
        raise ConfigError(
            f"share is {slots}, but the queues that share are not listed; name them in their order, as in "
            f"--queue critical --queue bulk, or with weights, as in --queue critical:weight=3 --queue bulk:weight=1"
        )
    if weighted and len(weighted) < len(queues):
        without = next(queue for queue in queues if queue not in weighted)
        raise ConfigError(
            f"the queue {weighted[0]!r} has a weight, and {without!r} has none; queues that share have all a weight, "
            f"or none and come in their order"
        )
    for queue, given in queues.items():
        if given.get("pool", 0) > slots:
            raise ConfigError(
                f"the queue {queue!r}: pool is {given['pool']}, but the queues share only {slots}; in a share, a pool "
                f"is the most that the queue may have of it"
            )


class RunnerHandle:
    """A runner that was prepared, or started."""

    def __init__(
        self,
        runner: Runner,
        queues: dict[str, dict[str, float]],
        jobs: dict[str, Job[Any, Any]],
        *,
        stops_when_empty: bool,
        surroundings: tuple[Surrounding, ...] = (),
    ) -> None:
        self._stops_when_empty = stops_when_empty
        self.queues = queues
        self.job_types: Sequence[str] = sorted(jobs)
        self.home_queues: Mapping[str, str] = {name: job.queue for name, job in jobs.items()}
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.runner_id: int | None = None
        self._suspect: int | None = None
        self.max_crashes = runner.settings.max_crashes
        self.keep_failed_seconds = runner.settings.keep_failed
        self.keep_counts_seconds = runner.settings.keep_counts
        self.gave_up_jobs = False
        """Whether jobs had to be interrupted when the runner ended."""
        self._settings = runner.settings
        self._service = Service(runner.database_url, on_standby=self._leave_standby)
        self._acknowledger = Acknowledger(self._service, on_settled=self._settled, spawn=self._spawn)
        self._counting = Counting(self._service, spawn=self._spawn)
        self._maintenance = Maintenance(self, self._service, spawn=self._spawn)
        self._turns = Turns(self, self._service)
        self._scheduler = Scheduler(jobs, runner.settings.schedules, self._service)
        self._database_url = runner.database_url
        self.session = "lock"
        """How this runner proves that it lives: by "lock", or by "lease"."""
        self._listener: Listener | Lease | None = None
        self._shutdown_asked = Event()
        self._hurry = Event()
        self._urgency = 0
        self._has_ended = Event()
        self._suspects = BoundedSemaphore()
        self._error: BaseException | None = None
        enqueue_pool = pool.shared_pool(runner.settings, runner.database_url)
        self.pools: Mapping[str, ConnectionPool] = {
            "runner": self._service.pool,
            "enqueue": enqueue_pool,
            "job": lending.job_pool(runner.settings, runner.database_url),
        }
        """The connections of this process to the database, by what they are for."""
        self.on_outcomes_written = self._acknowledger.on_written
        self._said_of_queues: Mapping[str, QueueSetting] = {}
        weights = [options["weight"] for options in queues.values() if "weight" in options]
        slots = next((options["share"] for options in queues.values() if "share" in options), None)
        self.share = None if slots is None else Share(int(slots), by_weight=bool(weights))
        self.workers: Mapping[str, Worker] = {
            queue: Worker(
                Place(
                    queue,
                    runner.context,
                    enqueue_pool,
                    runner_ids=self._service.runner_ids,
                    recorder=self._acknowledger.reporter,
                    surroundings=surroundings,
                ),
                pool=int(options["pool"]),
                poll_interval=options["poll_interval"],
                read_ahead=runner.settings.read_ahead,
                jobs=jobs,
                service=self._service,
                acknowledger=self._acknowledger,
                runner_name=self.name,
                spawn=self._spawn,
                share=self.share,
                weight=options.get("weight"),
            )
            for queue, options in queues.items()
        }
        origin = Origin(runner.application, runner.settings, runner.database_url, self.name, self._service.runner_ids)
        self._blocking = Blocking(runner.settings, jobs, origin)
        self._blocking.equip(self.workers.values())
        self.loop = self._blocking.loop
        """How the event loop does: `lag`, `max_lag` of the last minute, and `held`, how often it was, by job type."""
        for queue, worker in self.workers.items():
            self._counting.watch(queue, worker.tallies)

    def shutdown(self, *, urgency: int | None = None) -> None:
        """Begin to stop: claim nothing more, give back what has not started, let finish what runs. Returns at once.

        What still runs after `grace` seconds is interrupted and given back, which counts as no attempt. A second call
        interrupts at once; a third does not wait for jobs to tidy up either. `urgency` says which call this is to be
        (1, 2 or 3), for those who may hear of one wish in several ways.
        """
        self._urgency = self._urgency + 1 if urgency is None else max(self._urgency, urgency)
        self._shutdown_asked.set()
        self._hurry.set()

    def wait_for_shutdown(self, timeout: float | None = None) -> bool:
        """Block until the runner has ended, `timeout` seconds at most; whether it has. Raises what ended it early."""
        ended = bool(self._has_ended.wait(timeout))
        if self._error is not None:
            raise self._error
        return ended

    @property
    def slots(self) -> int:
        """How many jobs it runs at most at a time, of all its queues."""
        return self.share.slots if self.share is not None else sum(worker.pool for worker in self.workers.values())

    def running_jobs(self) -> int:
        """How many jobs run at this moment."""
        return sum(len(worker.running) for worker in self.workers.values())

    def finished_jobs(self) -> int:
        """How many jobs have run to their end here, well or not, since the runner was started."""
        return sum(worker.finished for worker in self.workers.values())

    @property
    def rescued_jobs(self) -> int:
        """How many jobs it has taken back from runners that died."""
        return self._maintenance.rescued

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop."""
        return bool(self._shutdown_asked.is_set())

    def wait_until_stopping(self, timeout: float | None = None) -> bool:
        """Block until the runner is told to stop, `timeout` seconds at most; whether it was."""
        return bool(self._shutdown_asked.wait(timeout))

    def attempts(self) -> list[Attempt]:
        """What runs at this moment."""
        return [attempt for worker in self.workers.values() for attempt in worker.running.values()]

    def ask(self, statement: Callable[[Connection], R]) -> R:
        """`statement(connection)`, on a connection of the runner's own; tried once."""
        return self._service.once(statement)

    def stacks(self) -> str:
        """Where every job of this runner stands at this moment, as text for people."""
        attempts = self.attempts()
        parts = [f"{self.name} runs {len(attempts)} jobs"]
        for attempt in attempts:
            seconds = time.perf_counter() - attempt.started
            stack = attempt.stack().rstrip()
            parts.append(f"job {attempt.row.id} ({attempt.job.name}), for {seconds:.1f} s\n{stack}")
        return "\n\n".join(parts)

    # --- what the listener says ---------------------------------------------------------------------------------------

    def session_began(self, runner: int) -> None:
        """Claim under this id from now on."""
        self.runner_id = runner
        for worker in self.workers.values():
            worker.claim_as(runner)

    def session_ended(self) -> None:
        """Claim nothing until there is another session."""
        self.runner_id = None
        for worker in self.workers.values():
            worker.claim_as(None)
        if self._settings.on_session_loss == "interrupt":
            self._interrupt("its runner lost the session that keeps others away from it")

    def notified(self, queue: str | None) -> None:
        """Pass a wake-up on."""
        if queue is None:
            self._maintenance.expect_due()
        elif queue in self.workers:
            self.workers[queue].wake()

    def queues_changed(self) -> None:
        """Somebody paused, resumed or resized a queue: read which."""
        self._maintenance.expect_changed_queues()

    def adjust_queues(self, settings: Mapping[str, QueueSetting]) -> None:
        """Pause, resume and resize the queues as is said of them."""
        for queue, worker in self.workers.items():
            setting = settings.get(queue, inspection.UNCHANGED)
            if setting == self._said_of_queues.get(queue, inspection.UNCHANGED):
                continue
            worker.adjust(paused=setting.paused, pool=setting.pool)
            now = "is paused" if setting.paused else "is not paused"
            logger.info("queue %s %s; %s of its jobs may run at a time", queue, now, worker.pool)
        self._said_of_queues = settings

    def cancel(self, job_id: int) -> None:
        """End this job, if it is here."""
        for worker in self.workers.values():
            worker.cancel(job_id)

    def held_ids(self) -> set[int]:
        """The jobs that were claimed here, the outcome of which is not in the database yet."""
        held = {row.id for worker in self.workers.values() for row in worker.held_rows()}
        return held | self._acknowledger.pending_ids()

    def claim_suspect(self, queue: str) -> None:
        """Take one job whose runner died from this queue, unless this runner holds such a job already."""
        with self._suspects:
            if self._suspect is None or self._suspect not in self.held_ids():
                self._suspect = self.workers[queue].claim_suspect()

    def note_failed(self, queue: str, job_type: str) -> None:
        """Count a job that failed because its runners died."""
        self._counting.note_failed(queue, job_type)

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start; see Runner.start. One that was told to stop meanwhile starts, and stops in good order."""
        logs.note_runner(self.name)
        try:
            with self._service.pool.connection() as connection:
                later = migrate.require_current(connection)
            if later:
                logger.warning(
                    "a later release has migrated the database (%s); this one works with that until it is replaced",
                    ", ".join(later),
                )
            self._begin_session()
            self._maintenance.read_queues()
            self._maintenance.rescue()
            self._maintenance.route()
            self._scheduler.start()
        except BaseException:
            self._close()
            raise
        self._blocking.start()
        for worker in self.workers.values():
            worker.start()
        self._maintenance.start()
        self._counting.start()
        gevent.spawn(self._run)

    def _begin_session(self) -> None:
        settings = self._settings
        url = settings.session_url or self._database_url
        if settings.session == "auto":
            connection = pool.connect(url, application_name="greenjobs session", timeout_seconds=_CONNECT_SECONDS)
            self.session = "lease" if connection.is_pooled else "lock"
            connection.close()
        else:
            self.session = settings.session
        self._listener = (Lease if self.session == "lease" else Listener)(url, self._register, self)
        self._listener.start()

    def _register(self, connection: Connection) -> int:
        return storage.register_runner(
            connection,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            queues=self.queues,
            job_types=self.job_types,
            former=tuple(self._service.runner_ids),
            # What it adopts is to be known as its own before anybody sees it: an outcome may be on its way.
            before_commit=self._note_runner_id,
            lease_seconds=LEASE_SECONDS if self.session == "lease" else None,
        )

    def _note_runner_id(self, runner: int) -> None:
        self._service.runner_ids.append(runner)
        self._blocking.note_runner_ids()

    def _leave_standby(self) -> None:
        if self._listener is not None:
            self._listener.restart()

    def _run(self) -> None:
        try:
            if self._stops_when_empty:
                self._wait_until_empty()
            else:
                self._shutdown_asked.wait()
            self._shutdown_asked.set()  # where nobody asked, because it is empty: it claims no more all the same
            self._drain()
        except BaseException as error:  # reported to whoever waits for the runner
            self._error = error
        finally:
            self._close()
            events.publish(events.RunnerEnded(self.name))
            self._has_ended.set()

    def _wait_until_empty(self) -> None:
        while not self._shutdown_asked.wait(_EMPTY_LOOK_SECONDS):
            if not self._is_quiet():
                continue
            # Whatever is due, homeless or held by the dead may be run here, too; then one look that must find nothing.
            self._maintenance.promote_due()
            self._maintenance.route()
            self._maintenance.rescue()
            served = [queue for queue, worker in self.workers.items() if not worker.is_paused]
            if not self._maintenance.look(served) and self._is_quiet():
                paused = [queue for queue in self.workers if queue not in served]
                if paused:
                    logger.warning("not waiting for what is in paused queues: %s", ", ".join(paused))
                return

    def _is_quiet(self) -> bool:
        return all(worker.is_idle for worker in self.workers.values()) and not self._acknowledger.pending_ids()

    def _drain(self) -> None:
        logger.info("%s claims no more; %s jobs are still running", self.name, self.running_jobs())
        for worker in self.workers.values():
            worker.stop_claiming()
        claims_answered = gevent.spawn(self._for_each_worker, Worker.wait_claimed)
        self._wait(claims_answered, _ANSWER_SECONDS, until_urgency=3)
        jobs_end = gevent.spawn(self._for_each_worker, Worker.wait_until_done)
        if not self._wait(jobs_end, self._settings.grace, until_urgency=2):
            self._interrupt("the runner is to stop")
            if not self._wait(jobs_end, _TIDY_SECONDS, until_urgency=3):
                logger.warning("%s jobs did not end when they were interrupted", self.running_jobs())
            self.gave_up_jobs = True
        outcomes_written = gevent.spawn(self._write_out)
        if not self._wait(outcomes_written, _ANSWER_SECONDS, until_urgency=3) and self._acknowledger.pending_ids():
            pending = len(self._acknowledger.pending_ids())
            logger.error("the database does not answer: the outcomes of %s jobs are lost, they will run again", pending)
        turns_passed = gevent.spawn(self._turns.wait)
        self._wait(turns_passed, _ANSWER_SECONDS, until_urgency=3)
        gevent.killall([claims_answered, jobs_end, outcomes_written, turns_passed])
        # Whatever could still claim has to end before the last look at what is held.
        self._end_greenlets()
        self._leave()

    def _write_out(self) -> None:
        self._acknowledger.wait_empty()
        self._counting.write()

    def _for_each_worker(self, wait: Callable[[Worker], None]) -> None:
        for worker in self.workers.values():
            wait(worker)

    def _end_greenlets(self) -> None:
        for worker in self.workers.values():
            worker.end()
        self._maintenance.stop()
        self._counting.stop()
        self._acknowledger.stop()
        self._turns.stop()
        # What is given back now may run elsewhere at once: here it must not go on in a process.
        self._blocking.stop()

    def _spawn(self, loop: Callable[[], None]) -> gevent.Greenlet[..., None]:
        greenlet = gevent.spawn(loop)
        greenlet.link_exception(self._fail)
        return greenlet

    def _fail(self, greenlet: gevent.Greenlet[..., None]) -> None:
        """End the runner because of an error that no repetition can mend."""
        logger.error("the runner cannot go on", exc_info=greenlet.exception)
        self._error = self._error or greenlet.exception
        self.shutdown()

    def _wait(self, greenlet: gevent.Greenlet[..., None], seconds: float, *, until_urgency: int) -> bool:
        """Wait for a greenlet to end, unless time or patience run out first; whether it has ended."""
        deadline = time.monotonic() + seconds
        while not greenlet.ready() and self._urgency < until_urgency:
            self._hurry.clear()
            left = deadline - time.monotonic()
            if left <= 0:
                break
            awaited: list[Any] = [greenlet, self._hurry]
            gevent.wait(awaited, timeout=left, count=1)
        return bool(greenlet.ready())

    def _interrupt(self, why: str) -> None:
        for worker in self.workers.values():
            worker.interrupt_all(lambda: JobInterrupted(why))

    def _leave(self) -> None:
        """Give back what is still held in the database's eyes, and end in good order: nobody is blamed for anything."""
        with contextlib.suppress(psycopg2.Error, DatabaseUnavailable):
            queues = self._service.once(storage.end_runners, self._service.runner_ids)
            if queues:
                self._service.once(storage.wake, queues)

    def _close(self) -> None:
        self._blocking.stop()
        self._scheduler.stop()
        self._maintenance.stop()
        self._counting.stop()
        if self._listener is not None:
            self._listener.stop()
        self._acknowledger.stop()
        self._turns.stop()
        self._service.close()

    def _settled(self, jobs: set[int]) -> None:
        if self._suspect in jobs:
            self._suspect = None
            gevent.spawn(self._maintenance.look, list(self.workers))
        self._turns.settled(jobs)
