"""Where the processes of a supervisor keep their metrics, so that whichever of them is asked answers for all.

prometheus_client writes one file for each process and kind of metric to the folder that PROMETHEUS_MULTIPROC_DIR names
when it is imported. Files are kept when a process ends, lest counters go back; those of gauges of the living are not. A
process that takes the place of another gets its number, too, and goes on with its files: else there would be more of
them with every replacement. The processes that a runner has for jobs are numbered below its own: "2-1". Nothing here
imports prometheus_client, for a supervisor is light.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that prometheus_client reads."""

NUMBER = "GREENJOBS_METRICS_NUMBER"
"""The variable that tells a child under which number it keeps its metrics. Without one that is its process id."""

own_number: str | None = None
"""That of this process, once it has been taken: see greenjobs.contrib.metrics_number."""

_PREFIX = "greenjobs-metrics-"
_LOCK = "lock"


class MetricsFolder:
    """The folder that the environment names; else, where prometheus_client is installed, one of our own, which is
    removed at the end."""

    def __init__(self) -> None:
        given = os.environ.get(FOLDER)
        self._is_ours = not given and importlib.util.find_spec("prometheus_client") is not None
        self._path: Path | None = None
        self._lock: int | None = None
        if given:
            self._path = Path(given)
            # The first metric of each process would fail without it.
            self._path.mkdir(parents=True, exist_ok=True)
        elif self._is_ours:
            try:
                self._path = Path(tempfile.mkdtemp(prefix=_PREFIX))
                self._lock = _hold(self._path)
                _remove_abandoned(self._path)
            except OSError as error:
                self._is_ours = False
                logger.warning("no folder for metrics (%s): each process has its own; %s can name one", error, FOLDER)

    def environment(self, number: int) -> Mapping[str, str]:
        """What is added to the environment of the process that has this number."""
        # In a folder of somebody else's, a number could be the id of a process.
        return {FOLDER: str(self._path), NUMBER: str(number)} if self._is_ours else {}

    def forget(self, number: int, process_id: int) -> None:
        """The process of this number has ended: its gauges count no more. What it has counted stays."""
        if self._path is not None:
            forget(self._path, str(number if self._is_ours else process_id))

    def close(self) -> None:
        """Remove what is ours."""
        if self._is_ours and self._path is not None:
            with contextlib.suppress(OSError):  # a process that it left behind may still be writing
                shutil.rmtree(self._path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class JobProcessMetrics:
    """Those of one of the processes that a runner has for jobs: the lowest number that no living one has.

    `numbers` are those of the living.
    """

    def __init__(self, numbers: set[int]) -> None:
        self._numbers = numbers
        self._number = free_number(numbers)
        numbers.add(self._number)

    def environment(self) -> Mapping[str, str]:
        """What is added to its environment."""
        return {} if own_number is None else {NUMBER: f"{own_number}-{self._number}"}

    def forget(self, process_id: int) -> None:
        """It has ended: its gauges count no more, and another may have its number."""
        self._numbers.discard(self._number)
        folder = os.environ.get(FOLDER)
        if folder:
            forget(Path(folder), str(process_id) if own_number is None else f"{own_number}-{self._number}")


def forget(folder: Path, identifier: str) -> None:
    """Remove the gauges of the living of a process that lives no more, and of its processes for jobs."""
    for pattern in (f"gauge_live*_{identifier}.db", f"gauge_live*_{identifier}-*.db"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def _hold(folder: Path) -> int:
    """Say that the folder is in use for as long as this process lives, and nobody closes what is returned."""
    # Locked before it has its name, lest somebody takes it for that of one who died.
    descriptor = os.open(folder / "locking", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(folder / "locking", folder / _LOCK)
    return descriptor


def _remove_abandoned(own: Path) -> None:
    """Remove what supervisors left behind that were killed."""
    for folder in own.parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, or somebody else's, or gone
            if folder == own or folder.is_symlink():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def free_number(taken: Collection[int]) -> int:
    """The lowest number that no living process has."""
    number = 1
    while number in taken:
        number += 1
    return number
