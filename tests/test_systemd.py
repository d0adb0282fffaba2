"""What a runner and a supervisor tell systemd: read from a real socket, as systemd reads it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import gevent
import psycopg2
import pytest
from gevent.socket import wait_read
from processes import PATIENCE_SECONDS, start, write_application
from test_supervisor import fleet
from waiting import eventually

from greenjobs import systemd
from greenjobs.systemd import Notifier


class Manager:
    """The other end of the line. As systemd does, it reads all the time: the system keeps ten messages only."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)
        self._messages: deque[list[str]] = deque()
        self._reader = gevent.spawn(self._read_for_ever)
        self.address = address

    def hear(self) -> list[str]:
        """The lines of the next message; blocks until there is one."""
        eventually(lambda: self._messages, "nothing is heard", seconds=PATIENCE_SECONDS)
        return self._messages.popleft()

    def hear_until(self, line: str) -> list[str]:
        """The next message with this line, or one that begins with it."""
        heard: list[list[str]] = []

        def is_heard() -> bool:
            while self._messages:
                heard.append(self._messages.popleft())
                if any(each.startswith(line) for each in heard[-1]):
                    return True
            return False

        eventually(is_heard, f"{line} is not heard, but {heard}", seconds=PATIENCE_SECONDS)
        return heard[-1]

    def hears_nothing(self) -> bool:
        """Whether nothing is there to be heard at this moment."""
        self._read()
        return not self._messages

    def forget(self) -> None:
        """Throw away what has come so far."""
        self._read()
        self._messages.clear()

    def close(self) -> None:
        self._reader.kill()
        self._socket.close()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._messages.append(self._socket.recv(4096).decode().splitlines())

    def _read_for_ever(self) -> None:
        while True:
            wait_read(self._socket.fileno())
            self._read()


@pytest.fixture
def manager() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Manager(f"{folder}/notify")) as manager:
        yield manager


