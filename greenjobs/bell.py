"""What wakes a supervisor: signals, files that have changed, somebody who asks. All of it goes through one socket.

So everything is done in one loop, one after the other, and the handlers of signals do nothing.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD)

# These go the way of the signals' numbers, and are none.
FILES_CHANGED = 0
ASKED = 255


class Bell:
    """It is rung with a number, of a signal or one of the others; a selector tells when it was."""

    def __init__(self) -> None:
        self._bell, self._ringing = socket.socketpair()
        for end in (self._bell, self._ringing):
            end.setblocking(False)

    def fileno(self) -> int:
        """Readable when there is something to be heard."""
        return self._bell.fileno()

    def ring(self, number: int) -> None:
        """From any thread. Raises BlockingIOError when it was rung a thousand times and nobody listened."""
        self._ringing.send(bytes([number]))

    def heard(self) -> bytes:
        """The numbers that it was rung with since the last time."""
        return self._bell.recv(4096)

    @contextlib.contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """Inside of the block signals ring it, and do nothing else. For the main thread."""
        former_bell = signal.set_wakeup_fd(self._ringing.fileno(), warn_on_full_buffer=False)
        former = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        try:
            yield
        finally:
            signal.set_wakeup_fd(former_bell)
            for number, handler in former.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def watching_files(bell: Bell, folder: str) -> Iterator[None]:
    """Inside of the block the bell is rung when Python files, or settings, change in this folder."""
    import watchfiles

    def is_code(change: Any, path: str) -> bool:
        is_ours = path.endswith(".py") or Path(path).name in ("setup.cfg", "pyproject.toml")
        return is_ours and watchfiles.DefaultFilter()(change, path)

    def watch() -> None:
        for _ in watchfiles.watch(folder, watch_filter=is_code, stop_event=is_over):
            bell.ring(FILES_CHANGED)

    is_over = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    logger.info("reloading when Python files change in %s", folder)
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
