"""Checks of this process: whether what is written for threads waits cooperatively in it."""

from __future__ import annotations

import _thread
import functools
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import gevent
import gevent.monkey
import greenlet
import psycopg2
from gevent.resolver import blocking
from psycopg2 import extensions

from greenjobs import green
from greenjobs.doctor.blocking import blocking_modules
from greenjobs.doctor.case import Case, Check
from greenjobs.doctor.finding import Verdict, fail, ok, several, skipped, warn
from greenjobs.version import __version__

# The first libpq that knows tcp_user_timeout, which every connection of ours names.
_MINIMUM_LIBPQ = 120000

_SLEEP_SECONDS = 0.02

# For each job a connection to somebody, and what else a process has open.
_FILES_BESIDE_JOBS = 100

# Imported before the patches, these may keep what gevent replaces where nothing can see it: in their objects.
_SENSITIVE = (
    *("botocore", "celery", "flask", "grpc", "httpx", "kombu", "pymongo", "redis", "requests", "sentry_sdk"),
    *("sqlalchemy", "urllib3", "werkzeug"),
)

# They take the originals on purpose.
_KNOWING = ("gevent", "greenlet", "greenjobs", "psycogreen", "psycopg2", "zope")

# What `opentelemetry-instrument` imports before it patches: they hold their locks for an instant, and never wait then.
_HARMLESS = ("opentelemetry.util._once", "wrapt.importer", "wrapt.synchronization")

# Of what gevent replaces, that in which a job would wait, or which it would share with others, if it had the original.
# The rest is bookkeeping, or finds by itself what has taken the place of its parts, as threading.Event does.
_WAITING = {
    "time": ("sleep",),
    "socket": ("SocketType", "create_connection", "getaddrinfo", "gethostbyname", "socket", "socketpair"),
    "ssl": ("SSLContext", "SSLSocket", "wrap_socket"),
    "select": ("epoll", "kqueue", "poll", "select"),
    "selectors": ("DefaultSelector", "EpollSelector", "KqueueSelector"),
    "threading": ("Lock", "local"),
    "subprocess": ("Popen",),
    "queue": ("SimpleQueue",),
    "os": ("fork", "waitpid"),
}

_RIGHT_START = (
    "start with `greenjobs run`, which patches first; what brings its modules along into every program (a .pth file, "
    "sitecustomize, a wrapper such as ddtrace-run or opentelemetry-instrument) has to be started from the application "
    "instead, or to patch gevent before"
)


def versions(case: Case) -> Verdict:
    """Who takes part."""
    libpq = extensions.libpq_version()
    driver = psycopg2.__version__.partition(" ")[0]  # type: ignore[attr-defined]  # the stubs lack it
    text = (
        f"greenjobs {__version__}, Python {platform.python_version()}, gevent {gevent.__version__}, greenlet "
        f"{greenlet.__version__}, psycopg2 {driver}, libpq {_libpq_text(libpq)}"
    )
    if libpq < _MINIMUM_LIBPQ:
        return fail(f"{text}: this libpq is too old to connect", "install psycopg2-binary, which brings a newer one")
    return ok(text)


def application(case: Case) -> Verdict:
    """Whether the application can be loaded, and what jobs it has."""
    found = case.application
    if found.error is not None:
        return fail(f"cannot be loaded: {found.error}", "mend it: `greenjobs run` ends at once")
    if found.name is None:
        return skipped("none is named; --app names the one whose jobs are to be looked at")
    if not found.jobs:
        return warn(f"{found.name} declares no jobs", "name the module that does with --app")
    return ok(f"{found.name} declares {several(sorted(found.jobs), case.limits)}")


def patches(case: Case) -> Verdict:
    """Whether the standard library and psycopg2 are cooperative."""
    missing = green.missing_patches()
    if missing:
        return fail(
            f"not cooperative in this process: {', '.join(missing)}",
            "start it with `greenjobs run`, or call greenjobs.green.patch() before anything else is imported",
        )
    if not green.has_wait_callback():
        return warn(
            "psycopg2 waits cooperatively, but by the wait callback of somebody else: timeouts and cancels leave "
            "statements running on the server",
            "leave out patch_psycopg() and set_wait_callback() of your own; `greenjobs run` has done it",
        )
    return ok("the standard library is patched, and psycopg2 waits through gevent")


def early_imports(case: Case) -> Verdict:
    """Which modules were imported so soon that they keep what gevent replaced."""
    originals, locks = set[str](), set[str]()
    for module in _early_modules():
        if kept := sorted(_kept(module)):
            originals.add(f"{module.__name__} ({', '.join(kept)})")
        elif kept := sorted(_native_locks(module)):
            locks.add(f"{module.__name__} ({', '.join(kept)})")
    if originals:
        shown = several(sorted(originals), case.limits)
        return fail(f"imported before gevent's patches, with functions that hold up all jobs: {shown}", _RIGHT_START)
    if locks:
        shown = several(sorted(locks), case.limits)
        return warn(
            f"imported before gevent's patches, with locks at which a job stops all others: {shown}", _RIGHT_START
        )
    sensitive = [name for name in _SENSITIVE if name in (green.imported_before or ())]
    if sensitive:
        shown = ", ".join(sensitive)
        return warn(f"imported before gevent's patches, which their objects may lack: {shown}", _RIGHT_START)
    return ok("no module keeps what gevent replaced")


