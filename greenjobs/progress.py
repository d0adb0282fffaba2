"""What a job says of itself while it runs: how far it is, and the lines of its log. Writes nothing to the database.

An attempt that says something has a Report, which holds the newest progress and the newest lines; the runner's Reporter
writes them. Saying something never waits for that, and costs less than a microsecond.
"""

from __future__ import annotations

import contextlib
import logging
import numbers
import time
from collections import deque
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

from greenjobs.errors import JobDefinitionError, OptionError

# Lines that are kept with a job that asks for it, over all of its attempts, if it does not say how many; and the most
# that it may ask for: every write of the row takes all of them along.
KEPT_LINES = 100
MOST_KEPT_LINES = 1000

# What is longer is cut.
LONGEST_LINE = 500
LONGEST_MESSAGE = 500

# What PostgreSQL and most readers of JSON hold as a whole number.
LARGEST_COUNT = 2**63 - 1

# Lines of less than this level are kept only where logging lets them through: those of DEBUG, mostly.
_KEPT_FROM = logging.INFO


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is: `done` of `total`, which may be None for unknown, and a message. `at` is when it said so."""

    done: float
    total: float | None = None
    message: str | None = None
    at: datetime | None = None

    @classmethod
    def read(cls, stored: object) -> Progress | None:
        """What the column says; None when it says nothing, or, being written by hand, no progress."""
        if not isinstance(stored, Mapping) or not _is_number(stored.get("done")):
            return None
        total, message, at = stored.get("total"), stored.get("message"), None
        with contextlib.suppress(ValueError):
            at = datetime.fromisoformat(str(stored.get("at")))
        return cls(
            done=stored["done"],
            total=total if _is_number(total) else None,
            message=None if message is None else str(message),
            at=at,
        )


class Recorder(Protocol):
    """Who writes reports: the runner's Reporter."""

    def expect(self, report: Report) -> None:
        """This report has something to write, which it had not before. Returns at once."""

    def finish(self, report: Report) -> None:
        """The attempt has ended, and its row stays: write what is left before the outcome."""


