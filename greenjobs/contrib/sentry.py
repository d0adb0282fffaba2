"""greenjobs in Sentry: errors, traces, cron monitors, each attempt in a scope of its own.

It turns itself on where the application has called `sentry_sdk.init(dsn=…)`: when a runner starts, and before an
enqueue. To set options, or to leave it out:

    sentry_sdk.init(dsn=…, integrations=[GreenjobsIntegration(report_retries=True)])
    sentry_sdk.init(dsn=…, disabled_integrations=[GreenjobsIntegration])

What is to be said of an attempt depends on its outcome, which is decided when its scope has been left: so its scopes
and its span stay open until then. Where the function runs in another process, so do its scopes and its span; its error
is reported there, with what it will mean. What kept it from being reported there is reported here, such as the death
of that process, with what the event says.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import sentry_sdk
from sentry_sdk.consts import VERSION
from sentry_sdk.integrations import DidNotEnable, Integration, setup_integrations
from sentry_sdk.integrations.logging import ignore_logger
from sentry_sdk.scope import Scope, add_global_event_processor, use_isolation_scope, use_scope
from sentry_sdk.utils import parse_version
from sentry_sdk.worker import BackgroundWorker

from greenjobs import events
from greenjobs.contrib import sentry_events, sentry_spans
from greenjobs.contrib.sentry_spans import JobSpan
from greenjobs.current import attempt_here, current_job
from greenjobs.errors import JobControl
from greenjobs.events import AttemptEnded, AttemptStarted, LoopHeld, Outcome, RunnerEnded
from greenjobs.surroundings import Enqueue, surround, surround_enqueue

__all__ = ["GreenjobsIntegration"]

logger = logging.getLogger(__name__)

_OLDEST = (2, 20)


class GreenjobsIntegration(Integration):
    """`report_retries`: also errors after which the job is tried again. `propagate_traces`: jobs belong to the trace in
    which they were enqueued. `monitor_cron_jobs`: each schedule is a monitor, which Sentry makes by itself.
    """

    identifier = "greenjobs"

    def __init__(
        self, *, report_retries: bool = False, propagate_traces: bool = True, monitor_cron_jobs: bool = True
    ) -> None:
        self.report_retries = report_retries
        self.propagate_traces = propagate_traces
        self.monitor_cron_jobs = monitor_cron_jobs

    @staticmethod
    def setup_once() -> None:
        """Called by Sentry, once in a process. Raises DidNotEnable."""
        if _is_too_old():
            raise DidNotEnable(f"greenjobs needs sentry-sdk {_OLDEST[0]}.{_OLDEST[1]} or later; this is {VERSION}")
        add_global_event_processor(sentry_events.without_our_variables)
        surround(_around_attempt)
        surround_enqueue(_around_enqueue)
        events.subscribe(_attempt_started, AttemptStarted)
        events.subscribe(_attempt_ended)
        events.subscribe(_runner_ended, RunnerEnded)
        events.subscribe(_loop_held, LoopHeld)
        # It logs the failures that are reported here, with their tracebacks: each would be there twice.
        ignore_logger("greenjobs.execution")


def turn_on(*, runs_jobs: bool) -> None:
    """Go along with the active client, if there is one and nobody has said otherwise; see greenjobs.companions."""
    if _integration() is not None and runs_jobs:
        _home[:] = [sentry_sdk.get_isolation_scope()]
        _start_sending()


def _start_sending() -> None:
    """Start the thread of Sentry that sends. It would start with the first event, within the scopes of the job that has
    that, so that what it does was a part of the job; and in the thread of the job, with which it would end."""
    worker = getattr(sentry_sdk.get_client().transport, "_worker", None)
    if isinstance(worker, BackgroundWorker):
        worker.start()


_home: list[Scope] = []
"""The isolation scope of whoever started the last runner, if any: what the application said there is true for all."""


def _integration() -> GreenjobsIntegration | None:
    """What the active client has of greenjobs; None where it is not wanted."""
    client: Any = sentry_sdk.get_client()
    if not client.is_active() or client.transport is None:
        return None
    found: GreenjobsIntegration | None = client.get_integration(GreenjobsIntegration)
    if found is None and _is_wanted(client.options):
        client.integrations.update(setup_integrations([GreenjobsIntegration()], with_defaults=False))
        found = client.get_integration(GreenjobsIntegration)
    return found


def _is_wanted(options: Mapping[str, Any]) -> bool:
    """By the rules for the integrations that Sentry enables by itself."""
    if not (options.get("default_integrations", True) and options.get("auto_enabling_integrations", True)):
        return False
    if _is_too_old():
        return False
    disabled = options.get("disabled_integrations") or ()
    return not any(each is GreenjobsIntegration or isinstance(each, GreenjobsIntegration) for each in disabled)


def _is_too_old() -> bool:
    return (parse_version(VERSION) or _OLDEST) < _OLDEST


# --- enqueue ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _around_enqueue(enqueue: Enqueue) -> Iterator[dict[str, str] | None]:
    integration = _integration()
    if integration is None:
        yield None
        return
    with sentry_spans.publishing(enqueue):
        scope = sentry_sdk.get_current_scope()
        yield dict(scope.iter_trace_propagation_headers()) if integration.propagate_traces else None


# --- one attempt ------------------------------------------------------------------------------------------------------


class _Open:
    """The scopes and the span of an attempt whose function has ended, and whose outcome is not known yet."""

    def __init__(self, isolation: Scope, span: JobSpan) -> None:
        self._isolation = isolation
        self._current = sentry_sdk.get_current_scope()
        self._span = span

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with use_isolation_scope(self._isolation), use_scope(self._current):
            yield

    def end(self, status: str) -> None:
        with self.entered():
            self._span.end(status)


class _Watched:
    """An attempt of this process, from its beginning to its outcome."""

    def __init__(self, event: AttemptStarted, schedule: Mapping[str, str] | None) -> None:
        self.event = event
        self.schedule = schedule
        self.has_ended = False
        self.open: _Open | None = None


# In the context of the job, and in the copy of it that a thread gets which runs the function.
_watched: ContextVar[_Watched] = ContextVar("greenjobs_sentry_watched")


def _attempt_started(event: AttemptStarted) -> None:
    integration = _integration()
    if integration is not None:
        schedule = sentry_events.monitored_schedule() if integration.monitor_cron_jobs else None
        _watched.set(_Watched(event, schedule))
        if schedule is not None:
            sentry_events.check_in(schedule)


@contextlib.contextmanager
def _around_attempt() -> Iterator[None]:
    integration = _integration()
    if integration is None:
        yield
        return
    watched = _watched.get(None)
    with contextlib.ExitStack() as scopes:
        opened: _Open | None = None
        try:
            opened = _opened(integration, scopes, watched)
        except Exception:  # such as a traces_sampler of the application's
            logger.exception("job %s (%s) runs without Sentry", current_job.id, current_job.name)
        try:
            yield
        except BaseException as error:
            if opened is not None:
                _report_abroad(error, integration)
            _leave(opened, watched, "aborted" if isinstance(error, JobControl) else "internal_error")
            raise
        _leave(opened, watched, "ok")


def _opened(integration: GreenjobsIntegration, scopes: contextlib.ExitStack, watched: _Watched | None) -> _Open:
    """Enter the scopes of the job that runs here, and begin its span."""
    isolation = scopes.enter_context(use_isolation_scope(_fresh_scope()))
    sentry_events.describe(isolation, current_job.id, current_job.name, current_job.queue, current_job.attempt)
    isolation.add_event_processor(sentry_events.Arguments())
    headers = current_job.headers if integration.propagate_traces else {}
    waited = None if watched is None else watched.event.waited_seconds
    return _Open(isolation, sentry_spans.begin(headers, waited_seconds=waited))


def _fresh_scope() -> Scope:
    scope = (_home[0] if _home else sentry_sdk.get_isolation_scope()).fork()
    scope.clear_breadcrumbs()
    scope.set_new_propagation_context()  # or all would be in one trace
    return scope


def _report_abroad(error: BaseException, integration: GreenjobsIntegration) -> None:
    """Report the error of a job that has this process for itself: the runner has neither its scopes nor its stack."""
    attempt = attempt_here()
    abroad = None if attempt is None else attempt.place.abroad
    if abroad is None:
        return
    outcome = abroad.outcome_of(error)
    if _is_reported(error, outcome, integration):
        sentry_events.capture(error, outcome)
        abroad.is_reported = True


def _leave(opened: _Open | None, watched: _Watched | None, status: str) -> None:
    """Leave the rest to whoever hears of the outcome; in a process where nobody will, end it."""
    if opened is None:
        return
    if watched is None or watched.has_ended:
        opened.end(status)
    else:
        watched.open = opened


_STATUSES = {"done": "ok", "failed": "internal_error", "retried": "internal_error", "cancelled": "cancelled"}


def _attempt_ended(event: AttemptEnded) -> None:
    integration = _integration()
    if integration is None:
        return
    watched = _watched.get(None)
    opened = None
    if watched is not None:
        watched.has_ended = True
        opened, watched.open = watched.open, None
    if event.error is not None and _is_reported(event.error, event.outcome, integration) and not _was_reported():
        with opened.entered() if opened is not None else _scope_of(event):
            sentry_events.capture(event.error, event.outcome)
    if opened is not None:
        opened.end(_STATUSES.get(event.outcome, "aborted"))
    if watched is not None and watched.schedule is not None:
        sentry_events.check_out(event, watched.schedule)


def _is_reported(error: BaseException, outcome: Outcome, integration: GreenjobsIntegration) -> bool:
    if outcome == "retried":
        return integration.report_retries and not sentry_events.is_asked_for(error)
    # One that has completed in its own transaction is done, whatever it raised afterwards.
    return outcome == "failed" or (outcome == "done" and not isinstance(error, JobControl))


def _was_reported() -> bool:
    """Whether the process has done so in which the function ran."""
    attempt = attempt_here()
    return attempt is not None and attempt.elsewhere is not None and attempt.elsewhere.is_reported


@contextlib.contextmanager
def _scope_of(event: AttemptEnded) -> Iterator[None]:
    with use_isolation_scope(_fresh_scope()) as isolation:
        if current_job and current_job.headers:
            isolation.generate_propagation_context(current_job.headers)
        sentry_events.describe(isolation, event.id, event.job_type, event.queue, event.attempt)
        yield


# --- the process ------------------------------------------------------------------------------------------------------


# By job type, when it was last told that such a job held the loop: one that does may do so all day.
_told_of_loop: dict[str | None, float] = {}
_TELL_AGAIN_SECONDS = 60.0


def _loop_held(event: LoopHeld) -> None:
    now = time.monotonic()
    if _integration() is None or now - _told_of_loop.get(event.job_type, -math.inf) < _TELL_AGAIN_SECONDS:
        return
    _told_of_loop[event.job_type] = now
    import gevent  # not at the top: those that merely enqueue need none

    # It comes in the event loop, where nothing may wait, and Sentry may have to start a thread.
    gevent.spawn(sentry_events.capture_loop_held, event)


def _runner_ended(event: RunnerEnded) -> None:
    # For `shutdown_timeout` seconds at most, an option of Sentry's; others of the process go on meanwhile.
    if _integration() is not None:
        sentry_sdk.flush()
