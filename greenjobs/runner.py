"""One process at work: its queues, its session, and how it starts and stops.

A runner must not be started where gevent has not patched the process: jobs would wait one after the other, and none of
the promises about timing would hold. It says so instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gevent
import psycopg2
from gevent.event import Event
from gevent.lock import BoundedSemaphore

from greenjobs import config, green, inspection, migrate, pool, storage
from greenjobs.acknowledger import Acknowledger
from greenjobs.errors import ConfigError, DatabaseUnavailable, JobsFailed, NotPatched
from greenjobs.job import Job, Place, check_queue_name
from greenjobs.listener import Listener
from greenjobs.maintenance import Maintenance
from greenjobs.service import Service
from greenjobs.version import __version__
from greenjobs.worker import Worker

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

logger = logging.getLogger(__name__)

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
        self._jobs: dict[str, Job[Any, Any]] = {}
        self._queues: dict[str, dict[str, float]] = {}
        self._stops_when_empty = False

    def register(self, *jobs: Job[Any, Any]) -> Runner:
        """Let it run these jobs. A queue that is nobody's yet gets a pool of its own when the runner starts."""
        for job in jobs:
            if not isinstance(job, Job):
                raise ConfigError(f"register takes jobs, functions decorated with @job, not {job!r}")
            known = self._jobs.setdefault(job.name, job)
            if known is not job:
                raise ConfigError(f"two jobs are named {job.name!r}: {known!r} and {job!r}")
        return self

    def configure_queue(self, queue: str, *, pool: int | None = None, poll_interval: float | None = None) -> Runner:
        """Serve this queue, `pool` jobs at a time; look every `poll_interval` seconds for work that nobody announced.

        Once a queue is configured, only configured ones are served.
        """
        check_queue_name(queue, "queue", ConfigError)
        given = config.check({"pool": pool, "poll_interval": poll_interval})
        self._queues[queue] = {
            "pool": given.get("pool", self.settings.pool),
            "poll_interval": given.get("poll_interval", self.settings.poll_interval),
        }
        return self

    def shutdown_when_queue_empty(self) -> Runner:
        """Stop by itself when nothing waits that could run now. Jobs for later, retries included, are not waited for."""
        self._stops_when_empty = True
        return self

    def start(self) -> RunnerHandle:
        """Start; returns at once.

        Raises NotPatched, ConfigError, DatabaseUnavailable, or SchemaError when the tables are not there.
        """
        missing = green.missing_patches()
        if missing:
            raise NotPatched(
                f"not cooperative in this process: {', '.join(missing)}; start it with `greenjobs run`, or call "
                f"greenjobs.green.patch() before anything else is imported"
            )
        if not self._jobs:
            raise ConfigError("this runner has no jobs: register some, or name the module that declares them (--app)")
        queues = dict(self._queues)
        if not queues:
            for queue in sorted({job.queue for job in self._jobs.values()}):
                self.configure_queue(queue)
            queues, self._queues = self._queues, {}
        handle = RunnerHandle(self, queues, self._jobs)
        handle._start(stops_when_empty=self._stops_when_empty)
        return handle

    def check_for_failed_jobs(self) -> None:
        """Raise JobsFailed when jobs have failed at least once and are still there."""
        with pool.shared_pool(self.settings, self.database_url).connection() as connection:
            count = inspection.failed_count(connection)
        if count:
            raise JobsFailed(f"{count} jobs failed", count=count)


