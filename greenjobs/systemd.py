"""What a service tells systemd, and other programs that know its protocol: sd_notify(3), in datagrams.

Where nobody asked to be told, by NOTIFY_SOCKET, nothing is said. The variables are taken out of the environment: the
programs that jobs start, and the processes of a supervisor, have nothing to say in the service's name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time

logger = logging.getLogger(__name__)

# How often the status is said anew, if it has changed.
STATUS_SECONDS = 5.0

# How much longer than `grace` a runner may take to end before systemd kills it: as long as a supervisor allows.
STOP_SECONDS = 30.0


class Notifier:
    """One service's line to its manager; `Notifier.taken()` makes it from the environment."""

    def __init__(self, address: str | None = None, *, watchdog_seconds: float | None = None) -> None:
        # A leading "@" stands for the zero byte of an abstract name.
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self.watchdog_seconds = watchdog_seconds if address else None
        """How long the manager waits for a sign of life before it takes the service for stuck; None: for ever."""
        self._status = ""
        self._said_status_at = float("-inf")
        self._alive_at = float("-inf")

    @classmethod
    def taken(cls) -> Notifier:
        """What the environment asks for, which then asks no more; one that says nothing if it does not."""
        address = os.environ.pop("NOTIFY_SOCKET", None)
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        meant_for = os.environ.pop("WATCHDOG_PID", "")
        is_meant = meant_for in ("", str(os.getpid()))
        seconds = int(microseconds) / 1e6 if is_meant and microseconds.isdigit() and int(microseconds) else None
        if address and not address.startswith(("/", "@")):  # vsock:, for managers of virtual machines
            logger.warning("NOTIFY_SOCKET is %s, which is no Unix socket: nothing is said there", address)
            address = None
        return cls(address, watchdog_seconds=seconds)

    @property
    def is_heard(self) -> bool:
        """Whether anybody asked to be told."""
        return self._address is not None

    @property
    def beat_seconds(self) -> float:
        """How often `beat` wants to be called: twice in the watchdog's time, as sd_watchdog_enabled(3) asks."""
        return STATUS_SECONDS if self.watchdog_seconds is None else min(self.watchdog_seconds / 2, STATUS_SECONDS)

    def say_ready(self) -> None:
        """The service is at work; also the end of a reload."""
        self._say("READY=1")

    def say_reloading(self) -> None:
        """It was asked to load anew, and does; `say_ready` says when it has."""
        self._say("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def say_stopping(self, grace: float) -> None:
        """It is about to end, and lets jobs finish for `grace` seconds: the manager is to be that patient."""
        patience = int((grace + STOP_SECONDS) * 1e6)
        self._say("STOPPING=1", f"EXTEND_TIMEOUT_USEC={patience}", "STATUS=stopping: waiting for running jobs")

    def beat(self, status: str) -> None:
        """Say that the service is alive, where a watchdog wants to know; and its status, if it is another."""
        if self._address is None:
            return
        now = time.monotonic()
        lines = []
        if self.watchdog_seconds is not None and now - self._alive_at >= self.beat_seconds * 0.5:
            self._alive_at = now
            lines.append("WATCHDOG=1")
        if status != self._status and now - self._said_status_at >= STATUS_SECONDS:
            self._status, self._said_status_at = status, now
            lines.append(f"STATUS={status}")
        if lines:
            self._say(*lines)

    def _say(self, *lines: str) -> None:
        if self._address is None:
            return
        # A manager that is being restarted, or has too much to read, is no reason to stop or to wait.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.setblocking(False)
            line.sendto("\n".join(lines).encode(), self._address)
