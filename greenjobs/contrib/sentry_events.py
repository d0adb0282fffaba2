"""What is told to Sentry of jobs: tags and context, errors, check-ins of schedules, a loop that was held."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

import sentry_sdk
from sentry_sdk.crons import capture_checkin
from sentry_sdk.scope import Scope
from sentry_sdk.utils import event_from_exception

from greenjobs.control import Retry
from greenjobs.current import current_job
from greenjobs.errors import UnknownJob
from greenjobs.events import AttemptEnded, Outcome
from greenjobs.job import find_job

# Larger ones are cut: Sentry refuses events of more than a megabyte.
_MOST_ARGUMENT_CHARACTERS = 10_000

_SECRETIVE = ("greenjobs", "psycopg2")
_PACKAGE = str(Path(__file__).parent.parent)

_SLUG = re.compile(r"(?!\d+$)[a-z0-9_-]{1,50}")
_HASH_CHARACTERS = 8

_SECONDS_FIELDS = 6
_CHECK_INS = {"done": "ok", "discarded": "ok", "failed": "error", "cancelled": "error"}


def describe(scope: Scope, id: int, job_type: str, queue: str, attempt: int) -> None:
    """Say in this scope which attempt it is about: tags to search by, and a context to read."""
    scope.set_tag("job_type", job_type)
    scope.set_tag("queue", queue)
    scope.set_tag("attempt", str(attempt))
    context: dict[str, Any] = {"id": id, "job_type": job_type, "queue": queue, "attempt": attempt}
    if current_job:
        row = current_job.row
        context |= {"max_retries": current_job.max_retries, "priority": row.priority, "created_at": row.created_at}
    scope.set_context("job", context)


def without_our_variables(event: Any, hint: Any) -> Any:
    """An event processor for all events: what functions of ours, and of psycopg2, have in their local variables is
    nobody's business: arguments of jobs, also where they are enqueued, and the password of the database."""
    for frame in _frames_of(event):
        if str(frame.get("module")).partition(".")[0] in _SECRETIVE:
            frame.pop("vars", None)
    return event


def _frames_of(event: Any) -> Iterator[dict[str, Any]]:
    for kind in ("exception", "threads"):
        for thrown in (event.get(kind) or {}).get("values") or ():
            yield from (thrown.get("stacktrace") or {}).get("frames") or ()


class Arguments:
    """An event processor for the scope of a job: its arguments are told if the client may send them, and not otherwise,
    neither by us nor as local variables of its function."""

    def __init__(self) -> None:
        self._data = current_job.row.data
        self._name = current_job.name
        self._codes: set[CodeType] | None = None

    def __call__(self, event: Any, hint: Any) -> Any:
        if _may_send_arguments():
            contexts = event.setdefault("contexts", {})
            contexts["job"] = {**contexts.get("job", {}), "arguments": _bounded(self._data)}
        else:
            for frame in _frames_of(event):
                self._clear(frame)
        return event

    def _clear(self, frame: dict[str, Any]) -> None:
        variables, file = frame.get("vars"), frame.get("abs_path") or ""
        if not variables:
            return
        if self._codes is None:
            self._codes = _codes_of(self._name)
        for code in self._codes:
            if (file, frame.get("function")) == (code.co_filename, code.co_name):
                has_stars = (code.co_flags & inspect.CO_VARARGS, code.co_flags & inspect.CO_VARKEYWORDS)
                count = code.co_argcount + code.co_kwonlyargcount + sum(map(bool, has_stars))
                for name in code.co_varnames[:count]:
                    variables.pop(name, None)


def _codes_of(job_type: str) -> set[CodeType]:
    """Of the job's function, and of what decorators made of it; all get the arguments."""
    try:
        function: Any = find_job(job_type).function
    except UnknownJob:
        return set()
    codes: set[CodeType] = set()
    while function is not None:
        code = getattr(function, "__code__", None)
        codes |= set() if code is None else {code}
        function = getattr(function, "__wrapped__", None)
    return codes