def sleep(case: Case) -> Verdict:
    """Whether two that sleep do so at the same time."""
    events: list[str] = []

    def nap() -> None:
        events.append("begins")
        time.sleep(_SLEEP_SECONDS)
        events.append("ends")

    gevent.joinall([gevent.spawn(nap), gevent.spawn(nap)], raise_error=True)
    if events[:2] == ["begins", "begins"]:
        return ok("two time.sleep overlap")
    return fail("two time.sleep come one after the other", _RIGHT_START)


def resolver(case: Case) -> Verdict:
    """Whether names of hosts are looked up beside the event loop."""
    kind = type(gevent.get_hub().resolver)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if issubclass(kind, blocking.Resolver):
        return fail(
            "host names are looked up by GEVENT_RESOLVER=block, which holds up all jobs meanwhile",
            "unset GEVENT_RESOLVER; the default asks in native threads",
        )
    if not gevent.monkey.is_object_patched("socket", "getaddrinfo"):
        return fail("socket.getaddrinfo is not patched, and holds up all jobs meanwhile", _RIGHT_START)
    return ok(f"host names are looked up by {name}")


def open_files(case: Case) -> Verdict:
    """Whether the system lets as many connections be open as jobs may have."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = jobs_at_a_time(case) + _FILES_BESIDE_JOBS
    if limit != resource.RLIM_INFINITY and limit < needed:
        return warn(
            f"this process may open {limit} files and sockets; with one for each of {jobs_at_a_time(case)} jobs at a "
            f"time it needs about {needed}",
            f"raise the limit, as with `ulimit -n {2 * needed}`, or LimitNOFILE= of systemd",
        )
    return ok(f"up to {'any number of' if limit == resource.RLIM_INFINITY else limit} files and sockets may be open")


def jobs_at_a_time(case: Case) -> int:
    """How many jobs a process runs at most; of all the queues of the application, where nobody says otherwise."""
    settings = case.settings
    if case.application.jobs_at_a_time is not None:
        return case.application.jobs_at_a_time
    if settings.share is not None:
        return settings.share
    queues = {job.queue for job in case.application.jobs.values()}
    return settings.pool * max(1, len(queues))


def application_pools(case: Case) -> Verdict:
    """Whether the application lends its jobs as many connections to its databases as there are jobs."""
    narrow_pools = case.application.narrow_pools
    if narrow_pools is None:
        return skipped("the application uses no extension of greenjobs for Flask, which would know of its engines")
    told = narrow_pools(jobs_at_a_time(case))
    if told:
        message, _, remedy = "; ".join(told).partition("; ")
        return warn(message, remedy)
    return ok("no engine of SQLAlchemy lends fewer connections than jobs run at a time")


CHECKS = (
    Check("versions", versions),
    Check("application", application),
    Check("patches", patches),
    Check("early imports", early_imports),
    Check("sleep", sleep),
    Check("resolver", resolver),
    Check("blocking modules", blocking_modules),
    Check("open files", open_files),
    Check("application pools", application_pools, needs=("application",)),
)

AT_START = ("patches", "early imports", "resolver", "blocking modules", "open files")
"""Those of them that take no time to speak of; `greenjobs run` makes them, too."""


def _libpq_text(version: int) -> str:
    return f"{version // 10000}.{version % 10000}"


def _early_modules() -> Iterator[ModuleType]:
    """Those that were imported before the patches: a later one that has an original asked gevent for it.

    Where it is not known which those are, because somebody else patched, all of them.
    """
    for name in list(sys.modules) if green.imported_before is None else green.imported_before:
        module = sys.modules.get(name)
        top = name.partition(".")[0]
        # Not every module is one: some put objects of their own there, which load more when they are looked at.
        is_looked_at = top not in _KNOWING and top not in sys.stdlib_module_names and name not in _HARMLESS
        if isinstance(module, ModuleType) and is_looked_at:
            yield module


def _kept(module: ModuleType) -> Iterator[str]:
    """The names in a module of originals that gevent replaced, and of classes that are made from them."""
    originals = _originals()
    for name, value in list(vars(module).items()):
        # By the type itself: a proxy pretends to be of another, and looks for its object when it is asked.
        made_from = value.__mro__ if issubclass(type(value), type) else (value,)
        if any(id(each) in originals for each in made_from):
            yield name


def _native_locks(module: ModuleType) -> Iterator[str]:
    kinds = (type(gevent.monkey.get_original("_thread", "allocate_lock")()), _thread.RLock)
    return (name for name, value in list(vars(module).items()) if type(value) in kinds)


@functools.cache
def _originals() -> Mapping[int, Any]:
    """By their address, with what keeps that theirs."""
    found = {}
    for module, names in _WAITING.items():
        for name in names:
            original = _saved().get(module, {}).get(name)
            if original is not None and original is not getattr(sys.modules[module], name, None):
                found[id(original)] = original
    return found


def _saved() -> Mapping[str, Mapping[str, Any]]:
    saved: Mapping[str, Mapping[str, Any]] = gevent.monkey.saved  # type: ignore[attr-defined]  # the stubs lack it
    return saved
