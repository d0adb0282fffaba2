"""One place for settings: an argument wins over an environment variable, which wins over a file.

An option is declared once, as a field of `Settings`; `OPTIONS` is the table made from those fields, and the parser, the
error messages, the command line and the documentation read it. An option has one name everywhere: `max_retries` in
Python and in files (where `max-retries` is accepted too), `--max-retries` on the command line,
`GREENJOBS_MAX_RETRIES` in the environment.

The file is the nearest one from the working directory upwards that has a section of ours: `[greenjobs]` in setup.cfg or
`[tool.greenjobs]` in pyproject.toml. Nothing here opens a database connection.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from greenjobs import address, settings_file
from greenjobs.durations import DURATION_FORMS, duration
from greenjobs.errors import ConfigError
from greenjobs.redaction import keyword_pairs, redact
from greenjobs.settings_file import near_match, nearest_section

_Value = TypeVar("_Value")
_Value_co = TypeVar("_Value_co", covariant=True)
_Number = TypeVar("_Number", int, float)

# The largest value that PostgreSQL stores as jsonb (JENTRY_OFFLENMASK in its jsonb.h).
_MAX_JSONB_BYTES = 268_435_455


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: what it is called, what it may be, and what it is for."""

    name: str
    default: object
    parse: Callable[[object], object]
    """Makes the value of what an argument, a variable or a file holds; raises ValueError when it is not allowed."""
    allowed: str
    """What a value may be, with unit and range; completes the sentence "the value must be …"."""
    help: str
    environment: tuple[str, ...]
    """The environment variables that set it; the first one that is set and not empty wins."""


@dataclass(frozen=True, slots=True)
class _Kind(Generic[_Value_co]):
    parse: Callable[[object], _Value_co]
    allowed: str


def _option(default: _Value, kind: _Kind[_Value], help: str, *environment: str) -> _Value:
    metadata = {"parse": kind.parse, "allowed": kind.allowed, "help": help, "environment": environment}
    # Declared as the type of the default: that is what the field holds once the dataclass is made.
    made: _Value = field(default=default, metadata=metadata)
    return made


def _number(of: type[_Number], what: str, lowest: float, highest: float) -> _Kind[_Number]:
    types = (int, str) if of is int else (int, float, str)

    def parse(value: object) -> _Number:
        # bool is an int to Python, but `pool = true` in a file is a mistake.
        if isinstance(value, bool) or not isinstance(value, types):
            raise ValueError
        number = of(value)
        # Written so that NaN, which no comparison holds for, is refused too.
        if not lowest <= number <= highest:
            raise ValueError
        return number

    return _Kind(parse, f"{what} from {lowest:,} to {highest:,}")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value.strip()


def queue_name(value: object) -> str:
    """Return the name of a queue; raise ValueError when it is not one."""
    name = _text(value)
    # ":", "," and "=" separate the parts of `--queue emails:20:poll=5`; what cannot be seen cannot be typed again.
    if len(name) > 100 or not name.isprintable() or re.search(r"[\s:,=]", name):
        raise ValueError
    return name


_WEIGHT = _number(float, "a number", 0.01, 1_000)

WEIGHT_ALLOWED = _WEIGHT.allowed


def queue_weight(value: object) -> float:
    """Return the weight of a queue in a share; raise ValueError when it is not one."""
    return _WEIGHT.parse(value)


def _lines(value: object) -> tuple[str, ...]:
    """The lines of a text, or the texts of a list, that are not empty."""
    lines = value.splitlines() if isinstance(value, str) else value
    if not isinstance(lines, (list, tuple)):
        raise ValueError
    return tuple(_text(line) for line in lines if line != "" and not (isinstance(line, str) and line.isspace()))


_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _log_level(value: object) -> str:
    name = _text(value).upper()
    if name not in _LOG_LEVELS:
        raise ValueError
    return name


def _one_of(*words: str) -> _Kind[str]:
    def parse(value: object) -> str:
        text = _text(value)
        if text not in words:
            raise ValueError
        return text

    return _Kind(parse, " or ".join(f'"{word}"' for word in words))


def _how_long_to_keep(value: object) -> float:
    return 0.0 if isinstance(value, str) and value.strip().lower() == "forever" else duration(value)


