"""`app.conf`: Celery's settings under their lower-case names, the upper-case ones of old, and those with a prefix.

Settings that mean something here are USED. Those about brokers, workers and result backends, which greenjobs has not,
are accepted, and named in one line of the log. What would change what tasks do, and cannot be had, is refused.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from greenjobs import config
from greenjobs.contrib.celery.exceptions import ImproperlyConfigured, Unsupported
from greenjobs.durations import DURATION_FORMS, duration

logger = logging.getLogger(__name__)

USED: Mapping[str, Any] = {
    "beat_schedule": None,
    "broker_url": None,
    "enable_utc": True,
    "imports": (),
    "include": (),
    "result_backend": None,
    "result_expires": timedelta(days=1),
    "task_always_eager": False,
    "task_default_priority": None,
    "task_default_queue": None,
    "task_default_routing_key": None,
    "task_eager_propagates": False,
    "task_ignore_result": False,
    "task_routes": None,
    "task_soft_time_limit": None,
    "task_time_limit": None,
    "task_track_started": False,
    "timezone": None,
}
"""Their defaults, by name."""

# Names of one setting each, and beginnings of many.
_WITHOUT_MEANING = frozenset(
    [
        "accept_content",
        "task_acks_late",
        "task_acks_on_failure_or_timeout",
        "task_compression",
        "task_create_missing_queues",
        "task_default_delivery_mode",
        "task_default_exchange",
        "task_default_exchange_type",
        "task_default_queue_type",
        "task_inherit_parent_priority",
        "task_protocol",
        "task_publish_retry",
        "task_publish_retry_policy",
        "task_queue_max_priority",
        "task_queues",
        "task_reject_on_worker_lost",
        "task_remote_tracebacks",
        "task_send_sent_event",
        "task_serializer",
        "task_store_eager_result",
        "task_store_errors_even_if_ignored",
        "task_allow_error_cb_on_chord_header",
        "beat_max_loop_interval",
        "beat_schedule_filename",
        "beat_sync_every",
        "beat_cron_starting_deadline",
    ]
)
_WITHOUT_MEANING_FROM = (
    *("arangodb_", "azureblockblob_", "broker_", "cache_", "cassandra_", "control_", "cosmosdbsql_", "couchbase_"),
    *("couchdb_", "database_", "dynamodb_", "elasticsearch_", "event_", "gcs_", "mongodb_", "redis_", "result_"),
    *("s3_", "security_", "worker_"),
)

_REFUSED = {
    "beat_scheduler": "schedules that are made at run time live in the database, see greenjobs.schedules.add",
    "task_annotations": "give the options to the tasks themselves, or to a base class",
    "task_default_rate_limit": "give such tasks a queue of their own, and a small pool: greenjobs run --queue NAME:1",
}
_JSON = ("json", "application/json")

# Those of old whose new names follow no rule.
_FORMER_NAMES = {
    "BROKER_URL": "broker_url",
    "CELERYBEAT_SCHEDULE": "beat_schedule",
    "CELERYBEAT_SCHEDULER": "beat_scheduler",
    "CELERYD_TASK_SOFT_TIME_LIMIT": "task_soft_time_limit",
    "CELERYD_TASK_TIME_LIMIT": "task_time_limit",
    "CELERY_ACKS_LATE": "task_acks_late",
    "CELERY_ALWAYS_EAGER": "task_always_eager",
    "CELERY_ANNOTATIONS": "task_annotations",
    "CELERY_DEFAULT_QUEUE": "task_default_queue",
    "CELERY_EAGER_PROPAGATES_EXCEPTIONS": "task_eager_propagates",
    "CELERY_IGNORE_RESULT": "task_ignore_result",
    "CELERY_QUEUES": "task_queues",
    "CELERY_ROUTES": "task_routes",
    "CELERY_TASK_RESULT_EXPIRES": "result_expires",
    "CELERY_TRACK_STARTED": "task_track_started",
}
_FORMER_BEGINNINGS = {"BROKER_": "broker_", "CELERYD_": "worker_", "CELERYBEAT_": "beat_", "CELERY_": ""}


class Conf(dict[str, Any]):
    """The settings of one application, as a mapping and as attributes. Raises Unsupported and ImproperlyConfigured."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(USED, beat_schedule={})  # one of its own, to be added to
        self._said: set[str] = set()
        self.update(given)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self[name] = value

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(_modern(name))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(_modern(name) if isinstance(name, str) else name)

    def get(self, name: str, default: Any = None) -> Any:
        """The setting of this name, new or old."""
        return super().get(_modern(name), default)

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, *given: Any, **more: Any) -> None:
        """Take these settings; what else there is, such as those of Flask, is kept, and is nobody's business here."""
        ignored = []
        for name, value in dict(*given, **more).items():
            modern = _modern(name)
            _refuse(modern, value)
            super().__setitem__(modern, value)
            # What somebody wrote, as against what frameworks fill in.
            if value is not None and value != () and (_is_without_meaning(modern) or modern in ("broker_url",)):
                ignored.append(modern)
            elif modern.islower() and modern not in USED and not _is_without_meaning(modern):
                self._say(modern, "Celery's setting %s is unknown here, and kept for your own code", modern)
        _adopt_database(self.get("broker_url"), self.get("result_backend"))
        new = sorted(set(ignored) - self._said)
        if new:
            self._said.update(new)
            logger.info(
                "these settings of Celery have no meaning in greenjobs, whose jobs are rows in PostgreSQL: %s",
                ", ".join(new),
            )

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As that of a dict."""
        if name not in self:
            self[name] = default
        return self[name]

    def _say(self, name: str, message: str, *words: object) -> None:
        if name not in self._said:
            self._said.add(name)
            logger.warning(message, *words)

    @property
    def keeps_results(self) -> bool:
        """Whether a result backend is named, which here says that finished tasks are kept."""
        return bool(self["result_backend"]) and str(self["result_backend"]) not in ("disabled", "disabled://")

    @property
    def result_seconds(self) -> float:
        """How long finished tasks are kept."""
        expires = self["result_expires"]
        if expires is None:
            return duration("36500 days")
        try:
            return duration(expires)
        except ValueError:
            raise ImproperlyConfigured(
                f"result_expires is {expires!r}; allowed: {DURATION_FORMS}; None for ever"
            ) from None

    @property
    def smaller_is_earlier(self) -> bool:
        """Whether priorities count as with the broker that is named: on Redis 0 comes first."""
        return str(self["broker_url"] or "").startswith(("redis", "sentinel", "unix"))


def read(source: Any, namespace: str | None = None) -> dict[str, Any]:
    """The settings in a mapping, an object, or the module or object of that name, with the namespace's if one is given.

    Raises ImproperlyConfigured when there is none of that name.
    """
    if isinstance(source, str):
        source = _imported(source)
    if isinstance(source, Mapping):
        found = {str(name): value for name, value in source.items()}
    else:
        # A module has all that it imported, too.
        found = {
            name: value
            for name, value in ((each, getattr(source, each)) for each in dir(source) if not each.startswith("_"))
            if _modern(name) in USED or _is_without_meaning(_modern(name)) or _modern(name) in _REFUSED
        }
        if namespace:
            prefix = f"{namespace}_"
            found |= {each: getattr(source, each) for each in dir(source) if each.startswith(prefix)}
    if not namespace:
        return found
    prefix = f"{namespace}_"
    return {
        (name.removeprefix(prefix).lower() if namespace.isupper() else name.removeprefix(prefix)): value
        for name, value in found.items()
        if name.startswith(prefix)
    }


def modules(conf: Conf) -> Iterator[str]:
    """Those that `imports` and `include` name."""
    for name in ("imports", "include"):
        given: str | Iterable[str] = conf[name] or ()
        yield from (given,) if isinstance(given, str) else given


def _imported(name: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        parent, dot, last = module_name.rpartition(".")
        if not dot or error.name != module_name:
            raise ImproperlyConfigured(f"config_from_object: there is no module {name!r} in {os.getcwd()}") from error
        module, colon, attribute = importlib.import_module(parent), ":", last
    return getattr(module, attribute) if colon else module


def _modern(name: str) -> str:
    if not name.isupper():
        return name
    if name in _FORMER_NAMES:
        return _FORMER_NAMES[name]
    for former, modern in _FORMER_BEGINNINGS.items():
        candidate = modern + name.removeprefix(former).lower()
        if name.startswith(former) and (candidate in USED or _is_without_meaning(candidate) or candidate in _REFUSED):
            return candidate
    return name


def _is_without_meaning(name: str) -> bool:
    return name not in USED and (name in _WITHOUT_MEANING or name.startswith(_WITHOUT_MEANING_FROM))


def _refuse(name: str, value: Any) -> None:
    if name in _REFUSED and value is not None:
        raise Unsupported(f"Celery's setting {name} is not in greenjobs: {_REFUSED[name]}")
    if name in ("task_serializer", "result_serializer") and value not in (None, *_JSON):
        raise Unsupported(
            f"{name} is {value!r}, and greenjobs stores JSON: take the setting out, and pass what JSON has, such as "
            f"ids; annotated parameters may be datetime, Decimal, UUID, Enum, sets, tuples and dataclasses"
        )


def _adopt_database(*urls: object) -> None:
    """Let the first that is PostgreSQL's be the database of the jobs, where no other is named."""
    for url in urls:
        text = str(url or "").removeprefix("sqla+").removeprefix("db+")
        if text.startswith(("postgres://", "postgresql")) and config.current().database_url is None:
            try:
                database_url = config.OPTIONS["database_url"].parse(text)
            except ValueError:  # of another driver
                continue
            config.adopt(config.Layer({}, {"database_url": database_url}))
