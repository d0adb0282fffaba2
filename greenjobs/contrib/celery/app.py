"""`Celery`, `shared_task`, and which application is the current one.

A task is made of its function when it is first used, not when it is declared: by then the application may have got its
settings, and another class of tasks. Its job is there from the beginning, for a runner to find.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from greenjobs import config
from greenjobs.contrib.celery import options as opts
from greenjobs.contrib.celery import schedules, settings
from greenjobs.contrib.celery.canvas import Signature, signature
from greenjobs.contrib.celery.exceptions import ImproperlyConfigured, NotRegistered, Unsupported, no_attribute
from greenjobs.contrib.celery.result import AsyncResult, EagerResult
from greenjobs.contrib.celery.task import Task, prepare, refuse
from greenjobs.contrib.celery.task_job import TaskJob
from greenjobs.errors import JobDefinitionError
from greenjobs.job import JobSchedule, before_listing, register

logger = logging.getLogger(__name__)

# What Celery's constructor is given to be built of.
_CELERYS_OWN = frozenset(
    {"amqp", "autofinalize", "changes", "control", "events", "fixups", "loader", "log", "strict_typing", "tasks"}
)

_OF_BROKERS = "there are neither brokers nor backends, only the database: greenjobs.connection(), greenjobs.jobs"
_NOT_HERE = {
    **dict.fromkeys(
        ("amqp", "backend", "broker_connection", "connection", "connection_for_read", "connection_for_write"),
        _OF_BROKERS,
    ),
    **dict.fromkeys(("connection_or_acquire", "pool", "producer_or_acquire", "producer_pool"), _OF_BROKERS),
    **dict.fromkeys(("events", "log", "loader"), "see greenjobs.events, and the docs about logs"),
    **dict.fromkeys(("steps", "user_options", "select_queues"), "`greenjobs run` has options, and no bootsteps"),
}

_COMMANDS = "greenjobs has commands of its own: `greenjobs run`, `greenjobs status`, `greenjobs jobs list`"


class Celery:
    """An application of Celery's: settings, and a class of tasks. Brokers and backends are not connected to."""

    def __init__(
        self,
        main: str | None = None,
        *,
        broker: str | None = None,
        backend: str | None = None,
        include: Iterable[str] | None = None,
        config_source: Any = None,
        task_cls: type[Task] | str | None = None,
        namespace: str | None = None,
        set_as_current: bool = True,
        **others: Any,
    ) -> None:
        self.main = main or "__main__"
        given = {"broker_url": broker, "result_backend": backend, "include": include}
        said = {name: value for name, value in given.items() if value is not None}
        more = {name: value for name, value in others.items() if name not in _CELERYS_OWN}
        self.conf = settings.Conf({**said, **(others.get("changes") or {}), **more})
        base: type[Task] = Task
        if isinstance(task_cls, str):
            module_name, _, attribute = task_cls.replace(":", ".").rpartition(".")
            base = getattr(importlib.import_module(module_name), attribute)
        elif task_cls is not None:
            base = task_cls
        self.Task: Any = type("Task", (base,), {"app": self})
        self.tasks = Tasks()
        self.control = Control()
        self.on_after_configure = Signal()
        self.on_after_finalize = Signal()
        self.on_configure = Signal()
        self._packages: list[tuple[Any, str]] = []
        self._periodic: dict[str, dict[str, Any]] = {}
        self._is_loaded = False
        if config_source is not None:
            self.config_from_object(config_source, namespace=namespace)
        _applications.append(weakref.ref(self))
        if set_as_current:
            _current.latest = self

    def __repr__(self) -> str:
        return f"<Celery {self.main}>"

    def __getattr__(self, name: str) -> NoReturn:
        no_attribute(self, name, _NOT_HERE)

    # --- settings -----------------------------------------------------------------------------------------------------

    def config_from_object(
        self, obj: Any, silent: bool = False, force: bool = False, namespace: str | None = None
    ) -> None:
        """Take the settings in a mapping, an object, or the module or object of that name. Raises Unsupported and
        ImproperlyConfigured."""
        self.conf.update(settings.read(obj, namespace))

    def config_from_envvar(self, variable_name: str, silent: bool = False, force: bool = False) -> None:
        """Take the settings of the module that an environment variable names."""
        name = os.environ.get(variable_name)
        if name:
            self.config_from_object(name)
        elif not silent:
            raise ImproperlyConfigured(f"the environment variable {variable_name} is not set")

    def add_defaults(self, fun: Any) -> None:
        """Take these settings, where nothing is said yet."""
        given = fun() if callable(fun) else fun
        self.conf.update({name: value for name, value in dict(given).items() if self.conf.get(name) is None})

    def set_default(self) -> None:
        """Let it be the application of shared tasks."""
        _current.default = self

    def set_current(self) -> None:
        """As set_default."""
        _current.default = self

    def finalize(self, auto: bool = False) -> None:
        """Nothing that has to be done here."""

    def close(self) -> None:
        """Nothing that has to be done here."""

    # --- tasks --------------------------------------------------------------------------------------------------------

    def task(self, *args: Any, **options: Any) -> Any:
        """Make a function a task: `@app.task`, or `@app.task(bind=True, …)`. Raises Unsupported, JobDefinitionError."""
        return _decorated(self, args, options)

    def register_task(self, task: Any, **_: Any) -> Any:
        """Make an instance of a class with a method `run` a task, or of the class one."""
        instance = task() if isinstance(task, type) else task
        kind = type(instance)
        instance.name = instance.name or f"{kind.__module__}.{kind.__qualname__}"
        instance.app = self
        prepare(instance)
        instance.job = _declare(kind.run, instance.name, bind=True, find_task=lambda: instance)
        tasks[instance.name] = instance
        return instance

    def gen_task_name(self, name: str, module: str) -> str:
        """How a task is called whose function is of that name, in that module."""
        return f"{self.main if module == '__main__' else module}.{name}"

    def autodiscover_tasks(self, packages: Any = None, related_name: str | None = "tasks", force: bool = False) -> None:
        """Import the module `tasks` of each package, no earlier than a runner starts, or a task is looked for by name.

        `packages` may be a function that returns them. Of a Django project they are its apps, if none are named.
        """
        if packages is None and not _is_of_django():
            raise ImproperlyConfigured(
                "autodiscover_tasks of what? Name the packages, as in autodiscover_tasks(['shop']), or set "
                "DJANGO_SETTINGS_MODULE"
            )
        self._packages.append((_apps_of_django if packages is None else packages, related_name or "tasks"))
        if force:
            self.load()

    def load(self) -> None:
        """Import what `imports`, `include` and autodiscover_tasks name, and tell on_after_configure; once.

        A Django project is set up before. Raises ConfigError where that cannot be, and whatever the modules raise.
        """
        if self._is_loaded:
            return
        self._is_loaded = True
        try:
            self._load()
        except BaseException:
            self._is_loaded = False
            raise

    def _load(self) -> None:
        if _is_of_django():
            from greenjobs.contrib.django.loading import set_up

            set_up()
        for name in settings.modules(self.conf):
            importlib.import_module(name)
        for packages, related_name in self._packages:
            for package in packages() if callable(packages) else packages:
                _import_if_there(f"{package}.{related_name}")
        for signal in (self.on_configure, self.on_after_configure, self.on_after_finalize):
            signal.send(self)

    def send_task(
        self, name: str, args: Any = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult | EagerResult:
        """Enqueue a task by its name. Raises NotRegistered for one that this process does not know."""
        return find_task(name).apply_async(args, kwargs, **options)

    def signature(self, *args: Any, **kwargs: Any) -> Signature:
        """A call that is not made yet."""
        return signature(*args, **kwargs)

    def AsyncResult(self, task_id: str | int, **_: Any) -> AsyncResult:
        """The result of that id."""
        return AsyncResult(task_id, app=self)

    # --- schedules ----------------------------------------------------------------------------------------------------

    def add_periodic_task(
        self, schedule: Any, sig: Any, args: Any = (), kwargs: Any = (), name: str | None = None, **options: Any
    ) -> str:
        """Enqueue a signature by the clock; call it in a function that is connected to on_after_configure."""
        call = sig.clone(args, dict(kwargs or {})) if isinstance(sig, Signature) else sig.signature(args, kwargs)
        name = name or repr(call)
        self._periodic[name] = {
            "task": call.task,
            "schedule": schedule,
            "args": call.args,
            "kwargs": call.kwargs,
            "options": {**call.options, **options},
        }
        return name

    def schedules_of(self, job: TaskJob) -> Iterator[JobSchedule]:
        """The schedules of the settings, and of add_periodic_task, that are about this job. Raises NotRegistered,
        ImproperlyConfigured and Unsupported, also about others."""
        for name, entry in {**(self.conf.beat_schedule or {}), **self._periodic}.items():
            task = find_task(_entry(name, entry, "task"))
            if task.name != job.name:
                continue
            given = dict(entry.get("options") or {})
            refused = sorted(given.keys() - {"queue", "routing_key", "priority"} - opts.WITHOUT_MEANING)
            if refused:
                raise Unsupported(
                    f"beat_schedule: {name!r} has the option {refused[0]!r}; a schedule has queue and priority; give "
                    f"the others to the task"
                )
            options = {**task.own_options(), **given}
            args = opts.positional(f"beat_schedule: {name!r}", entry.get("args"))
            kwargs = dict(entry.get("kwargs") or {})
            routed = opts.routed(self.conf, task, args, kwargs, options)
            yield JobSchedule(
                name,
                schedules.timetable(name, _entry(name, entry, "schedule"), opts.zone_name(self.conf)),
                job.codec.encode(args, kwargs, max_bytes=config.current().max_payload_bytes),
                routed.get("queue") or routed.get("routing_key"),
                opts.priority(self.conf, routed.get("priority")),
            )

    # --- what is not here ---------------------------------------------------------------------------------------------

    def worker_main(self, *_: Any, **__: Any) -> NoReturn:
        """Not in greenjobs."""
        raise Unsupported(f"Celery's commands are not in greenjobs; {_COMMANDS}")

    start = Worker = Beat = worker_main


class Tasks(Mapping[str, Any]):
    """All tasks of this process by name."""

    def __getitem__(self, name: str) -> Any:
        return tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tasks)

    def __len__(self) -> int:
        return len(tasks)


