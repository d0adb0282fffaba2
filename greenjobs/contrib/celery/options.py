"""The options of `apply_async`, of tasks and of routes, as those of a job. Every one is used, listed, or refused."""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from greenjobs import config
from greenjobs.contrib.celery.exceptions import ImproperlyConfigured, Unsupported
from greenjobs.cron import zone_named
from greenjobs.errors import OptionError, PayloadError

if TYPE_CHECKING:
    from greenjobs.contrib.celery.settings import Conf
    from greenjobs.contrib.celery.task import Task

#: Under which names headers of ours are with those of the caller.
RETRIES = "celery.retries"
FOLLOWERS = "celery.followers"
ROOT = "celery.root"
PARENT = "celery.parent"

WITHOUT_MEANING = frozenset(
    [
        "add_to_parent",
        "argsrepr",
        "compression",
        "delivery_mode",
        "exchange_type",
        "immediate",
        "kwargsrepr",
        "mandatory",
        "origin",
        "parent_id",
        "producer",
        "publisher",
        "reply_to",
        "retry",
        "retry_policy",
        "root_id",
        "serializer",
        "shadow",
    ]
)
"""Options of apply_async about brokers and their messages."""

_REFUSED = {
    "task_id": "ids are given by the database, and are numbers; to enqueue a call once only, give it a key: "
    "task.job.options(unique_key='…').delay(…)",
    "link_error": "define on_failure on the task, or on its base class",
    "errback": "define on_failure on the task, or on its base class",
    "chord": "see chord",
    "group_id": "group(…) returns the results of all",
    "group_index": "group(…) returns the results of all",
    "exchange": "queues are names; use queue=…",
    "stamped_headers": "use headers=…, whose values are texts",
}

#: Those that a task deals with before it makes a call of its job.
TASKS_OWN = frozenset({"headers", "link", "retries", "ignore_result"})

_QUEUE = frozenset({"queue", "routing_key"})

_TAKEN = frozenset(
    [
        "countdown",
        "eta",
        "expires",
        "queue",
        "routing_key",
        "priority",
        "time_limit",
        "soft_time_limit",
        "connection",
        "independent",
    ]
)


def positional(name: str, args: Any) -> tuple[Any, ...]:
    """Arguments that were given as a whole. Raises TypeError, also for a text, which would be taken to pieces."""
    if args is not None and not isinstance(args, (list, tuple)):
        raise TypeError(f"{name}: args is {args!r}; allowed: a list or a tuple, as in ({args!r},)")
    return tuple(args or ())


def job_options(task: Task, options: Mapping[str, Any], *, keep: float) -> dict[str, Any]:
    """What `.options(…)` of the task's job takes. Raises Unsupported, OptionError."""
    for name, value in options.items():
        if name in _REFUSED and value is not None:
            raise Unsupported(f"{task.name}: apply_async({name}=…) is not in greenjobs: {_REFUSED[name]}")
        if name == "serializer" and value not in (None, "json"):
            raise Unsupported(f"{task.name}: serializer is {value!r}, and greenjobs stores JSON; leave it out")
        if name not in _TAKEN and name not in WITHOUT_MEANING and name not in _REFUSED:
            raise OptionError(f"{task.name}: apply_async has no option {name!r}")
    conf = task.app.conf
    due = _due(task, options.get("countdown"), options.get("eta"))
    found: dict[str, Any] = {
        "keep": keep,
        "queue": options.get("queue") or options.get("routing_key"),
        "priority": priority(conf, options.get("priority")),
        "expires": _expires(task, options.get("expires"), due),
        "timeout": options.get("soft_time_limit"),
        "hard_timeout": options.get("time_limit"),
        "connection": options.get("connection"),
        **due,
    }
    if options.get("independent"):
        found["independent"] = True
    return {name: value for name, value in found.items() if value is not None}


def priority(conf: Conf, given: int | None) -> int | None:
    """A priority of Celery's as one of ours, where the larger is the earlier: on Redis it is the other way round."""
    return -given if isinstance(given, int) and conf.smaller_is_earlier else given


def aware(conf: Conf, instant: datetime) -> datetime:
    """The instant that a datetime means: without a time zone it is in UTC, or with enable_utc=False in `timezone`."""
    if instant.tzinfo is not None:
        return instant
    return instant.replace(tzinfo=timezone.utc if conf.enable_utc else zone_named(zone_name(conf)))


