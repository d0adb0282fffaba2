"""What a supervisor answers for all its processes, at the one address that they have together.

Each process answers at a socket of its own, in a folder that is for this user alone. The supervisor asks them, and
makes one answer of theirs. Whoever asks is served by a thread; how the processes are it hears from the supervisor's
loop, so that an answer shows that this turns.

- /livez, which is about whether a restart would help: yes, when no process that has come up answers. Not, when none has
  come up yet: the supervisor is at it.
- /readyz: when each of the processes that there are to be claims jobs. Successors that start, and processes that finish
  what they run, do not count.
- /jobs: those of all of them, with the process.
- /metrics: those of one process, which are those of all: they keep them in files, in a folder that they have in common.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenjobs.address import LONGEST_PATH, Address
from greenjobs.http_client import fetch
from greenjobs.http_server import NOT_FROM_AFAR, Answer, Request, Server, warn_of_openness

logger = logging.getLogger(__name__)

# A process that takes longer than that is not well: its event loop is held. Less than probes are told to wait.
CHILD_SECONDS = 2.0
_MOST_AT_A_TIME = 16

# Metrics may ask the database; a scrape waits for ten seconds, if nobody says otherwise.
_METRICS_SECONDS = 6.0

# While processes are replaced, how they stand may have changed before the last has answered.
_MOST_LOOKS = 5

_UNAVAILABLE = 503

# The path of a socket has to be short; the rest of it are the folder's name and a number.
_LONGEST_PARENT = LONGEST_PATH - len("/greenjobs-http-12345678/1234567890")

_PREFIX = "greenjobs-http-"
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class ProcessState:
    """A child as the supervisor knows it: "starting", "up" or "leaving". One `at_work` fills one of the places that
    there are; the others are successors, or have been succeeded."""

    pid: int
    state: str
    at_work: bool
    age_seconds: float
    address: Address


@dataclass(frozen=True, slots=True)
class Picture:
    """How a supervisor is doing: `places` is how many processes there are to be at this moment."""

    places: int
    is_stopping: bool
    processes: Sequence[ProcessState]

    @property
    def at_work(self) -> set[int]:
        """The ids of those that fill a place."""
        return {process.pid for process in self.processes if process.at_work}


Look = Callable[[], Picture | None]
"""Asks the loop of the supervisor; None when it does not answer."""


_Told = tuple[ProcessState, int | None, dict[str, Any]]
"""What a process answers: status and document; None and {} of one that does not."""


class Front:
    """The supervisor's server, and the folder of its processes' sockets. Raises ConfigError as Server does."""

    def __init__(self, address: Address, look: Look) -> None:
        self._look = look
        self._count = 0
        self._folder, self._lock = _make_folder()
        try:
            routes = {"/livez": self._live, "/readyz": self._ready, "/metrics": self._metrics, "/jobs": self._jobs}
            self._server = Server(address, routes)
        except BaseException:
            self._remove_folder()
            raise
        self.address = self._server.address
        logger.info("http: %s", self.address)
        if not address.is_local:
            warn_of_openness(self.address)

    def next_address(self) -> Address:
        """Where the next child is to answer."""
        self._count += 1
        return Address(path=str(self._folder / str(self._count)))

    def forget(self, address: Address) -> None:
        """A child has ended, in whatever way: its socket is of no use any more."""
        with contextlib.suppress(OSError):
            os.unlink(str(address.path))

    def close(self) -> None:
        """Answer no more."""
        self._server.close()
        self._remove_folder()

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _live(self, request: Request) -> Answer:
        picture = self._look()
        if picture is None:
            return Answer.of({"alive": False, "reasons": ["the supervisor does not answer"]}, _UNAVAILABLE)
        rows, answering = [], 0
        for process, status, told in _ask("/livez", picture.processes):
            answering += status is not None
            rows.append(_row(process, answers=None if process.state == "starting" else status is not None, **told))
        has_come_up = any(process.state == "up" for process in picture.processes)
        reasons = ["no process answers: their event loops are held"] if has_come_up and not answering else []
        document = {"alive": not reasons, "supervisor": os.getpid(), "reasons": reasons, "processes": rows}
        return Answer.of(document, _UNAVAILABLE if reasons else 200)

    def _ready(self, request: Request) -> Answer:
        picture, answers = self._ask_about_readiness()
        if picture is None:
            return Answer.of({"ready": False, "reasons": ["the supervisor does not answer"]}, _UNAVAILABLE)
        rows = []
        reasons = ["it is draining: it was told to stop"] if picture.is_stopping else []
        for process, status, told in answers:
            own_reasons = _reasons(process, status, told)
            rows.append(_row(process, ready=status == 200, reasons=own_reasons))
            if process.at_work:
                reasons += [f"process {process.pid}: {reason}" for reason in own_reasons]
        missing = picture.places - sum(process.at_work for process in picture.processes)
        if missing > 0:
            reasons.append(f"{missing} of {picture.places} processes are to be started")
        document = {"ready": not reasons, "supervisor": os.getpid(), "reasons": reasons, "processes": rows}
        return Answer.of(document, _UNAVAILABLE if reasons else 200)

    def _ask_about_readiness(self) -> tuple[Picture | None, list[_Told]]:
        """How things stand, and what the processes say to that."""
        picture = self._look()
        answers: list[_Told] = []
        for _ in range(_MOST_LOOKS):
            if picture is None:
                break
            answers = list(_ask("/readyz", picture.processes))
            if all(status == 200 for process, status, _ in answers if process.at_work):
                break
            # One that says that it drains may have been replaced since the look, which is as it should be.
            earlier, picture = picture, self._look()
            if picture is None or picture.at_work == earlier.at_work:
                break
        return picture, answers

    def _jobs(self, request: Request) -> Answer:
        if not request.is_from_here:
            return Answer.of({"error": NOT_FROM_AFAR}, 403)
        picture = self._look()
        if picture is None:
            return Answer.of({"error": "the supervisor does not answer"}, _UNAVAILABLE)
        jobs: list[dict[str, Any]] = []
        silent = []
        for process, status, told in _ask("/jobs", picture.processes):
            if status == 200:
                jobs += [{"pid": process.pid, **job} for job in told.get("jobs", [])]
            elif process.state != "starting":
                silent.append(process.pid)
        jobs.sort(key=lambda job: -float(job["running_seconds"]))
        return Answer.of({"supervisor": os.getpid(), "jobs": jobs, "unanswered": silent})

    def _metrics(self, request: Request) -> Answer:
        picture = self._look()
        # First who answers at all: one that is stuck would cost the time of the scrape.
        told = _ask("/livez", picture.processes if picture else ())
        answering = [process for process, status, _ in told if status == 200]
        # One that stays, if there is one: those that leave are busy with that.
        for process in sorted(answering, key=lambda process: process.state != "up"):
            with contextlib.suppress(OSError):
                status, content_type, body = fetch(process.address, "/metrics", timeout=_METRICS_SECONDS)
                return Answer(status, body, content_type)
        return Answer.of({"error": "there is no process that answers"}, _UNAVAILABLE)


def _ask(path: str, processes: Sequence[ProcessState]) -> Iterator[_Told]:
    """What the processes answer, who are asked all at once."""

    def ask(process: ProcessState) -> tuple[int | None, dict[str, Any]]:
        if process.state == "starting":
            return None, {}
        try:
            status, _, body = fetch(process.address, path, timeout=CHILD_SECONDS)
            return status, json.loads(body)
        except (OSError, ValueError):
            return None, {}

    if not processes:
        return
    with ThreadPoolExecutor(min(len(processes), _MOST_AT_A_TIME), "greenjobs http") as threads:
        answers = list(threads.map(ask, processes))
    for process, (status, told) in zip(processes, answers, strict=True):
        yield process, status, told


def _row(process: ProcessState, **more: Any) -> dict[str, Any]:
    known = {"pid": process.pid, "state": process.state, "age_seconds": round(process.age_seconds, 1)}
    return {**more, **known}


def _reasons(process: ProcessState, status: int | None, told: dict[str, Any]) -> list[str]:
    if process.state == "starting":
        return ["it is starting"]
    if status is None:
        return [f"it has not answered within {CHILD_SECONDS:g} s"]
    return [str(reason) for reason in told.get("reasons", [])]


# --- the folder -------------------------------------------------------------------------------------------------------


def _make_folder() -> tuple[Path, int]:
    """A folder for this user alone, and the descriptor of a lock in it, which says that its supervisor lives."""
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) > _LONGEST_PARENT:
        parent = Path("/tmp")
    _remove_stale(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    # Under its own name only when it is locked: before that, others would take the folder for left behind.
    lock = os.open(folder / "new", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(folder / "new", folder / _LOCK)
    return folder, lock


def _remove_stale(parent: Path) -> None:
    """Remove what supervisors of this user have left that were killed, and could not."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
