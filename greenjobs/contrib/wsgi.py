"""greenjobs in any WSGI application, such as one of Bottle, Falcon, Pyramid or web.py: a middleware.

    application = GreenJobs(application, connection=connection_of_request)

In a request, jobs join the transaction that the application names, or are held until the request has succeeded, and the
settings are those of this application. Its jobs run in the same surroundings as its requests.

Each request has a context of its own (contextvars), in which all of it runs: the call, every step of a response that
streams, and its close. So requests share nothing, in whichever threads or greenlets a server runs their parts, and what
an inner application of the same kind sets ends with it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, copy_context
from types import ModuleType
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

from greenjobs import alchemy, config
from greenjobs.contrib import scopes
from greenjobs.current import current_job
from greenjobs.errors import ConfigError
from greenjobs.holding import Held, Hold, release
from greenjobs.loading import EARLY_OPTIONS

if TYPE_CHECKING:
    from greenjobs.runner import Runner, RunnerHandle

__all__ = ["GreenJobs", "active_environ"]

logger = logging.getLogger(__name__)

Environ = MutableMapping[str, Any]
Application = Callable[..., Iterable[bytes]]

# The names by which servers look for an application in a module.
_NAMES = ("application", "app")


class GreenJobs:
    """The middleware, and what the application has of greenjobs.

    `connection(environ)` returns that on which the jobs of a request are enqueued, as for `.options(connection=…)`:
    they are part of its transaction, which the application commits. With None, a job has a transaction of its own, at
    once, or with `hold=True`, when the request has succeeded. `around(environ)` returns a context manager, in which
    each request is answered, and each job runs. All other arguments are settings. Raises ConfigError.
    """

    def __init__(
        self,
        application: Application,
        *,
        connection: Callable[[Environ], Any] | None = None,
        hold: bool = False,
        around: Callable[[Environ], AbstractContextManager[Any]] | None = None,
        **settings: Any,
    ) -> None:
        for name, given in (("application", application), ("connection", connection), ("around", around)):
            if not callable(given) and (given is not None or name == "application"):
                raise ConfigError(f"GreenJobs takes a callable as {name}, not {given!r}")
        if not isinstance(hold, bool):
            raise ConfigError(f"hold is {hold!r} (GreenJobs); the value must be True or False.")
        self.app = application
        self.holds = hold
        self.connection = connection
        self._around = around
        self._layer = config.Layer(_checked(settings), {})
        _made.add(self)
        scopes.install(_scope)
        self.adopt()

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request, as WSGI has it."""
        return _Answer(_Request(self, environ, holds=self.holds), start_response).begin()

    @property
    def settings(self) -> config.Settings:
        """Those of the application, complete."""
        return self._layer.settings()

    def adopt(self) -> None:
        """Let its settings be those of the process, where no other application is active."""
        config.adopt(self._layer)

    def equip(self, runner: Runner) -> None:
        """Let every job run in the surroundings of the application, as `greenjobs run` does by itself."""
        runner.surround(self.context)

    def check(self, handle: RunnerHandle) -> None:
        """Nothing is known here that could be wrong with a runner."""

    def surroundings(self, environ: Environ) -> AbstractContextManager[Any]:
        """What is around a request, or a job, with this environ."""
        return contextlib.nullcontext() if self._around is None else self._around(environ)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The surroundings of one job: those of a request, without a response, and with an environ of its own."""
        environ: dict[str, Any] = {"wsgi.errors": sys.stderr}
        if current_job:
            environ |= {"greenjobs.job_type": current_job.name, "greenjobs.job_id": current_job.id}
        setup_testing_defaults(environ)
        request = _Request(self, environ, holds=False)
        former = _active.set(request)
        try:
            with self.surroundings(environ):
                yield
        finally:
            request.end()
            _active.reset(former)


def active_environ() -> Environ | None:
    """The environ of the request that is answered here, or of the job that runs here; None outside of both."""
    request = _active.get(None)
    return None if request is None or request.is_over else request.environ


def equipment_of(found: Any, name: str) -> GreenJobs | None:
    """The middleware that was found under this name: as an object, in a module, or else the only one that there is.
    None when there is none. Raises ConfigError when it is not clear which.
    """
    if isinstance(found, GreenJobs):
        return found
    names = vars(found) if isinstance(found, ModuleType) else {}
    inside = {key: each for key, each in names.items() if isinstance(each, GreenJobs)}
    named = [inside[key] for key in _NAMES if key in inside]
    candidates = named or list(set(inside.values())) or list(_made)
    if len(candidates) > 1 and not named:
        raise ConfigError(
            f"app is {name!r}, and jobs are to run as in a WSGI application, but there are {len(candidates)} with "
            f"GreenJobs(…); name the one, as in myapp:application"
        )
    return candidates[0] if candidates else None


class _Request(Hold):
    """One request to one application, or one of its jobs, as far as jobs are concerned that are enqueued in it."""

    def __init__(self, jobs: GreenJobs, environ: Environ, *, holds: bool) -> None:
        self.jobs = jobs
        self.environ = environ
        self.is_over = False
        self._holds = holds
        self._held: list[Held] = []
        # A thread that has a copy of the context may enqueue while the request ends.
        self._lock = threading.Lock()

    def connection_for(self, database_url: str) -> Any:
        """What a job is to be enqueued on; the request itself for later."""
        if self.is_over or database_url != self.jobs.settings.database_url:
            return None
        given = None if self.jobs.connection is None else self.jobs.connection(self.environ)
        if not alchemy.takes_statements(given):  # in a hook such as after_commit of that session
            given = None
        return self if given is None and self._holds else given

    def take(self, held: Held) -> None:
        with self._lock:
            if not self.is_over:
                self._held.append(held)
                return
        held.settle(held.enqueue())

    @property
    def holds_jobs(self) -> bool:
        """Whether there are jobs that wait for its end."""
        return bool(self._held)

    def end(self) -> list[Held]:
        """From now on nothing is held; returns what was."""
        with self._lock:
            self.is_over = True
            held, self._held = self._held, []
        return held


_active: ContextVar[_Request] = ContextVar("greenjobs_wsgi_request")


class _Answer:
    """The answer to a request, from the call of the application to the close of what it returned."""

    def __init__(self, request: _Request, start_response: Callable[..., Any]) -> None:
        self._request = request
        self._start_response = start_response
        self._context = copy_context()
        self._status = ""
        self._around: AbstractContextManager[Any] | None = None
        self._body: Any = None
        self._chunks: Iterator[bytes] = iter(())
        self._error: BaseException | None = None
        self._is_closed = False

    def begin(self) -> Iterable[bytes]:
        try:
            self._body = body = self._context.run(self._call)
            if not _is_complete(body, self._request.environ):
                self._chunks = self._context.run(iter, body)
                return self
        except BaseException as error:
            self._is_closed = True
            self._context.run(self._end, error)
            raise
        # Nothing of the application's is left to run. So the jobs are there before the client hears of success, and
        # where they cannot be, the server still says so.
        self._context.run(self._end, None)
        return body  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            return self._context.run(next, self._chunks)
        except StopIteration:
            if self._request.holds_jobs:
                # What commits at the close has to come first, and the client is still there to be told of an error.
                self.close()
            raise
        except BaseException as error:
            self._error = error
            raise

    def close(self) -> None:
        """The server is done with the response, or will be when it has sent what it was given."""
        if not self._is_closed:
            self._is_closed = True
            self._context.run(self._close)

    def _call(self) -> Any:
        _active.set(self._request)
        around = self._request.jobs.surroundings(self._request.environ)
        around.__enter__()
        self._around = around
        return self._request.jobs.app(self._request.environ, self._start)

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        self._status = status
        if exc_info is None:
            return self._start_response(status, headers)
        return self._start_response(status, headers, exc_info)

    def _close(self) -> None:
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        except BaseException as error:
            self._end(self._error or error)
            raise
        self._end(self._error)

    def _end(self, error: BaseException | None) -> None:
        """End what is around the request, and then release what it holds, if all went well."""
        try:
            if self._around is not None:
                self._around.__exit__(
                    *(None, None, None) if error is None else (type(error), error, error.__traceback__)
                )
        except BaseException as failure:
            _drop(self._request.end(), f"ended with {type(failure).__name__}")
            if failure is not error:
                raise
            return
        held = self._request.end()
        if error is not None:
            _drop(held, f"ended with {type(error).__name__}")
        elif not self._status.startswith(("1", "2", "3")):
            _drop(held, f"was answered with {self._status or 'no status'}")
        elif held:
            self._release(held)

    def _release(self, held: list[Held]) -> None:
        try:
            release(held, self._request.jobs.settings)
        except BaseException:
            logger.error(
                "a request has succeeded, and the jobs that it held could not be enqueued, and are lost: %s",
                _named(held),
            )
            raise


def _is_complete(body: Any, environ: Environ) -> bool:
    """Whether all of the application has run: it returned the whole response, or a file for the server to send."""
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, type) and isinstance(body, wrapper):
        return True
    return isinstance(body, (list, tuple)) and not hasattr(body, "close")


def _drop(held: list[Held], why: str) -> None:
    if held:
        logger.info("a request %s; the jobs that it held are not enqueued: %s", why, _named(held))


def _named(held: list[Held]) -> str:
    return ", ".join(f"{each.job_type} ({len(each.handles)})" for each in held)


def _active_settings() -> config.Settings | None:
    request = _active.get(None)
    return None if request is None else request.jobs.settings


def _active_connection(database_url: str, job: str) -> Any:
    request = _active.get(None)
    return None if request is None else request.connection_for(database_url)


_scope = scopes.Scope(scopes.WSGI, _active_settings, _active_connection)
_made: weakref.WeakSet[GreenJobs] = weakref.WeakSet()


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    for name in EARLY_OPTIONS:
        if settings.get(name) is not None:
            raise ConfigError(
                f"GreenJobs has {name}, which counts before the application is loaded; set it in the environment, in "
                f"setup.cfg or pyproject.toml, or on the command line"
            )
    try:
        return config.check(settings, "an argument of GreenJobs")
    except TypeError as error:
        raise ConfigError(f"GreenJobs(…): {error}") from None
