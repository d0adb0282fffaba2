"""Counts how the attempts of a runner end, and adds that to the table every few seconds.

To count is a look into a dict and three additions; there is no lock, and nothing is written while nothing is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gevent
from gevent.lock import BoundedSemaphore

from greenjobs import storage
from greenjobs.tally import Tally

if TYPE_CHECKING:
    from greenjobs.service import Service, Spawn

# A minute's counts are written some ten times; what a killed runner had counted, and not written, is lost.
_PAUSE_SECONDS = 5.0


class Counting:
    """The counts of one runner: the tallies of its workers, and what it finds out about jobs of others.

    Each writing has a number, under which the register of runners remembers it: one that nobody answered is tried again
    until it is known to be done, and is never done twice.
    """

    def __init__(self, service: Service, *, spawn: Spawn) -> None:
        self._service = service
        self._spawn = spawn
        self._tallies: list[tuple[str, Mapping[str, Tally]]] = []
        self._others: dict[str, dict[str, Tally]] = {}
        self._writing = BoundedSemaphore()
        self._turn = 0
        self._greenlets: list[gevent.Greenlet[..., None]] = []

    def watch(self, queue: str, tallies: Mapping[str, Tally]) -> None:
        """Gather from these tallies, which are by job type, from now on."""
        self._tallies.append((queue, tallies))

    def note_failed(self, queue: str, job_type: str) -> None:
        """Count a job that failed for good although no attempt of it ended here: its runners died."""
        if queue not in self._others:
            self.watch(queue, self._others.setdefault(queue, {}))
        self._others[queue].setdefault(job_type, Tally()).failed += 1

    def start(self) -> None:
        """Begin to write."""
        self._greenlets = [self._spawn(self._write_for_ever)]

    def stop(self) -> None:
        """End it; what is not written by then is not going to be."""
        gevent.killall(self._greenlets)

    def write(self) -> None:
        """Block until all that was counted so far is written."""
        with self._writing:
            counts = self._take()
            runners = self._service.runner_ids
            if counts and runners:  # nothing can be counted before there is an id to claim under
                self._turn += 1
                self._service.call(storage.add_counts, runners[-1], self._turn, counts)

    def _write_for_ever(self) -> None:
        while True:
            gevent.sleep(_PAUSE_SECONDS)
            self.write()

    def _take(self) -> list[dict[str, Any]]:
        counts: dict[tuple[str, str], dict[str, Any]] = {}
        for queue, tallies in self._tallies:
            for job_type, tally in tallies.items():
                taken = tally.take()
                if taken is None:
                    continue
                known = counts.setdefault((queue, job_type), {"queue": queue, "job_type": job_type})
                for name, value in taken.items():
                    known[name] = known.get(name, 0) + value
        return [counts[key] for key in sorted(counts)]
