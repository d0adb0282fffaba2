"""What a runner tells of itself: to probes and people over HTTP, and to systemd.

Nothing here changes anything, and nothing shows what is in a job: neither payloads nor variables.

`/livez` would be of no use to a process whose event loop is held by a job: its answer is late then, which is what tells
the one who asks. `/readyz` asks the database, once a second at most, however often it is asked itself.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import gevent
import psycopg2

from greenjobs import migrate
from greenjobs.address import Address
from greenjobs.errors import GreenjobsError
from greenjobs.http_server import NOT_FROM_AFAR, Answer, Request, Route, Server, warn_of_openness
from greenjobs.inspection import DatabaseState, database_state

if TYPE_CHECKING:
    from greenjobs.current import Attempt
    from greenjobs.runner import RunnerHandle
    from greenjobs.systemd import Notifier

logger = logging.getLogger(__name__)

# How long an answer of the database counts, and how long one is waited for.
FRESH_SECONDS = 1.0
DATABASE_SECONDS = 2.0

METRICS_HINT = "metrics need prometheus_client, which the extra brings: pip install 'greenjobs[prometheus]'"


@contextlib.contextmanager
def serving(handle: RunnerHandle, address: str | None) -> Iterator[Server | None]:
    """Answer for this runner at an address, see greenjobs.address, until the end of the block; None answers nowhere.

    Raises ConfigError when nobody can listen there.
    """
    if address is None:
        yield None
        return
    place, readiness = Address.parse(address), Readiness(handle)
    routes: dict[str, Route] = {
        "/livez": lambda request: live(handle),
        "/readyz": lambda request: readiness.answer(),
        "/metrics": lambda request: metrics(),
        "/jobs": lambda request: jobs(handle, request),
    }
    with contextlib.closing(Server(place, routes)) as server:
        if not place.is_local:
            warn_of_openness(server.address)
        yield server


# --- alive ------------------------------------------------------------------------------------------------------------


def live(handle: RunnerHandle) -> Answer:
    """That the event loop turns, as whoever gets this answer can see; and how late it has been."""
    return Answer.of(
        {
            "alive": True,
            "runner": handle.name,
            "pid": os.getpid(),
            "lag_seconds": round(handle.loop.lag, 4),
            "worst_lag_seconds": round(max(handle.loop.lag, handle.loop.max_lag), 4),
            "running_jobs": handle.running_jobs(),
            "finished_jobs": handle.finished_jobs(),
        }
    )


# --- ready ------------------------------------------------------------------------------------------------------------


class Readiness:
    """Whether a runner claims jobs, and could finish them.

    There is one question to the database at a time. It runs in a greenlet of its own, to its end: whoever asks waits
    for it a while, and does not pile another one upon it.
    """

    def __init__(self, handle: RunnerHandle) -> None:
        self._handle = handle
        self._labels = {migration.version: migration.label for migration in migrate.load()}
        self._question: gevent.Greenlet[[], DatabaseState | str] | None = None
        self._asked_at = float("-inf")

    def answer(self) -> Answer:
        """200 when it is ready; else 503, with the reasons."""
        handle = self._handle
        reasons = []
        if handle.is_stopping:
            reasons.append("it is draining: it was told to stop, and claims no more")
        elif handle.runner_id is None:
            reasons.append("it has no session with the database, so it claims nothing")
        reasons += self._complaints_about_the_database()
        document = {"ready": not reasons, "runner": handle.name, "pid": os.getpid(), "reasons": reasons}
        return Answer.of(document, HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK)

    def _complaints_about_the_database(self) -> list[str]:
        question, now = self._question, time.monotonic()
        if question is None or (question.ready() and now - self._asked_at >= FRESH_SECONDS):
            self._asked_at = now
            question = self._question = gevent.Greenlet(self._ask)
            question.start()
        question.join(max(self._asked_at + DATABASE_SECONDS - now, 0.0))
        if not question.ready():
            return [f"the database has not answered for {time.monotonic() - self._asked_at:.1f} s"]
        state = question.get()
        if isinstance(state, str):
            return [state]
        complaints = ["the database is a standby, which takes no writes"] if state.is_standby else []
        # What a later release has added does not bother this one, mostly: while it is rolled out both run.
        if reason := migrate.unfit(state.needs, max(self._labels)):
            complaints.append(reason)
        missing = [label for version, label in self._labels.items() if version not in state.versions]
        if missing:
            complaints.append(f"the database lacks {', '.join(missing)}; type `greenjobs migrate`")
        return complaints

    def _ask(self) -> DatabaseState | str:
        try:
            return self._handle.ask(database_state)
        except (GreenjobsError, psycopg2.Error) as error:
            return f"the database does not answer: {str(error).strip()}"


# --- jobs -------------------------------------------------------------------------------------------------------------


def jobs(handle: RunnerHandle, request: Request) -> Answer:
    """What runs at this moment, the longest first, and where it stands; for somebody on this machine."""
    if not request.is_from_here:
        return Answer.of({"error": NOT_FROM_AFAR}, HTTPStatus.FORBIDDEN)
    running = sorted(handle.attempts(), key=lambda attempt: attempt.started)
    # Each process is asked at the same time as the others.
    asked = {each.row.id: gevent.spawn(each.lines) for each in running if each.elsewhere is not None}
    stacks = [asked[each.row.id].get() if each.row.id in asked else each.lines() for each in running]
    document = {"runner": handle.name, "pid": os.getpid(), "jobs": list(map(_described, running, stacks))}
    return Answer.of(document)


def _described(attempt: Attempt, stack: list[str]) -> dict[str, Any]:
    return {
        "id": attempt.row.id,
        "job_type": attempt.job.name,
        "queue": attempt.place.queue,
        "attempt": attempt.number,
        "running_seconds": round(time.perf_counter() - attempt.started, 3),
        "executor": attempt.job.policy.executor,
        "stack": stack,
    }


# --- metrics ----------------------------------------------------------------------------------------------------------


def metrics() -> Answer:
    """What greenjobs.contrib.prometheus makes of it, where prometheus_client is there."""
    try:
        # By name: this room works without the package that the module is about.
        prometheus = importlib.import_module("greenjobs.contrib.prometheus")
    except ImportError:
        return Answer.of({"error": METRICS_HINT}, HTTPStatus.NOT_IMPLEMENTED)
    content_type, body = prometheus.render()
    return Answer(HTTPStatus.OK, body, content_type)


# --- systemd ----------------------------------------------------------------------------------------------------------


def tell_systemd(handle: RunnerHandle, notifier: Notifier, *, grace: float) -> None:
    """Say that the runner is at work, and from now on how it is; the watchdog hears of it from the event loop."""
    if not notifier.is_heard:
        return
    notifier.say_ready()
    gevent.spawn(_beat, handle, notifier, grace)


def _beat(handle: RunnerHandle, notifier: Notifier, grace: float) -> None:
    while not handle.wait_until_stopping(notifier.beat_seconds):
        notifier.beat(_status(handle))
    notifier.say_stopping(grace)
    while True:
        notifier.beat(f"stopping: {handle.running_jobs()} jobs are still running")
        gevent.sleep(notifier.beat_seconds)


def _status(handle: RunnerHandle) -> str:
    where = "" if handle.runner_id is not None else "; no session with the database"
    return f"{handle.running_jobs()} jobs running, {handle.finished_jobs()} finished{where}"
