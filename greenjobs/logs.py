"""How lines are logged: plain for people, JSON for programs, each with the keys of the job in which it was logged.

The command line sets logging up where nobody has. An application that is loaded may have a set-up of its own, by
`logging.basicConfig`, `dictConfig`, or a handler of the root: ours makes way for it.

The keys of a job are added by a filter on handlers, in the greenlet or thread that logs: `extra=` of a call may not
name what a record has already, so a factory of records would break calls that do. Nothing here needs gevent.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from greenjobs.current import attempt_here

if TYPE_CHECKING:
    from greenjobs.config import Settings

JOB_KEYS = ("job_id", "job_type", "queue", "attempt", "runner")
"""What a line has that is logged while a job runs; `runner` is on every line of a runner's process."""

# In a format of somebody's own: what stands for a key that a line does not have.
_NO_VALUE = "-"

# The arguments of basicConfig that say nothing of what lines look like, and where they go.
_SAY_NO_FORMAT = {"level", "force", "encoding", "errors"}

# What an `extra` may not take the place of.
_OWN_KEYS = ("time", "level", "logger", "message", "exc", "stack")

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}

# What a URL has between "user:" and the last "@" before its path. Whatever libraries log, passwords are not for logs.
_PASSWORD = re.compile(r'(\w://[^\s:/@"]*):[^\s/"]+@')

# In its query, and among libpq's keywords: "host=… password=…". Not the argument of a call, in a line of code.
_PASSWORD_PAIR = re.compile(r"""((?:^|[?&'"]|(?<![,(\s])\s)\w*password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&'"]+)""")

# What JSON's readers hold as a whole number; texts of longer ones Python may refuse to make.
_LARGEST_NUMBER = 2**63

_RESET = "\x1b[0m"
_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[1;31m",
}
_FAINT = "\x1b[2m"
_TAG = "\x1b[36m"

# Beside py.warnings, which logging.captureWarnings has.
_uncaught = logging.getLogger("py.uncaught")

runner_name: str | None = None
"""The host and process id of the runner in this process; None where there is none."""


# --- keys -------------------------------------------------------------------------------------------------------------


def job_keys() -> dict[str, Any]:
    """The keys of the job that runs here and of its runner, as far as there are any."""
    keys: dict[str, Any] = {}
    attempt = attempt_here()
    if attempt is not None:
        row = attempt.row
        keys = {"job_id": row.id, "job_type": row.job_type, "queue": attempt.place.queue, "attempt": attempt.number}
    if runner_name is not None:
        keys["runner"] = runner_name
    return keys


class JobContext(logging.Filter):
    """Lets every record through, with the keys of the job in which it was logged; those that it has, it keeps."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the keys."""
        known = vars(record)
        for key, value in job_keys().items():
            known.setdefault(key, value)
        return True


def add_job_keys() -> None:
    """Let lines of jobs have their keys, on whatever handlers there are now.

    A format that names one of them has "-" in its place where a line has none.
    """
    for handler in _handlers():
        if not any(isinstance(each, JobContext) for each in handler.filters):
            handler.addFilter(JobContext())
        style: Any = getattr(handler.formatter, "_style", None)
        if hasattr(style, "_defaults") and any(key in str(style._fmt) for key in JOB_KEYS):
            # On the formatter, not on the record: other handlers, such as one of JSON, are to see no key there.
            style._defaults = {**dict.fromkeys(JOB_KEYS, _NO_VALUE), **(style._defaults or {})}


def _loggers() -> Iterator[logging.Logger]:
    yield logging.getLogger()
    # A copy: another thread may be making loggers.
    yield from (each for each in list(logging.root.manager.loggerDict.values()) if isinstance(each, logging.Logger))


def _handlers() -> Iterator[logging.Handler]:
    for logger in _loggers():
        yield from logger.handlers


# --- setting up -------------------------------------------------------------------------------------------------------