class Signal:
    """One of the signals of an application: functions that are called when it is set up."""

    def __init__(self) -> None:
        self._receivers: list[Callable[..., Any]] = []

    def connect(self, receiver: Callable[..., Any] | None = None, **_: Any) -> Any:
        """Call this function; can be used as a decorator."""
        if receiver is None:
            return self.connect
        self._receivers.append(receiver)
        return receiver

    def send(self, sender: Celery) -> None:
        """Call them."""
        for receiver in self._receivers:
            receiver(sender=sender, signal=self, source=sender.conf)


class Control:
    """`app.control`, as far as it is about single tasks."""

    def revoke(self, task_id: Any, terminate: bool = False, **_: Any) -> None:
        """As AsyncResult.revoke, for one id or several."""
        for each in task_id if isinstance(task_id, (list, tuple, set)) else (task_id,):
            AsyncResult(each).revoke(terminate=terminate)

    def terminate(self, task_id: Any, **_: Any) -> None:
        """End a task that runs."""
        self.revoke(task_id, terminate=True)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unsupported(f"app.control.{name} is not in greenjobs; {_COMMANDS}, greenjobs.jobs and greenjobs.queues")


class TaskProxy:
    """A task that is made when it is first used: with the class, and for the application, that there is by then."""

    def __init__(self, app: Celery | None, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        named = dict(options)
        self._app = app
        self._function = function
        self._bind = bool(named.pop("bind", False))
        self._base = named.pop("base", None)
        # Of Celery's own doings.
        for word in ("shared", "lazy", "typing", "filter"):
            named.pop(word, None)
        name = named.pop("name", None)
        main = app.main if app is not None else "__main__"
        module = function.__module__
        self.name: str = name or f"{main if module == '__main__' else module}.{function.__name__}"
        self._options = named
        self._made: weakref.WeakKeyDictionary[Celery, Task] = weakref.WeakKeyDictionary()
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__module__ = module
        self.__wrapped__ = function
        refuse(self.name, **{each: named.get(each) for each in ("rate_limit", "serializer", "pydantic")})
        self.job = _declare(function, self.name, bind=self._bind, find_task=self.task)

    def task(self) -> Task:
        """The task, for the application that it is of."""
        app = self._app or current_app()
        made = self._made.get(app)
        if made is None:
            made = self._new(self._base or app.Task)
            made.app = app
            made.job = self.job
            prepare(made)
            self._made[app] = made
        return made

    def _new(self, base: type[Task]) -> Task:
        run = self._function if self._bind else staticmethod(self._function)
        body = {"name": self.name, "run": run, "__doc__": self.__doc__, "__module__": self.__module__}
        return type(self.__name__, (base,), {**body, **self._options})()  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.task()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.task(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "job" in self.__dict__ and not name.startswith("_"):
            setattr(self.task(), name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.task(), name)

    def __repr__(self) -> str:
        return repr(self.task())

    @property
    def __class__(self) -> Any:  # so that isinstance(…, Task) holds
        return type(self.task()) if "job" in self.__dict__ else TaskProxy

    @__class__.setter
    def __class__(self, value: Any) -> NoReturn:
        raise TypeError("the class of a task cannot be assigned")


def shared_task(*args: Any, **options: Any) -> Any:
    """Make a function a task of whichever application is the current one when it is used."""
    return _decorated(None, args, options)


def current_app() -> Celery:
    """That of set_default(), or the one that was made last."""
    app = _current.default or _current.latest
    if app is None:
        app = _current.latest = Celery("default", set_as_current=False)
    return app


def find_task(name: str) -> Task:
    """The task of that name. Raises NotRegistered."""
    if name not in tasks:
        load_all()
    try:
        task: Task = tasks[name]
        return task
    except KeyError:
        known = ", ".join(sorted(tasks)) or "none"
        raise NotRegistered(
            f"no task is named {name!r} in this process; known: {known}; import the module that declares it"
        ) from None


def load_all() -> None:
    """Have all applications import their tasks."""
    for reference in tuple(_applications):
        app = reference()
        if app is not None:
            app.load()


class _Current:
    default: Celery | None = None
    latest: Celery | None = None


_current = _Current()
_applications: list[weakref.ref[Celery]] = []
tasks: dict[str, Any] = {}
"""Every task of this process by name, or what stands for it until it is used."""


before_listing.append(load_all)


def _decorated(app: Celery | None, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    def make(function: Callable[..., Any]) -> TaskProxy:
        proxy = TaskProxy(app, function, options)
        tasks[proxy.name] = proxy
        return proxy

    if len(args) == 1 and callable(args[0]):
        return make(args[0])
    if args:
        raise TypeError("@task takes a function, or keyword arguments such as bind=True")
    return make


def _declare(function: Callable[..., Any], name: str, *, bind: bool, find_task: Callable[[], Task]) -> TaskJob:
    known = tasks.get(name)
    if known is not None:
        former = known.job.__wrapped__.__wrapped__.__code__
        if (former.co_filename, former.co_name) != (function.__code__.co_filename, function.__code__.co_name):
            raise JobDefinitionError(
                f"two tasks are named {name!r}: of {former.co_filename} and {function.__code__.co_filename}; give one "
                f"of them another with name=…"
            )
    return register(TaskJob(function, name=name, bind=bind, find_task=find_task))


def _entry(name: str, entry: Any, key: str) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise ImproperlyConfigured(f"beat_schedule: {name!r} is {entry!r}, and lacks {key!r}")
    return entry[key]


def _is_of_django() -> bool:
    return bool(os.environ.get("DJANGO_SETTINGS_MODULE")) and importlib.util.find_spec("django") is not None


def _apps_of_django() -> list[str]:
    from django.apps import apps

    return [each.name for each in apps.get_app_configs()]


def _import_if_there(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that the application misses is the application's error.
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")) or name in sys.modules:
            raise