def _may_send_arguments() -> bool:
    client: Any = sentry_sdk.get_client()
    collection = client.options.get("data_collection")
    if collection is not None and collection.get("provided_by_user"):
        return bool(collection.get("queues"))
    return bool(client.should_send_default_pii())


def _bounded(data: Any) -> Any:
    text = json.dumps(data, ensure_ascii=False)
    return data if len(text) <= _MOST_ARGUMENT_CHARACTERS else text[:_MOST_ARGUMENT_CHARACTERS] + "…"


# --- errors -----------------------------------------------------------------------------------------------------------


def is_asked_for(error: BaseException) -> bool:
    """Whether the job raised it to be tried again, and not because something went wrong."""
    return isinstance(error, Retry)


def capture(error: BaseException, outcome: Outcome) -> None:
    """Report the error of an attempt, in the scope that is entered."""
    event, hint = event_from_exception(
        (type(error), error, _without_ours(error.__traceback__)),
        client_options=sentry_sdk.get_client().options,
        mechanism={"type": "greenjobs", "handled": outcome != "failed"},
    )
    if outcome == "retried":
        event["level"] = "warning"
    event["tags"] = {"outcome": outcome}
    sentry_sdk.capture_event(event, hint=hint)


def _without_ours(traceback: TracebackType | None) -> TracebackType | None:
    """Without the frames above the job's function; all, where there is no other."""
    each = traceback
    while each is not None and each.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        each = each.tb_next
    return traceback if each is None else each


def capture_loop_held(held: Any) -> None:
    """Report that something held the event loop: the job, if it was one, and where it stood."""
    culprit = "the event loop was held" if held.job_type is None else f"job {held.job_type} held the event loop"
    event: dict[str, Any] = {
        "level": "warning",
        "logger": "greenjobs",
        "message": f"{culprit} for {held.seconds:.1f} s",
        "fingerprint": ["greenjobs-loop-held", held.job_type or ""],
        "tags": {name: value for name, value in (("job_type", held.job_type), ("queue", held.queue)) if value},
        "contexts": {"job": {"id": held.id}} if held.id is not None else {},
        "extra": {"stack": held.stack},
    }
    sentry_sdk.capture_event(event)  # type: ignore[arg-type]


# --- check-ins of schedules -------------------------------------------------------------------------------------------


def monitored_schedule() -> dict[str, str] | None:
    """The schedule whose tick the job is that runs here, if Sentry can monitor it: it knows minutes, not seconds."""
    schedule = current_job.schedule
    if schedule is None or not {"name", "cron", "timezone"} <= schedule.keys():
        return None
    return None if len(schedule["cron"].split()) >= _SECONDS_FIELDS else schedule


def check_in(schedule: Mapping[str, str]) -> None:
    """Say that a tick has begun to run. All its attempts are one check-in."""
    capture_checkin(
        monitor_slug=slug(schedule["name"]),
        check_in_id=_check_in_id(),
        status="in_progress",
        monitor_config={
            "schedule": {"type": "crontab", "value": schedule["cron"]},
            "timezone": schedule["timezone"],
        },
    )


def check_out(ended: AttemptEnded, schedule: Mapping[str, str]) -> None:
    """Say how a tick has ended, if it has; one that runs again is still under way."""
    status = _CHECK_INS.get(ended.outcome)
    if status is not None:
        capture_checkin(
            monitor_slug=slug(schedule["name"]),
            check_in_id=_check_in_id(),
            status=status,
            duration=ended.run_seconds,
        )


def slug(name: str) -> str:
    """What a monitor is called whose schedule has this name: the name, as far as Sentry takes it."""
    plain = name.lower().replace(" ", "-")
    if _SLUG.fullmatch(plain):
        return plain
    # What is cut or left out may be the difference to another one.
    mark = hashlib.sha256(name.encode()).hexdigest()[:_HASH_CHARACTERS]
    kept = re.sub(r"[^a-z0-9_-]+", "-", plain)[: 50 - 1 - _HASH_CHARACTERS].strip("-")
    return f"{kept}-{mark}" if kept else f"schedule-{mark}"


def _check_in_id() -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, f"greenjobs {current_job.id} {current_job.tick_at}").hex