def set_up(settings: Settings, *, loads_application: bool = False) -> None:
    """Log to standard error as the settings say, unless somebody has set logging up.

    With `loads_application`, an application that is about to be loaded may still do so; call `settle` after that.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.setLevel(settings.log_level)
        root.addHandler(make_handler(settings.log_format))
        if settings.log_format == "json":
            # They are printed otherwise, among the lines of JSON.
            logging.captureWarnings(True)
            _log_what_nobody_catches()
        if loads_application:
            logging.basicConfig = _basic_config
    add_job_keys()


def _log_what_nobody_catches() -> None:
    """Let errors be lines of the log that end a thread, a greenlet, a callback of the loop, or the process."""

    def note_at_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, Exception):
            _note_uncaught("the process ends with an error", error)
        else:
            sys.__excepthook__(kind, error, trace)

    def note_in_thread(told: threading.ExceptHookArgs) -> None:
        if not isinstance(told.exc_value, SystemExit):
            _note_uncaught(f"{told.thread.name if told.thread else 'a thread'} ended with an error", told.exc_value)

    def note_unraisable(told: sys.UnraisableHookArgs) -> None:
        _note_uncaught(told.err_msg or "an error that could not be raised", told.exc_value)

    def note_in_loop(hub: Any, context: Any, kind: Any, error: Any, trace: Any) -> None:
        # By its name: as it shows itself, it shows what it was called with.
        _note_uncaught(f"{getattr(context, 'name', None) or type(context).__name__} ended with an error", error)

    sys.excepthook, threading.excepthook, sys.unraisablehook = note_at_end, note_in_thread, note_unraisable
    if "gevent.hub" in sys.modules:
        sys.modules["gevent.hub"].Hub.print_exception = note_in_loop


def _note_uncaught(message: str, error: BaseException | None) -> None:
    note = functools.partial(_uncaught.error, "%s", message, exc_info=error)
    gevent: Any = sys.modules.get("gevent")
    if gevent is not None and isinstance(gevent.getcurrent(), gevent.hub.Hub):
        gevent.spawn(note)  # in the loop itself nothing may wait, as for the lock of a handler
    else:
        note()


def settle() -> None:
    """The application is loaded: what it has not set up is ours from now on."""
    logging.basicConfig = _logging_basic_config
    root = logging.getLogger()
    if any(not isinstance(handler, _Handler) for handler in root.handlers):
        for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
            root.removeHandler(handler)
    for logger in _loggers():
        # A dictConfig silences all loggers that it does not name, unless it says disable_existing_loggers: False. To
        # silence ours there is the level.
        if logger.name.partition(".")[0] == "greenjobs":
            logger.disabled = False
    add_job_keys()


_logging_basic_config = logging.basicConfig


def _basic_config(**arguments: Any) -> None:
    """As logging's own, which does nothing where the root has a handler; ours is none to an application.

    Where it names neither a format nor where to write, the level is all that it says.
    """
    root = logging.getLogger()
    ours = [handler for handler in root.handlers if isinstance(handler, _Handler)]
    for handler in ours:
        root.removeHandler(handler)
    _logging_basic_config(**arguments)
    if ours and not arguments.keys() - _SAY_NO_FORMAT:
        root.handlers[:] = ours


def note_runner(name: str) -> None:
    """A runner of this name works in this process: lines have its name from now on, and those of jobs their keys."""
    global runner_name
    runner_name = name
    add_job_keys()


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # it takes no type while it runs, before Python 3.11
    _StreamHandler = logging.StreamHandler


class _Handler(_StreamHandler):
    """Ours, to standard error."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(formatter)
        self.addFilter(JobContext())


def make_handler(log_format: str) -> logging.Handler:
    """A handler that writes to standard error, "plain" or "json"."""
    return _Handler(JsonFormatter() if log_format == "json" else PlainFormatter(colours=has_colours(sys.stderr)))


def writes_json() -> bool:
    """Whether it is our handler that writes, and writes JSON."""
    return any(isinstance(each.formatter, JsonFormatter) for each in logging.getLogger().handlers)


