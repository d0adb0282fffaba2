"""Writes what running jobs say of themselves, for all jobs of a runner together, about once a second.

What an attempt said at last, when its row stays, is written before its outcome, so that a failure has its log.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event
from gevent.lock import BoundedSemaphore
from gevent.monkey import get_original

from greenjobs import storage
from greenjobs.progress import Report

if TYPE_CHECKING:
    from greenjobs.service import Service, Spawn

# The first news after a pause go at once; what follows gathers for so long. Every write makes a new version of the row.
_PAUSE_SECONDS = 1.0

# A statement has the news of so many jobs at most; a hundred lines of each may be half a megabyte together.
_LARGEST_GROUP = 100

_get_ident = get_original("_thread", "get_ident")


class Reporter:
    """The recorder of a runner's reports. Begins at once; nothing is written while nobody has news."""

    def __init__(self, service: Service, *, spawn: Spawn) -> None:
        self._service = service
        self._hub = gevent.get_hub()
        self._expected: list[Report] = []
        self._ended: list[Report] = []
        self._arrived = Event()
        # One writer at a time: else older news might come to lie upon newer ones.
        self._writing = BoundedSemaphore()
        self._greenlet = spawn(self._write_for_ever)

    def expect(self, report: Report) -> None:
        """There are news in this report; returns at once. Also from a thread that runs a job."""
        if _get_ident() != self._hub.thread_ident:
            self._hub.loop.run_callback_threadsafe(self.expect, report)
            return
        self._expected.append(report)
        self._arrived.set()

    def finish(self, report: Report) -> None:
        """The attempt has ended: `flush` is to write what is left."""
        self._ended.append(report)

    def flush(self) -> None:
        """Block until all news of attempts that ended are written, as far as their rows are still held here.

        To be called before the outcome of an attempt whose row stays, or is copied, is written.
        """
        if not self._ended:
            return
        with self._writing:
            # They stay in the list meanwhile, for others that come to flush have to wait for them.
            ended = self._ended.copy()
            for start in range(0, len(ended), _LARGEST_GROUP):
                news = [report for report in ended[start : start + _LARGEST_GROUP] if report.is_news]
                if news:
                    documents = [report.take() for report in news]
                    service = self._service
                    service.call(storage.report, service.runner_ids, documents, skip_locked=False)
            del self._ended[: len(ended)]

    def stop(self) -> None:
        """End it; what is not written by then is not going to be."""
        self._greenlet.kill()

    def _write_for_ever(self) -> None:
        while True:
            self._arrived.wait()
            began = time.monotonic()
            self._arrived.clear()
            expected, self._expected = self._expected, []
            for start in range(0, len(expected), _LARGEST_GROUP):
                with self._writing:
                    self._write(expected[start : start + _LARGEST_GROUP])
            gevent.sleep(max(_PAUSE_SECONDS - (time.monotonic() - began), 0))

    def _write(self, expected: list[Report]) -> None:
        # Of those that have ended, `flush` takes care, or nobody needs to.
        reports = [report for report in expected if not report.has_ended and report.is_news]
        for report in expected:
            report.is_expected = False
        if not reports:
            return
        documents = [report.take() for report in reports]
        service = self._service
        written = service.call(storage.report, service.runner_ids, documents, skip_locked=True)
        for report in reports:
            if report.id not in written:
                # Somebody changes the row just now, to cancel it perhaps; or it is not held here any more.
                report.put_back()
                if not report.has_ended and not report.is_expected:
                    report.is_expected = True
                    self.expect(report)