class Report:
    """What one attempt says of itself. `id` and `claim` are those of its fence, `attempt` the number people know."""

    __slots__ = (
        "_lines",
        "_lines_are_news",
        "_progress",
        "_progress_is_news",
        "_recorder",
        "attempt",
        "claim",
        "former",
        "former_is_known",
        "id",
        "is_expected",
        "job_type",
        "log",
    )

    def __init__(
        self,
        *,
        id: int,
        claim: int,
        job_type: str,
        queue: str,
        attempt: int,
        logger_name: str,
        kept_lines: int,
        recorder: Recorder | None,
    ) -> None:
        self.id = id
        self.claim = claim
        self.job_type = job_type
        self.attempt = attempt
        self.former: Progress | None = None
        """What the row said before, once that was asked for."""
        self.former_is_known = False
        self.is_expected = False
        """For the recorder: whether it knows that there is something to write."""
        self._recorder = recorder
        self._progress: tuple[float, float | None, str | None, float] | None = None
        self._progress_is_news = False
        self._lines: deque[dict[str, Any]] = deque(maxlen=kept_lines)
        self._lines_are_news = False
        logger = logging.getLogger(logger_name)
        keys = {"job_id": id, "job_type": job_type, "queue": queue, "attempt": attempt}
        self.log = JobLog(_KeepingLogger(logger, self) if kept_lines else logger, keys)

    # --- what the job says --------------------------------------------------------------------------------------------

    def say(self, done: float, total: float | None, message: str | None) -> None:
        """The job is so far. Takes the place of what was said before; raises OptionError."""
        # A loop comes along here a million times: whole numbers are looked at first, and cost no call.
        if type(done) is not int or not 0 <= done <= LARGEST_COUNT:
            done = self._number("done", done)
        if total is not None and (type(total) is not int or not 0 <= total <= LARGEST_COUNT):
            total = self._number("total", total)
        if message is not None and not isinstance(message, str):
            raise OptionError(f"{self.job_type}: the message of its progress is {message!r}; allowed: a text")
        self._progress = (done, total, message, time.time())
        if not self._progress_is_news:
            self._progress_is_news = True
            self._announce()

    def keep(self, record: logging.LogRecord) -> None:
        """Keep a line that the job logged."""
        self._lines.append(
            {
                "at": _moment(record.created),
                "attempt": self.attempt,
                "claim": self.claim,
                "level": record.levelname,
                "message": _text_of(record)[:LONGEST_LINE],
            }
        )
        self._lines_are_news = True
        self._announce()

    @property
    def progress(self) -> Progress | None:
        """What this attempt said last of how far it is."""
        if self._progress is None:
            return None
        done, total, message, at = self._progress
        return Progress(done, total, message, datetime.fromtimestamp(at, timezone.utc))

    def _announce(self) -> None:
        if not self.is_expected and self._recorder is not None:
            self.is_expected = True
            self._recorder.expect(self)

    def _number(self, name: str, given: Any) -> float:
        number: float | None = None
        if isinstance(given, numbers.Real) and not isinstance(given, bool):  # NumPy's numbers are some, too
            number = int(given) if isinstance(given, numbers.Integral) else float(given)
        # Written so that NaN, which no comparison holds for, is refused, too.
        if number is None or not 0 <= number <= LARGEST_COUNT:
            raise OptionError(
                f"{self.job_type}: {name} of its progress is {given!r}; allowed: a number from 0 to {LARGEST_COUNT:,}"
            )
        return number

    # --- for who writes it --------------------------------------------------------------------------------------------

    def end(self, *, stays: bool) -> None:
        """The attempt has ended; `stays` says whether its row does. What is said from now on may not be written."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None and stays:
            recorder.finish(self)

    @property
    def has_ended(self) -> bool:
        """Whether the attempt has ended, or nobody writes what it says."""
        return self._recorder is None

    @property
    def is_news(self) -> bool:
        """Whether there is something to write."""
        return self._progress_is_news or self._lines_are_news

    def take(self) -> dict[str, Any]:
        """What there is to write, as `storage.report` has it; it is no news from now on."""
        document: dict[str, Any] = {"id": self.id, "attempt": self.claim}
        # First of all: a job in a thread may say more meanwhile.
        is_progress, self._progress_is_news = self._progress_is_news, False
        are_lines, self._lines_are_news = self._lines_are_news, False
        if is_progress and self._progress is not None:
            done, total, message, at = self._progress
            cut = None if message is None else storable(message[:LONGEST_MESSAGE])
            document["progress"] = {"done": done, "total": total, "message": cut, "at": _moment(at)}
        if are_lines:
            document["lines"] = list(self._lines)
            document["kept"] = self._lines.maxlen
        return document

    def receive(self, document: Mapping[str, Any]) -> None:
        """Say what the job said in another process, where it was taken."""
        if "progress" in document:
            said = document["progress"]
            at = datetime.fromisoformat(said["at"]).timestamp()
            self._progress = (said["done"], said["total"], said["message"], at)
            self._progress_is_news = True
        if "lines" in document:
            self._lines = deque(document["lines"], document["kept"])
            self._lines_are_news = True
        self._announce()

    def put_back(self) -> None:
        """What was taken could not be written: it is news again."""
        self._progress_is_news = self._progress is not None
        self._lines_are_news = bool(self._lines)


# --- the log ----------------------------------------------------------------------------------------------------------

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:  # it takes no type while it runs, before Python 3.11
    _Adapter = logging.LoggerAdapter


class JobLog(_Adapter):
    """The logger of the job's module, with the ids of the job on every line."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the ids to what the call itself gives as `extra`, which the class of logging would replace."""
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


class _KeepingLogger(logging.Logger):
    """Stands before a logger, and keeps the lines that come by.

    A logger, rather than more in JobLog: logging finds the caller of a line by leaving out its own frames, and none of
    ours is between.
    """

    def __init__(self, logger: logging.Logger, report: Report) -> None:
        super().__init__(logger.name)
        self._logger = logger
        self._report = report

    def isEnabledFor(self, level: int) -> bool:
        return level >= _KEPT_FROM or self._logger.isEnabledFor(level)

    def getEffectiveLevel(self) -> int:
        return min(_KEPT_FROM, self._logger.getEffectiveLevel())

    def handle(self, record: logging.LogRecord) -> None:
        self._report.keep(record)
        if self._logger.isEnabledFor(record.levelno):
            self._logger.handle(record)


def _text_of(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text += f" ({type(error).__qualname__}: {error})"
    except Exception as failure:  # arguments that do not fit, or whose own __str__ fails: as logging, go on
        text = f"a line that cannot be shown: {type(failure).__name__}"
    return storable(text)


def kept_lines(job_name: str, keep_log: object) -> int:
    """How many lines `keep_log` of @job means; raises JobDefinitionError."""
    if keep_log is True:
        return KEPT_LINES
    if keep_log is False:
        return 0
    if type(keep_log) is not int or not 1 <= keep_log <= MOST_KEPT_LINES:
        raise JobDefinitionError(
            f"{job_name}: keep_log is {keep_log!r}; allowed: True for {KEPT_LINES} lines, a number of lines from 1 to "
            f"{MOST_KEPT_LINES}, or False"
        )
    return keep_log


# --- texts and times --------------------------------------------------------------------------------------------------


def storable(text: str) -> str:
    """The text without what PostgreSQL's JSON does not take: NUL and lone surrogates are spelled out."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
