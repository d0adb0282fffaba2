"""What a runner does about jobs that block: watches its event loop, and has others places to run in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from greenjobs import threads
from greenjobs.annex import Annex
from greenjobs.config import Settings
from greenjobs.errors import ConfigError
from greenjobs.execution import attempt_in
from greenjobs.job import Job
from greenjobs.processes import Origin, Processes
from greenjobs.threads import Threads
from greenjobs.watchdog import Watchdog
from greenjobs.worker import Worker

logger = logging.getLogger(__name__)

# Once may be an accident.
_OFTEN = 3


def check_application(jobs: Iterable[Job[Any, Any]], application: str | None) -> None:
    """Raise ConfigError where jobs run in processes, and nobody says what these are to load."""
    for job in jobs:
        if job.policy.executor == "process" and application is None:
            raise ConfigError(
                f'the job {job.name!r} runs in processes of its own (executor="process"), which load the application '
                f"by its name, and none is named; name the module that declares the jobs: "
                f'greenjobs.configure(app="myapp.jobs"), the environment variable GREENJOBS_APP, or app under '
                f"[greenjobs] in setup.cfg; `greenjobs run` finds it by itself"
            )


class Blocking:
    """The event loop of a runner, and the threads and processes beside it."""

    def __init__(self, settings: Settings, jobs: Mapping[str, Job[Any, Any]], origin: Origin) -> None:
        self.loop = Watchdog(settings.max_blocking, find=attempt_in, on_held=self._note_held)
        self._jobs = jobs
        self._threads = Threads(settings.threads or threads.default_size())
        self._processes = Processes(settings.job_processes or os.cpu_count() or 1, origin)
        self._workers: Iterable[Worker] = ()
        self._moved: set[str] = set()

    def equip(self, workers: Iterable[Worker]) -> None:
        """Have these workers run jobs where they belong."""
        self._workers = tuple(workers)
        for name, job in self._jobs.items():
            annex: Annex | None = {"thread": self._threads, "process": self._processes}.get(job.policy.executor)
            if annex is not None:
                for worker in self._workers:
                    worker.run_elsewhere([name], annex)

    def start(self) -> None:
        """Begin to watch the loop, and start a first process if there are jobs for one."""
        self.loop.start()
        if any(job.policy.executor == "process" for job in self._jobs.values()):
            self._processes.start()

    def note_runner_ids(self) -> None:
        """The runner has one more id. Returns at once."""
        self._processes.note_runner_ids()

    def stop(self) -> None:
        """End all of it; blocks until the processes are gone."""
        self.loop.stop()
        self._threads.close()
        self._processes.close()

    def _note_held(self, job_type: str) -> None:
        job = self._jobs.get(job_type)
        if job is None or job.policy.on_blocking is None or job.name in self._moved:
            return
        names = [name for name, known in self._jobs.items() if known is job]
        count = sum(self.loop.held[name] for name in names)
        if count >= _OFTEN:
            self._moved.add(job.name)
            for worker in self._workers:
                worker.run_elsewhere(names, self._threads)
            logger.warning(
                "jobs of the type %s have held the event loop %s times: they run in threads from now on, in this "
                'process (on_blocking); declare them with @job(executor="thread") to have it so from the start',
                *(job.name, count),
                extra={"job_type": job.name},
            )