@pytest.fixture
def asked(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> Manager:
    """A manager whom this process's environment names."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    return manager


# The line


def test_service_says_that_it_is_ready(asked: Manager) -> None:
    Notifier.taken().say_ready()
    assert asked.hear() == ["READY=1"]


def test_reload_begins_with_the_time_by_the_clock_of_systemd(asked: Manager) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier.taken().say_reloading()
    first, second = asked.hear()
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_service_that_stops_asks_for_as_long_as_it_may_take(asked: Manager) -> None:
    Notifier.taken().say_stopping(60)
    assert asked.hear()[:2] == ["STOPPING=1", f"EXTEND_TIMEOUT_USEC={(60 + 30) * 1_000_000}"]


def test_status_is_said_when_it_has_changed(asked: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "STATUS_SECONDS", 0.0)
    notifier = Notifier.taken()
    for status in ("one", "one", "two"):
        notifier.beat(status)
    assert [asked.hear(), asked.hear()] == [["STATUS=one"], ["STATUS=two"]]
    assert asked.hears_nothing()


def test_watchdog_hears_twice_in_its_time(asked: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier.taken()
    assert (notifier.watchdog_seconds, notifier.beat_seconds) == (3.0, 1.5)
    notifier.beat("fine")
    assert asked.hear() == ["WATCHDOG=1", "STATUS=fine"]


def test_watchdog_of_another_process_is_not_ours(asked: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert Notifier.taken().watchdog_seconds is None


@pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")
def test_abstract_socket_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Manager(f"@greenjobs-test-{os.getpid()}")) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        Notifier.taken().say_ready()
        assert manager.hear() == ["READY=1"]


def test_variables_are_taken_away(asked: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert Notifier.taken().is_heard
    assert {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}.isdisjoint(os.environ)
    assert not Notifier.taken().is_heard


def test_nothing_is_said_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier.taken()
    notifier.say_ready()
    notifier.beat("fine")
    assert not notifier.is_heard


def test_manager_that_is_gone_is_no_reason_to_fail(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{manager.address}-not")
    Notifier.taken().say_ready()


def test_manager_that_does_not_read_is_no_reason_to_wait(asked: Manager) -> None:
    notifier = Notifier.taken()
    for _ in range(10_000):  # more than the queue of any socket holds
        notifier.say_ready()


def test_socket_of_another_kind_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "vsock:2:1234")
    assert not Notifier.taken().is_heard
    assert "NOTIFY_SOCKET is vsock:2:1234" in caplog.text


# A runner

APPLICATION = """
    import os, subprocess, time
    import gevent.monkey
    from greenjobs import job

    print("inherited:", subprocess.run("env", capture_output=True, text=True).stdout.count("NOTIFY_SOCKET"), flush=True)

    @job
    def wait_at_gate():
        print("began", flush=True)
        while not os.path.exists("gate"):
            time.sleep(0.01)

    @job
    def hold_the_event_loop():
        print("holds", flush=True)
        while not os.path.exists("gate"):
            gevent.monkey.get_original("time", "sleep")(0.01)
"""


def enqueue(database_url: str, job_type: str) -> None:
    with contextlib.closing(psycopg2.connect(database_url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO background_jobs (job_type, data) VALUES (%s, '{}')", (job_type,))


def test_runner_tells_of_its_life(tmp_path: Path, database_url: str, manager: Manager) -> None:
    write_application(tmp_path, APPLICATION)
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "400000"}
    words = ("greenjobs", "run", "--grace", "40")
    with start(*words, folder=tmp_path, database_url=database_url, environment=environment) as runner:
        assert manager.hear() == ["READY=1"]
        runner.wait_for_line(r"greenjobs\.cli: jobs: ")  # so it claims
        runner.wait_for_line("^inherited: 0$")
        assert manager.hear_until("WATCHDOG=1") == ["WATCHDOG=1", "STATUS=0 jobs running, 0 finished"]
        assert manager.hear_until("WATCHDOG=1") == ["WATCHDOG=1"]

        # A job that lets others run is no reason to bark.
        enqueue(database_url, "wait_at_gate")
        runner.wait_for_line("^began$")
        manager.forget()
        manager.hear_until("WATCHDOG=1")

        # One that holds the event loop is.
        enqueue(database_url, "hold_the_event_loop")
        runner.wait_for_line("^holds$")
        manager.forget()
        until = time.monotonic() + 1.0
        eventually(lambda: time.monotonic() > until, "more than twice the watchdog's time is over")
        assert manager.hears_nothing()
        (tmp_path / "gate").touch()
        manager.hear_until("WATCHDOG=1")

        (tmp_path / "gate").unlink()
        enqueue(database_url, "wait_at_gate")
        runner.wait_for_line(r"began[\s\S]*began")
        runner.terminate()
        assert manager.hear_until("STOPPING=1")[1] == f"EXTEND_TIMEOUT_USEC={(40 + 30) * 1_000_000}"
        manager.hear_until("WATCHDOG=1")  # and it is alive while it drains
        (tmp_path / "gate").touch()
        assert runner.wait() == 0


# A supervisor


def test_supervisor_tells_of_start_reload_and_end(tmp_path: Path, database_url: str, manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "400000"}
    with fleet(tmp_path, database_url, "--processes", "2", environment=environment) as several:
        # Its loop turns, and tells the watchdog so, before the first process has come up.
        manager.hear_until("READY=1")
        several.process.wait_for_line(r"supervisor: process \d+ is up")
        several.wait_until_up(2)
        manager.hear_until("STATUS=2 of 2 processes are up")
        manager.hear_until("WATCHDOG=1")

        several.process.send(signal.SIGHUP)
        assert manager.hear_until("RELOADING=1")[1].startswith("MONOTONIC_USEC=")
        manager.hear_until("READY=1")
        assert len(several.wait_until_up(4)) == 4

        # New code that does not start ends the reload, too.
        write_application(tmp_path, "1 / 0")
        several.process.send(signal.SIGHUP)
        manager.hear_until("RELOADING=1")
        manager.hear_until("READY=1")
        several.process.wait_for_line("the old code goes on")

        several.process.terminate()
        assert manager.hear_until("STOPPING=1")[1] == f"EXTEND_TIMEOUT_USEC={(30 + 30) * 1_000_000}"
        assert several.process.wait() == 0
