"""Metrics for Prometheus, in the default registry of prometheus_client.

Importing this counts what the process enqueues: all that a web application needs, whose own /metrics then shows it.
`watch` measures a runner as well; `greenjobs run` calls it where its metrics are asked for. `render` is the answer to a
scrape: of this process, or of all processes of a supervisor, which share a folder (PROMETHEUS_MULTIPROC_DIR).

A job costs its runner no more than one look into a dict and some additions here: what was measured is handed to
prometheus_client once a second, and before a scrape. What is the same for every runner, for it is in the database, is
read at the time of a scrape, and kept for a few seconds.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import psycopg2
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as generate
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from greenjobs import events, inspection
from greenjobs.errors import GreenjobsError
from greenjobs.events import JobsEnqueued, Outcome
from greenjobs.metrics_folder import FOLDER
from greenjobs.version import __version__

if TYPE_CHECKING:
    import gevent

    from greenjobs.execution import Meter
    from greenjobs.inspection import QueueStatus
    from greenjobs.pool import ConnectionPool
    from greenjobs.runner import RunnerHandle

__all__ = ["Watch", "render", "watch"]

logger = logging.getLogger(__name__)

# From what a cached look-up takes to what a long report does, in seconds.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
STATEMENT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_REFRESH_SECONDS = 1.0

# What the database says counts for so long; longer where it took long to say, so that no more than a twentieth of the
# time goes into counting rows.
_FRESH_SECONDS = 5.0
_FRESH_SHARE = 20

# A scrape waits no longer for that: a supervisor gives up after 6 s, and Prometheus after 10 s, unless told otherwise.
_PATIENCE_SECONDS = 5.5

_STATES = ("available", "running", "scheduled", "failed")
_OUTCOMES_SHOWN_AT_ONCE = ("done", "retried", "failed")

_BY_JOB = ["job_type", "queue"]

ENQUEUED = Counter(
    "greenjobs_jobs_enqueued", "Jobs that this process enqueued; in a transaction, whether it commits or not", _BY_JOB
)


@functools.cache
def _enqueued(job_type: str, queue: str) -> Counter:
    return ENQUEUED.labels(job_type, queue)


def _note_enqueued(event: JobsEnqueued) -> None:
    _enqueued(event.job_type, event.queue).inc(event.count)


events.subscribe(_note_enqueued, JobsEnqueued)


# --- the answer to a scrape -------------------------------------------------------------------------------------------


def render() -> tuple[str, bytes]:
    """The content type and the text of all metrics there are: those of the application, too.

    Where processes share a folder, of all of them; what is in the database is added once.
    """
    for each in _watches:
        each.flush()
    if _watches:
        _runner_metrics().refresh(_watches)
    if not os.environ.get(FOLDER):
        return CONTENT_TYPE_LATEST, generate(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(_database)
    return CONTENT_TYPE_LATEST, generate(registry)


# --- one runner -------------------------------------------------------------------------------------------------------


def watch(handle: RunnerHandle) -> Watch:
    """Measure this runner, prepared or started, until `stop` is called."""
    metrics = _runner_metrics()
    started = Watch(handle, metrics)
    _watches.append(started)
    started.begin()
    return started


class _Durations:
    """Of many attempts, before they are added to a histogram: which bucket they fall into, and their sum."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0

    def add_to(self, histogram: Histogram) -> None:
        """Add them, and begin anew."""
        counts, seconds = self.counts, self.seconds
        self._clear()
        # It has no method for more than one observation at a time.
        for bucket, count in zip(histogram._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        if seconds:
            histogram._sum.inc(seconds)


class _Series:
    """What was measured of one job type in one queue, and not yet handed on."""

    __slots__ = ("ended", "outcomes", "run", "started", "waited")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.run = _Durations()
        self.waited = _Durations()
        self.ended = 0
        self.started = 0
        """How many were counted as started so far: those that have ended and those that run."""

    def meter(self, outcome: Outcome, run_seconds: float, waited_seconds: float) -> None:
        """Measure one attempt."""
        outcomes = self.outcomes
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        waited = self.waited
        waited.counts[bisect_left(BUCKETS, waited_seconds)] += 1
        waited.seconds += waited_seconds
        if outcome != "expired":  # which has not run
            self.ended += 1
            run = self.run
            run.counts[bisect_left(BUCKETS, run_seconds)] += 1
            run.seconds += run_seconds


class _Meters(dict[str, "Meter"]):
    """The meters of one queue by job type, made at first use: of every type in every queue there would be many."""

    def __init__(self, series: dict[tuple[str, str], _Series], queue: str) -> None:
        super().__init__()
        self._series = series
        self._queue = queue

    def __missing__(self, job_type: str) -> Meter:
        series = self._series.setdefault((job_type, self._queue), _Series())
        meter = self[job_type] = series.meter
        return meter


class Watch:
    """The measuring of one runner. Made by `watch`."""

    def __init__(self, handle: RunnerHandle, metrics: _RunnerMetrics) -> None:
        self.handle = handle
        self._metrics = metrics
        self._series: dict[tuple[str, str], _Series] = {}
        self._rescued = 0
        self._waits: dict[str, tuple[int, int, float]] = {}
        self._greenlets: list[gevent.Greenlet[..., None]] = []

    def begin(self) -> None:
        """Listen, and hand on once a second what was measured."""
        import gevent

        for job_type, queue in self.handle.home_queues.items():
            if queue in self.handle.workers:
                self._metrics.show(job_type, queue)
        for queue, worker in self.handle.workers.items():
            worker.measure(_Meters(self._series, queue))
        self.handle.on_outcomes_written.append(self._metrics.acknowledge_seconds.observe)
        self._greenlets = [gevent.spawn(self._refresh_for_ever)]

    def stop(self) -> None:
        """Hand on what is left, and measure no more."""
        import gevent

        gevent.killall(self._greenlets)
        for worker in self.handle.workers.values():
            worker.measure(None)
        self.handle.on_outcomes_written.remove(self._metrics.acknowledge_seconds.observe)
        self.flush()
        _watches.remove(self)
        self._metrics.refresh(_watches)

    def flush(self) -> None:
        """Hand on what only grows: counts and durations."""
        metrics = self._metrics
        running = self._count_running()
        for key in running.keys() - self._series.keys():
            self._series[key] = _Series()
        for key, series in list(self._series.items()):
            outcomes, series.outcomes = series.outcomes, {}
            for outcome, count in outcomes.items():
                metrics.ended.labels(*key, outcome).inc(count)
            if outcomes:
                series.run.add_to(metrics.run_seconds.labels(*key))
                series.waited.add_to(metrics.wait_seconds.labels(*key))
            started = series.ended + running.get(key, 0)
            # Never less: of those that run one may turn out to have expired.
            if started > series.started:
                metrics.started.labels(*key).inc(started - series.started)
                series.started = started
        rescued = self.handle.rescued_jobs
        metrics.rescued.inc(rescued - self._rescued)
        self._rescued = rescued
        for name, pool in self.handle.pools.items():
            self._flush_waits(name, pool)

    def _flush_waits(self, name: str, pool: ConnectionPool) -> None:
        waits = pool.waits
        now = (waits.count, waits.given_up, waits.total_seconds)
        before = self._waits.get(name, (0, 0, 0.0))
        self._waits[name] = now
        counters = self._metrics.connection_waits, self._metrics.connections_given_up, self._metrics.connection_seconds
        for counter, new, old in zip(counters, now, before, strict=True):
            counter.labels(name).inc(max(new - old, 0))

    def _count_running(self) -> dict[tuple[str, str], int]:
        running: dict[tuple[str, str], int] = {}
        for queue, worker in self.handle.workers.items():
            for attempt in worker.running.values():
                key = (attempt.row.job_type, queue)
                running[key] = running.get(key, 0) + 1
        return running

    def _refresh_for_ever(self) -> None:
        import gevent

        while True:
            gevent.sleep(_REFRESH_SECONDS)
            self.flush()
            self._metrics.refresh(_watches)


_watches: list[Watch] = []
"""Those that measure at this moment."""


class _RunnerMetrics:
    """The metrics of runners; made for the first one of a process, so that web applications do not show them."""

    def __init__(self) -> None:
        self.started = Counter("greenjobs_attempts_started", "Attempts of jobs that began", _BY_JOB)
        self.ended = Counter("greenjobs_attempts_ended", "Attempts of jobs that ended, by how", [*_BY_JOB, "outcome"])
        self.run_seconds = Histogram(
            "greenjobs_attempt_run_seconds", "How long an attempt of a job ran", _BY_JOB, buckets=BUCKETS
        )
        self.wait_seconds = Histogram(
            "greenjobs_job_wait_seconds",
            "How long a job had waited when it was claimed, from when it was due",
            _BY_JOB,
            buckets=BUCKETS,
        )
        self.acknowledge_seconds = Histogram(
            "greenjobs_acknowledge_seconds",
            "How long it took to write the outcomes of a group of jobs",
            buckets=STATEMENT_BUCKETS,
        )
        self.rescued = Counter("greenjobs_rescued", "Jobs that were taken back from runners that died")
        self.loop_held = Counter(
            "greenjobs_loop_held", "How often the event loop was held up for long, by the job at fault", ["job_type"]
        )
        self.connection_waits = Counter(
            "greenjobs_connection_waits", "How often somebody waited because all connections were busy", ["pool"]
        )
        self.connections_given_up = Counter(
            "greenjobs_connection_waits_given_up", "How often somebody waited for a connection in vain", ["pool"]
        )
        self.connection_seconds = Counter(
            "greenjobs_connection_wait_seconds", "How long all who waited for a connection waited together", ["pool"]
        )
        self._slots = self._gauge("greenjobs_slots", "How many jobs may run at a time", ["queue"])
        self._slots_in_use = self._gauge("greenjobs_slots_in_use", "How many jobs run", ["queue"])
        self._read_ahead = self._gauge("greenjobs_read_ahead", "Jobs that were claimed and have not started", ["queue"])
        self._connections = self._gauge(
            "greenjobs_connections_limit", "The most connections that may be open", ["pool"]
        )
        self._connections_in_use = self._gauge("greenjobs_connections_in_use", "Connections that are lent", ["pool"])
        self._info = self._gauge(
            "greenjobs_runner_info", "Runners by what they are", ["version", "python_version", "session"]
        )
        self._lag = self._gauge(
            "greenjobs_loop_lag_seconds", "How late the event loop was at worst in the last minute", mode="livemax"
        )
        self._shown: dict[tuple[Gauge, tuple[str, ...]], float] = {}
        events.subscribe(lambda event: self.loop_held.labels(event.job_type or "").inc(), events.LoopHeld)
        if not os.environ.get(FOLDER):
            REGISTRY.register(_database)

    def _gauge(self, name: str, text: str, labels: Iterable[str] = (), *, mode: Any = "livesum") -> Gauge:
        return Gauge(name, text, labels, multiprocess_mode=mode)

    def show(self, job_type: str, queue: str) -> None:
        """Let the series of this job be there from the beginning, with 0: the first increase is one only then."""
        _enqueued(job_type, queue)
        self.loop_held.labels(job_type)
        self.started.labels(job_type, queue)
        self.run_seconds.labels(job_type, queue)
        self.wait_seconds.labels(job_type, queue)
        for outcome in _OUTCOMES_SHOWN_AT_ONCE:
            self.ended.labels(job_type, queue, outcome)

    def refresh(self, watches: Iterable[Watch]) -> None:
        """Set what goes up and down to what it is now, of all runners of this process together."""
        now: dict[tuple[Gauge, tuple[str, ...]], float] = dict.fromkeys(self._shown, 0.0)
        lag = 0.0
        for gauge, labels, value in (each for watch in watches for each in self._read(watch.handle)):
            now[gauge, labels] = now.get((gauge, labels), 0.0) + value
        for each in watches:
            lag = max(lag, each.handle.loop.max_lag)
        self._lag.set(lag)
        for (gauge, labels), value in now.items():
            gauge.labels(*labels).set(value)
        self._shown = now

    def _read(self, handle: RunnerHandle) -> Iterator[tuple[Gauge, tuple[str, ...], float]]:
        for queue, worker in handle.workers.items():
            yield self._slots, (queue,), worker.pool
            yield self._slots_in_use, (queue,), len(worker.running)
            yield self._read_ahead, (queue,), worker.ready
        for name, pool in handle.pools.items():
            yield self._connections, (name,), pool.size
            yield self._connections_in_use, (name,), pool.in_use
        yield self._info, (__version__, platform.python_version(), handle.session), 1


@functools.cache
def _runner_metrics() -> _RunnerMetrics:
    return _RunnerMetrics()


# --- what is in the database ------------------------------------------------------------------------------------------


class _Database:
    """Asks the database when it is scraped, and not again for a while; says so when it does not answer."""

    def __init__(self) -> None:
        self._fresh_until = 0.0
        self._asked_at = 0.0
        self._question: gevent.Greenlet[[ConnectionPool], None] | None = None
        self._url: str | None = None
        self._is_up = False
        self._has_counted = False
        self._queues: dict[str, QueueStatus | None] = {}

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """The metrics without values: to register it asks nobody."""
        return iter(self._families())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The metrics, where this process has a runner."""
        if not _watches:
            return
        handle = _watches[0].handle
        pool = handle.pools["enqueue"]
        has_answered = self._answered(pool)
        up, jobs, oldest = self._families()
        up.add_metric([], float(self._is_up and has_answered))
        yield up
        if not (self._has_counted and has_answered):
            return
        # Queues that are empty are shown, too: what vanishes can be neither drawn nor alarmed about.
        for queue, status in sorted({**dict.fromkeys(handle.workers), **self._queues}.items()):
            for state in _STATES:
                jobs.add_metric([queue, state], float(getattr(status, state, 0)))
            oldest.add_metric([queue], getattr(status, "oldest_waiting_seconds", None) or 0.0)
        yield jobs
        yield oldest

    def _families(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily("greenjobs_database_up", "Whether the database answered, with what follows"),
            GaugeMetricFamily("greenjobs_jobs", "Jobs that are in the table, by state", labels=["queue", "state"]),
            GaugeMetricFamily(
                "greenjobs_oldest_waiting_seconds",
                "For how long the job has been due that has waited longest; 0 where none waits",
                labels=["queue"],
            ),
        )

    def _answered(self, pool: ConnectionPool) -> bool:
        """Whether what is known is of late; asks if it is not, one question at a time, which may outlast the scrape."""
        import gevent

        now = time.monotonic()
        if self._url != pool.database_url:
            self._url, self._queues, self._question = pool.database_url, {}, None
            self._fresh_until = 0.0
        if now >= self._fresh_until and (self._question is None or self._question.ready()):
            self._asked_at = now
            self._question = gevent.spawn(self._ask, pool)
        if self._question is None:
            return True
        self._question.join(max(self._asked_at + _PATIENCE_SECONDS - now, 0.0))
        return self._question.ready()

    def _ask(self, pool: ConnectionPool) -> None:
        started = time.monotonic()
        share = _FRESH_SHARE
        try:
            with pool.connection() as connection:
                found = inspection.queue_statuses(connection)
        except (psycopg2.Error, GreenjobsError) as error:
            if self._has_counted:
                logger.warning("the database did not answer a scrape: %s", str(error).strip())
            # It is there, and has more rows than can be counted in the time that it has.
            self._is_up = isinstance(error, psycopg2.errors.QueryCanceled)
            self._has_counted = False
            share = _FRESH_SHARE if self._is_up else 0
        else:
            self._is_up = self._has_counted = True
            self._queues = {**dict.fromkeys(self._queues), **{each.queue or "": each for each in found}}
        ended = time.monotonic()
        # What took longer than any count may was no count, but a database that stood still.
        self._fresh_until = ended + max(_FRESH_SECONDS, share * min(ended - started, _PATIENCE_SECONDS))


_database = _Database()