def zone_name(conf: Conf) -> str:
    """The name of the time zone of the settings."""
    return str(conf.timezone or "UTC")


def routed(
    conf: Conf, task: Task, args: Iterable[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options with what `task_routes` says, where they say nothing themselves. Raises ImproperlyConfigured."""
    found = _routed(conf, task, args, kwargs, options)
    if conf.task_default_queue or conf.task_default_routing_key:
        return found
    # What Celery calls the queue of all that are in no other.
    queue = config.current().default_queue
    return {name: queue if name in _QUEUE and value == "celery" else value for name, value in found.items()}


def _routed(
    conf: Conf, task: Task, args: Iterable[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    said = {name: value for name, value in options.items() if value is not None}
    for router in _routers(conf.task_routes):
        route = _route(router, task, args, kwargs, options)
        if route:
            if isinstance(route, str):
                route = {"queue": route}
            if said.keys() & _QUEUE:
                route = {name: value for name, value in route.items() if name not in _QUEUE}
            return {**route, **said}
    default = conf.task_default_queue or conf.task_default_routing_key
    return said if default is None or "routing_key" in said else {"queue": default, **said}


def headers_of(task: Task, options: Mapping[str, Any]) -> dict[str, str]:
    """The headers that a call is to carry. Raises OptionError."""
    headers = dict(options.get("headers") or {})
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise OptionError(f"{task.name}: headers has {name!r}: {value!r}; allowed: texts")
    if options.get("retries"):
        headers[RETRIES] = str(int(options["retries"]))
    return headers


def as_json(task: Task, value: Any) -> str:
    """The arguments of what follows a task, as a header carries them. Raises PayloadError."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PayloadError(
            f"{task.name}: the arguments of the tasks that follow it are carried as plain JSON, and {error}; pass "
            f"texts, numbers, lists and dicts"
        ) from None


def _due(task: Task, countdown: Any, eta: Any) -> dict[str, Any]:
    if eta is not None and countdown is None:
        if not isinstance(eta, datetime):
            raise OptionError(f"{task.name}: eta is {eta!r}; allowed: a datetime")
        return {"run_at": aware(task.app.conf, eta)}
    if countdown is None:
        return {}
    seconds = countdown.total_seconds() if isinstance(countdown, timedelta) else countdown
    # A time that has passed is now.
    return {"delay": max(seconds, 0) if isinstance(seconds, (int, float)) else seconds}


def _expires(task: Task, expires: Any, due: Mapping[str, Any]) -> Any:
    """Celery counts from the call, and we from when the job is due."""
    if isinstance(expires, datetime):
        return aware(task.app.conf, expires)
    if isinstance(expires, timedelta):
        expires = expires.total_seconds()
    if isinstance(expires, (int, float)) and not isinstance(expires, bool):
        if "run_at" in due:
            return datetime.now(timezone.utc) + timedelta(seconds=expires)
        if "delay" in due and expires <= due["delay"]:
            raise OptionError(
                f"{task.name}: expires is {expires:g} s and countdown {due['delay']:g} s: it would never run"
            )
        return expires - due.get("delay", 0)
    return expires


def _routers(routes: Any) -> Iterator[Any]:
    if routes is None:
        return
    if isinstance(routes, (str, Mapping)) or callable(routes):
        routes = (routes,)
    for router in routes:
        # A list may have pairs of patterns and routes, mappings, functions, and names of functions.
        if isinstance(router, (list, tuple)) and len(router) == 2:
            router = {router[0]: router[1]}
        if isinstance(router, str):
            module_name, _, attribute = router.replace(":", ".").rpartition(".")
            router = getattr(importlib.import_module(module_name), attribute)
        yield router


def _route(router: Any, task: Task, args: Iterable[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    if isinstance(router, Mapping):
        for pattern, route in router.items():
            if pattern == task.name or _matches(pattern, task.name):
                return route
        return None
    if callable(router):
        return router(task.name, args, kwargs, options, task=task)
    raise ImproperlyConfigured(f"task_routes has {router!r}; allowed: mappings, pairs, functions, and names of them")


def _matches(pattern: Any, name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.match(name) is not None
    return isinstance(pattern, str) and fnmatch.fnmatchcase(name, pattern)
