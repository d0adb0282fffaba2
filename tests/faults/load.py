"""Enqueuers: one process of many threads, each of which enqueues jobs one after the other, and writes down the handles.

    python -m faults.load --threads 50 --jobs 1000          as many jobs, and then the end
    python -m faults.load --threads 50 --pause 0.05         until SIGTERM

Ordinary threads, as in a web server that nobody patched. An enqueue that fails is counted and not repeated, as nobody
can know whether it was committed; the next job has a token of its own. At its end it prints what it counted as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import threading
import traceback
from collections import Counter

import psycopg2

from greenjobs.errors import DatabaseUnavailable

from . import application

# So many handles are written together.
_HANDLES = 20


class Enqueuers:
    """The threads of this process, and what they count together."""

    def __init__(self, threads: int, jobs: int | None, pause: float, longest: float) -> None:
        self._pause = pause
        self._longest = longest
        self._numbers = itertools.count() if jobs is None else iter(range(jobs))
        self._stop = threading.Event()
        self._errors: Counter[str] = Counter()
        self._returned = 0
        self._defect = ""
        self._threads = [threading.Thread(target=self._enqueue) for _ in range(threads)]

    def work(self) -> int:
        """Enqueue to the end; returns the exit status."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        for thread in self._threads:
            thread.start()
        print("enqueuing", flush=True)
        for thread in self._threads:
            thread.join()
        print(json.dumps({"returned": self._returned, "errors": self._errors}), flush=True)
        print(self._defect, file=sys.stderr)
        return 1 if self._defect else 0

    def _enqueue(self) -> None:
        try:
            handles: list[tuple[int, str]] = []
            while not self._stop.is_set() and (number := next(self._numbers, None)) is not None:
                self._enqueue_one(f"{os.getpid()}-{number}", handles)
                if len(handles) >= _HANDLES:
                    self._write(handles)
                    handles = []
                if self._pause:
                    self._stop.wait(random.uniform(0, 2 * self._pause))
            self._write(handles)
        except BaseException:
            self._defect = traceback.format_exc()
            self._stop.set()

    def _enqueue_one(self, token: str, handles: list[tuple[int, str]]) -> None:
        try:
            if random.random() < 0.5:
                handle = application.tick.delay(token)
            else:
                handle = application.linger.delay(token, random.uniform(0, self._longest))
        except (DatabaseUnavailable, psycopg2.Error) as error:
            self._errors[type(error).__name__] += 1
            self._stop.wait(0.1)
        else:
            handles.append((handle.id, token))

    def _write(self, handles: list[tuple[int, str]]) -> None:
        if handles:
            ids, tokens = zip(*handles, strict=True)
            application.write("INSERT INTO faults_returned SELECT * FROM unnest(%s, %s)", list(ids), list(tokens))
            self._returned += len(handles)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--pause", type=float, default=0.0, help="mean seconds between two jobs of a thread")
    parser.add_argument("--longest", type=float, default=0.05, help="seconds that the longest job takes")
    options = parser.parse_args()
    return Enqueuers(options.threads, options.jobs, options.pause, options.longest).work()


if __name__ == "__main__":
    sys.exit(main())