def has_colours(stream: TextIO | None) -> bool:
    """Whether lines on this stream are to be coloured: on a terminal, unless NO_COLOR or FORCE_COLOR say otherwise.

    None is a standard stream that was closed.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream is not None and stream.isatty()


# --- plain ------------------------------------------------------------------------------------------------------------


class PlainFormatter(logging.Formatter):
    """A line for people: when, how bad, who, in which job, what; with a traceback below it where there is one."""

    def __init__(self, *, colours: bool = False) -> None:
        super().__init__()
        self._has_colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """The line, without passwords."""
        return _without_passwords(super().format(record))

    def usesTime(self) -> bool:
        """It shows when."""
        return True

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Local time, with its distance from UTC."""
        return datetime.fromtimestamp(record.created).astimezone().isoformat(" ", "milliseconds")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """All but the traceback."""
        job_id = getattr(record, "job_id", None)
        # Our own lines about a job name it, and its type, themselves.
        tag = "" if job_id is None or f"job {job_id} " in record.message else f" [job {job_id}]"
        level = f"{record.levelname:<7}"
        when = record.asctime
        if self._has_colours:
            when = f"{_FAINT}{when}{_RESET}"
            tag = f"{_TAG}{tag}{_RESET}" if tag else ""
            colour = _COLOURS.get(record.levelno)
            level = f"{colour}{level}{_RESET}" if colour else level
        return f"{when} {level} {record.name}{tag}: {record.message}"


# --- JSON -------------------------------------------------------------------------------------------------------------


class JsonFormatter(logging.Formatter):
    """One JSON object in one line: time, level, logger, message; the keys of the job; whatever was given as `extra`;
    `exc`, the traceback, and `stack`.

    It never raises: what JSON cannot carry is shown as text. An `extra` that is called as one of these is extra_….
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without passwords."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": str(record.levelname),
            "logger": str(record.name),
            "message": _without_passwords(_message_of(record)),
        }
        given = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        keys = {key: given.pop(key) for key in JOB_KEYS if key in given}
        for key, value in (*keys.items(), *given.items()):
            line[f"extra_{key}" if key in _OWN_KEYS else str(key)] = _carried(value)
        if record.exc_info and not record.exc_text:
            record.exc_text = _traceback_of(self, record)
        if record.exc_text:
            line["exc"] = _without_passwords(record.exc_text)
        if record.stack_info:
            line["stack"] = _without_passwords(str(record.stack_info))
        # In ASCII, which no stream's encoding can spoil.
        return json.dumps(line)


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as failure:
        return f"{_text_of(record.msg)} (its arguments do not fit: {_text_of(record.args)}; {type(failure).__name__})"


def _traceback_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    try:
        # Whoever logs outside of a handler with exc_info=True gives three times None.
        return formatter.formatException(record.exc_info) if record.exc_info and record.exc_info[1] else ""
    except Exception as failure:
        return f"a traceback that cannot be shown: {type(failure).__name__}"


def _carried(value: Any) -> Any:
    """The value if JSON can carry it, with texts for what it cannot; else a text in its place."""
    if value is None or isinstance(value, bool) or (type(value) is int and abs(value) < _LARGEST_NUMBER):
        return value
    if isinstance(value, str):
        return _without_passwords(value)
    try:
        # There and back: NaN, keys that are no texts, circles and what str cannot show are found here.
        return _shown(json.loads(json.dumps(value, default=_text_of, allow_nan=False)))
    except Exception:
        return _without_passwords(_text_of(value))


def _shown(value: Any) -> Any:
    """What came out of JSON, without passwords."""
    if isinstance(value, str):
        return _without_passwords(value)
    if isinstance(value, list):
        return [_shown(each) for each in value]
    if isinstance(value, dict):
        return {_without_passwords(key): _shown(each) for key, each in value.items()}
    return value


def _text_of(value: Any) -> str:
    try:
        return str(value)
    except Exception as failure:
        return f"<{type(value).__name__} that cannot be shown: {type(failure).__name__}>"


def _without_passwords(text: str) -> str:
    if "password" in text:
        text = _PASSWORD_PAIR.sub(r"\1***", text)
    return _PASSWORD.sub(r"\1:***@", text) if "://" in text else text