def _http_address(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return str(address.Address.parse(_text(value)))


# The scheme is all that is looked at: the rest is for libpq, which knows hosts, options and their versions better.
_POSTGRES_URL = re.compile(r"(postgres|postgresql)(?:\+psycopg2?)?(://[^\x00-\x1f\x7f]*)", re.IGNORECASE)
_EMBEDDED_URL = re.compile(r"embedded:(?:|///[^\x00-\x1f\x7f]*|(?!//)[^\x00-\x1f\x7f]+)")
_POSTGRES_FORMS = (
    "a PostgreSQL URL (postgresql://user@host/database, postgres://…, SQLAlchemy's postgresql+psycopg2://…) "
    'or a libpq keyword string ("host=… dbname=…")'
)


def _postgres_url(value: object) -> str:
    url = _text(value)
    match = _POSTGRES_URL.fullmatch(url)
    if match:
        # libpq compares the scheme by case and knows no "+driver".
        return match[1].lower() + match[2]
    if keyword_pairs(url) and "\0" not in url:
        return url
    raise ValueError


def _database_url(value: object) -> str:
    url = _text(value)
    return url if _EMBEDDED_URL.fullmatch(url) else _postgres_url(url)


@dataclass(frozen=True, slots=True, repr=False)
class Settings:
    """Everything that can be set, checked, with the defaults filled in; made by `load`. Its repr shows no password."""

    database_url: str | None = _option(
        None,
        _Kind(
            _database_url,
            f"{_POSTGRES_FORMS}, or a private server for development "
            '("embedded:", "embedded:some/folder", "embedded:///some/folder")',
        ),
        "The database that holds the jobs.",
        "GREENJOBS_DATABASE_URL",
        "DATABASE_URL",
    )
    session_url: str | None = _option(
        None,
        _Kind(_postgres_url, _POSTGRES_FORMS),
        "A direct way to the same database, for LISTEN and locks, where database_url leads through a pooler "
        "that shares sessions between transactions.",
    )
    session: str = _option(
        "auto",
        _one_of("auto", "lock", "lease"),
        "How a runner proves that it lives: by a lock of its session, or, where a pooler allows none, by a lease.",
    )
    app: str | None = _option(
        None,
        _Kind(_text, 'a module, or an object in one: "myapp.jobs", "myapp:app", "myapp:create_app()"'),
        "The application whose jobs are run.",
    )
    pool: int = _option(
        50, _number(int, "a whole number", 1, 10_000), "How many jobs of a queue one process runs at a time."
    )
    share: int | None = _option(
        None,
        _number(int, "a whole number of jobs", 1, 10_000),
        "How many jobs one process runs at a time of all its queues together, which are then listed in their order "
        "or with weights.",
    )
    poll_interval: float = _option(
        1.0,
        _number(float, "a number of seconds", 0.01, 86_400),
        "Seconds between looks at a queue when no notification arrives.",
    )
    read_ahead: int = _option(
        4_000,
        _number(int, "a whole number of jobs", 0, 100_000),
        "The most jobs of a queue that one process claims ahead of those it runs, while they are fast.",
    )
    max_retries: int = _option(
        10,
        _number(int, "a whole number", 0, 10_000),
        "How often a job that failed is tried again before it is given up.",
    )
    max_crashes: int = _option(
        3,
        _number(int, "a whole number", 1, 1_000),
        "How many runners may die while they hold a job before it is given up.",
    )
    keep_failed: float = _option(
        30 * 86_400.0,
        _Kind(_how_long_to_keep, f'{DURATION_FORMS}; or "forever", which is 0'),
        'How long failed jobs are kept, in seconds or as in "30 days"; then runners delete them. "forever": never.',
    )
    keep_counts: float = _option(
        7 * 86_400.0,
        _Kind(_how_long_to_keep, f'{DURATION_FORMS}; or "forever", which is 0'),
        'How long the counts of jobs by the minute are kept, in seconds or as in "7 days". "forever": never deleted.',
    )
    grace: float = _option(
        30.0,
        _number(float, "a number of seconds", 0, 86_400),
        "Seconds that a runner which is to stop waits for running jobs before it interrupts them.",
    )
    on_session_loss: str = _option(
        "finish",
        _one_of("finish", "interrupt"),
        "What becomes of running jobs when the runner loses its session, and others may take them over.",
    )
    max_blocking: float = _option(
        0.5,
        _number(float, "a number of seconds", 0, 3_600),
        "Seconds for which something may hold the event loop before the watchdog names it; 0: it names nothing.",
    )
    threads: int | None = _option(
        None,
        _number(int, "a whole number", 1, 1_000),
        "How many jobs one process runs in threads at a time; four more than it has cores, 32 at most, when not set.",
    )
    job_processes: int | None = _option(
        None,
        _number(int, "a whole number", 1, 1_000),
        "How many processes a runner has for jobs that run in one; as many as there are cores when not set.",
    )
    processes: int = _option(
        1, _number(int, "a whole number", 1, 1_000), "How many processes `greenjobs run` keeps at work."
    )
    max_jobs: int | None = _option(
        None,
        _number(int, "a whole number of jobs", 1, 1_000_000_000),
        "A process that has finished so many jobs, or up to a tenth fewer, is replaced by a fresh one.",
    )
    max_memory: int | None = _option(
        None,
        _number(int, "a whole number of megabytes", 1, 10_000_000),
        "A process that occupies so many megabytes of memory is replaced by a fresh one.",
    )
    http: str | None = _option(
        None,
        _Kind(_http_address, address.ALLOWED),
        "Where a runner tells how it is, by HTTP: /livez, /readyz, /metrics, /jobs. A port alone is one of 127.0.0.1.",
    )
    max_payload_bytes: int = _option(
        1024 * 1024,
        _number(int, "a whole number of bytes", 1, _MAX_JSONB_BYTES),
        "The largest payload of a job, in bytes of JSON.",
    )
    enqueue_timeout: float = _option(
        5.0,
        _number(float, "a number of seconds", 0.01, 3_600),
        "Seconds that an enqueue waits for a free connection and for the database to answer.",
    )
    enqueue_connections: int = _option(
        10, _number(int, "a whole number", 1, 10_000), "The most connections that one process opens for enqueuing."
    )
    job_connections: int = _option(
        10,
        _number(int, "a whole number", 1, 10_000),
        "The most connections that one process opens for the code of jobs: `greenjobs.connection()`.",
    )
    job_connection_timeout: float = _option(
        30.0,
        _number(float, "a number of seconds", 0.01, 86_400),
        "Seconds that the code of a job waits for one of them.",
    )
    default_queue: str = _option(
        "default",
        _Kind(queue_name, "a name of 1 to 100 printable characters without spaces, colons, commas and equals signs"),
        "The queue of a job that names none.",
    )
    log_level: str = _option(
        "INFO",
        _Kind(_log_level, f"one of {', '.join(_LOG_LEVELS)}"),
        "What the command line logs: messages of this level and above.",
    )
    log_format: str = _option(
        "plain",
        _one_of("plain", "json"),
        "How it logs, unless the application sets logging up: lines for people, or a JSON object in each line.",
    )
    schedules: tuple[str, ...] = _option(
        (),
        _Kind(
            _lines,
            'lines such as `nightly: report(kind="full") at 30 2 * * * in Europe/Paris; catch_up=all; overlap=false`, '
            "in a list where the file is pyproject.toml",
        ),
        "Jobs that are enqueued by the clock, one in a line.",
    )
    project_folder: Path = field(default_factory=lambda: project_folder())

    @property
    def needs_supervisor(self) -> bool:
        """Whether `greenjobs run` has to start other processes, and to replace them."""
        return self.processes > 1 or self.max_jobs is not None or self.max_memory is not None

    def require_database_url(self) -> str:
        """Return `database_url`; raise ConfigError that says how to name one when there is none."""
        if self.database_url is None:
            raise ConfigError(
                "No database is named. Name one in any of three ways: the argument database_url (--database-url on the "
                "command line); the environment variable GREENJOBS_DATABASE_URL or DATABASE_URL; or database_url under "
                "[greenjobs] in setup.cfg or [tool.greenjobs] in pyproject.toml. For development, "
                'database_url "embedded:" starts a private PostgreSQL in the project.'
            )
        return self.database_url

    def __repr__(self) -> str:
        shown = ((each.name, getattr(self, each.name)) for each in fields(self))
        return f"Settings({', '.join(f'{name}={_shown(name, value)}' for name, value in shown)})"


OPTIONS: Mapping[str, Option] = {
    each.name: Option(
        name=each.name,
        default=each.default,
        parse=each.metadata["parse"],
        allowed=each.metadata["allowed"],
        help=each.metadata["help"],
        environment=each.metadata["environment"] or (f"GREENJOBS_{each.name.upper()}",),
    )
    for each in fields(Settings)
    if each.metadata
}
"""Every option by name, in the order in which they are documented."""


class Layer:
    """What an application sets in a way of its own, such as Flask's `app.config`; already checked.

    Its `arguments` win over the environment, and those of `configure` over them. Its `defaults` count where nobody has
    said anything to greenjobs itself: they lose to the file, and win over variables that other programs read, too.
    """

    def __init__(self, arguments: Mapping[str, object], defaults: Mapping[str, object]) -> None:
        self.arguments = arguments
        self.defaults = defaults
        self._loaded: tuple[_Process, Settings] | None = None

    def settings(self) -> Settings:
        """The settings of this application, whichever was adopted; loaded on first use."""
        process = _process
        if process.layer is self:
            return _settings_of(process)
        if self._loaded is None or self._loaded[0] is not process:
            self._loaded = process, _load(process.arguments, self)
        return self._loaded[1]


_NO_LAYER = Layer({}, {})


def load(**arguments: object) -> Settings:
    """Return the settings; each argument is the value of the option of that name, None when it is not given.

    Reads the environment and the nearest file with a section of ours. Raises TypeError for an argument that is no
    option, and ConfigError for a wrong value, an unknown key in the file, or a file that cannot be read.
    """
    return _load(arguments, _NO_LAYER)


def _load(arguments: Mapping[str, object], layer: Layer) -> Settings:
    values = {**layer.arguments, **check(arguments)}
    section = nearest_section(OPTIONS)
    for name, option in OPTIONS.items():
        if name in values:
            continue
        variables = option.environment if name not in layer.defaults else option.environment[:1]
        variable = next((each for each in variables if os.environ.get(each, "").strip()), None)
        if variable:
            values[name] = _parsed(option, os.environ[variable], f"the environment variable {variable}")
        elif section and name in section.values:
            values[name] = _parsed(option, section.values[name], section.label)
        elif name in layer.defaults:
            values[name] = layer.defaults[name]
    return Settings(**values, project_folder=settings_file.project_folder(section))


def configure(**arguments: object) -> None:
    """Set options for the whole process; they win over environment and file, as the arguments of `load` do.

    Every call replaces what an earlier one set; without arguments only environment and file count again. Wrong
    arguments raise at once, as in `load`; environment and file are read when `current` is next called.
    """
    global _process
    check(arguments)
    _process = _Process(arguments, _process.layer, [])


def adopt(layer: Layer | None) -> None:
    """Let this layer, instead of an earlier one, be that of the process; None for none."""
    global _process
    _process = _Process(_process.arguments, layer or _NO_LAYER, [])


scoped: Callable[[], Settings | None] | None = None
"""Set by greenjobs.contrib where several applications share a process: the settings of the one that is active here."""


def current() -> Settings:
    """Return the settings of this process, loaded on first use. Safe in threads and greenlets, and after a fork."""
    if scoped is not None:
        settings = scoped()
        if settings is not None:
            return settings
    return _settings_of(_process)


def _settings_of(process: _Process) -> Settings:
    if not process.loaded:
        # No lock, which a fork could copy while it is held: two threads may both load, and the first to arrive is kept.
        # A configure() in between has put another object in place, which this does not touch.
        process.loaded.append(_load(process.arguments, process.layer))
    return process.loaded[0]


def project_folder() -> Path:
    """The folder of the project that the working directory is in; see settings_file."""
    return settings_file.project_folder(nearest_section(OPTIONS))


class _Process(NamedTuple):
    arguments: Mapping[str, object]
    layer: Layer
    loaded: list[Settings]


_process = _Process({}, _NO_LAYER, [])


def check(arguments: Mapping[str, object], origin: str = "an argument") -> dict[str, Any]:
    """Return the arguments that are not None, checked and parsed; raise TypeError or ConfigError as `load`."""
    unknown = next((name for name in arguments if name not in OPTIONS), None)
    if unknown is not None:
        raise TypeError(f"there is no option {unknown!r}{near_match(unknown, OPTIONS)}")
    given = {name: value for name, value in arguments.items() if value is not None}
    return {name: _parsed(OPTIONS[name], value, origin) for name, value in given.items()}


def _parsed(option: Option, value: object, origin: str) -> object:
    try:
        return option.parse(value)
    except (ValueError, OverflowError):
        shown = _shown(option.name, value)
    # Raised outside the handler: the message of float("…") would repeat the value, with whatever is in it.
    raise ConfigError(f"{option.name} is {shown} ({origin}); the value must be {option.allowed}.")


def _shown(name: str, value: object) -> str:
    """The repr of an option's value for people to read: without a password, and of bounded length."""
    if name.endswith("_url") and value is not None:
        value = redact(str(value))
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}… ({len(shown):,} characters)"