class RunnerHandle:
    """A runner that was started."""

    def __init__(self, runner: Runner, queues: dict[str, dict[str, float]], jobs: dict[str, Job[Any, Any]]) -> None:
        self.queues = queues
        self.job_types: Sequence[str] = sorted(jobs)
        self.home_queues: Mapping[str, str] = {name: job.queue for name, job in jobs.items()}
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.runner_id: int | None = None
        self._suspect: int | None = None
        self._service = Service(runner.database_url)
        self._acknowledger = Acknowledger(self._service, on_settled=self._settled)
        self._maintenance = Maintenance(self, self._service)
        self._listener = Listener(runner.database_url, self._register, self)
        self._shutdown_asked = Event()
        self._has_ended = Event()
        self._suspects = BoundedSemaphore()
        self._error: BaseException | None = None
        enqueue_pool = pool.shared_pool(runner.settings, runner.database_url)
        self.workers: Mapping[str, Worker] = {
            queue: Worker(
                Place(queue, runner.context, enqueue_pool),
                pool=int(options["pool"]),
                poll_interval=options["poll_interval"],
                read_ahead=runner.settings.read_ahead,
                jobs=jobs,
                service=self._service,
                acknowledger=self._acknowledger,
                runner_name=self.name,
            )
            for queue, options in queues.items()
        }

    def shutdown(self) -> None:
        """Begin to stop: claim nothing more, give back what has not started, let finish what runs. Returns at once."""
        self._shutdown_asked.set()

    def wait_for_shutdown(self, timeout: float | None = None) -> bool:
        """Block until the runner has ended, `timeout` seconds at most; whether it has. Raises what ended it early."""
        ended = bool(self._has_ended.wait(timeout))
        if self._error is not None:
            raise self._error
        return ended

    def running_jobs(self) -> int:
        """How many jobs run at this moment."""
        return sum(len(worker.running) for worker in self.workers.values())

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

    def notified(self, queue: str | None) -> None:
        """Pass a wake-up on."""
        if queue is None:
            self._maintenance.expect_due()
        elif queue in self.workers:
            self.workers[queue].wake()

    def held_ids(self) -> set[int]:
        """The jobs that were claimed here, the outcome of which is not in the database yet."""
        held = {row.id for worker in self.workers.values() for row in worker.held_rows()}
        return held | self._acknowledger.pending_ids()

    def claim_suspect(self, queue: str) -> None:
        """Take one job whose runner died from this queue, unless this runner holds such a job already."""
        with self._suspects:
            if self._suspect is None or self._suspect not in self.held_ids():
                self._suspect = self.workers[queue].claim_suspect()

    # --- life ---------------------------------------------------------------------------------------------------------

    def _start(self, *, stops_when_empty: bool) -> None:
        try:
            with self._service.pool.connection() as connection:
                migrate.require_current(connection)
            self._listener.start()
            self._maintenance.rescue()
            self._maintenance.route()
        except BaseException:
            self._close()
            raise
        for worker in self.workers.values():
            worker.start()
        self._maintenance.start()
        gevent.spawn(self._run, stops_when_empty)

    def _register(self, connection: Connection) -> int:
        return storage.register_runner(
            connection,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            queues=self.queues,
            job_types=self.job_types,
        )

    def _run(self, stops_when_empty: bool) -> None:
        try:
            if stops_when_empty:
                self._wait_until_empty()
            else:
                self._shutdown_asked.wait()
            self._drain()
        except BaseException as error:  # reported to whoever waits for the runner
            self._error = error
        finally:
            self._close()
            self._has_ended.set()

    def _wait_until_empty(self) -> None:
        while not self._shutdown_asked.wait(_EMPTY_LOOK_SECONDS):
            if not self._is_quiet():
                continue
            # Whatever is due, homeless or held by the dead may be run here, too; then one look that must find nothing.
            self._maintenance.promote_due()
            self._maintenance.route()
            self._maintenance.rescue()
            if not self._maintenance.look(list(self.workers)) and self._is_quiet():
                return

    def _is_quiet(self) -> bool:
        return all(worker.is_idle for worker in self.workers.values()) and not self._acknowledger.pending_ids()

    def _drain(self) -> None:
        logger.info("%s claims no more; %s jobs are still running", self.name, self.running_jobs())
        gevent.joinall([gevent.spawn(worker.stop_claiming) for worker in self.workers.values()])
        for worker in self.workers.values():
            worker.wait_until_done()
        self._acknowledger.wait_empty()
        self._maintenance.stop()
        if self.runner_id is not None:
            # The lock goes with the session. Ended in good order, nobody is blamed for what should turn up later.
            with contextlib.suppress(psycopg2.Error, DatabaseUnavailable):
                self._service.once(storage.end_runner, self.runner_id)

    def _close(self) -> None:
        self._maintenance.stop()
        self._listener.stop()
        self._acknowledger.stop()
        self._service.close()

    def _settled(self, jobs: set[int]) -> None:
        if self._suspect in jobs:
            self._suspect = None
            gevent.spawn(self._maintenance.look, list(self.workers))
