"""The application of tests/test_job_processes.py, which is loaded there and in the processes of its jobs."""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent.monkey
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import greenjobs
from greenjobs import current_job, job, surroundings
from greenjobs.contrib.opentelemetry import GreenjobsInstrumentor

around: list[str] = []
recorded = InMemorySpanExporter()


@contextlib.contextmanager
def surrounding() -> Iterator[None]:
    around.append("begun")
    yield
    around.clear()


if "greenjobs.job_process" in sys.modules:  # not around the jobs of other tests
    surroundings.surround(surrounding)
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(recorded))
    GreenjobsInstrumentor().instrument(tracer_provider=provider)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(13))


class PartnerDown(Exception):
    """An error with an idea of its own about its arguments."""

    def __init__(self, partner: str, *, since: int) -> None:
        super().__init__(f"{partner} is down since {since}")
        self.since = since


@job(executor="process", keep="1 hour", keep_result=True)
def look(text: str) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "text": text,
        "job": [current_job.id, current_job.name, current_job.queue, current_job.attempt],
        "headers": current_job.headers,
        "context": getattr(current_job.context, "__name__", None),
        "around": list(around),
        "is_patched": gevent.monkey.is_module_patched("socket"),
        "in_arguments": [word for word in sys.argv if "postgresql" in word],
    }


@job(executor="process")
def enqueue_another(text: str) -> None:
    look.delay(text)


@job(executor="process")
def complete(text: str) -> None:
    with current_job.transaction() as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO notes (text) VALUES (%s)", (text,))
        look.delay(text)


@job(executor="process")
def sleep_until_told(folder: str) -> None:
    Path(folder, "begun").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.01)


@job(executor="process")
def complete_when_told(folder: str) -> None:
    sleep_until_told.function(folder)
    complete.function("told")


@job(executor="process", max_retries=0)
def sleep_in_the_database() -> None:
    with greenjobs.connection() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(1)")


@job(executor="process")
def leave_a_thread() -> None:
    threading.Thread(target=threading.Event().wait).start()


@job(executor="process")
def lose(text: str) -> None:
    """Somebody takes the job away while it runs."""
    with greenjobs.connection() as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE background_jobs SET attempt = attempt + 1 WHERE id = %s", (current_job.id,))
    complete.function(text)


@job(executor="process", max_retries=0, keep_log=True)
def speak(then: str) -> None:
    current_job.log.info("begun")
    for number in range(1000):
        current_job.progress(number, 1000, "on it")
    if then == "fail":
        raise PartnerDown("partner", since=7)


@job(executor="process", max_retries=0, keep="1 hour", keep_result=True)
def fork(then: str) -> list[Any]:
    """What the job is, and the status of the child that it forks, which leaves the function in some way."""
    child = os.fork()
    if child == 0:
        if then == "raise":
            raise PartnerDown("nobody", since=1)
        if then == "exit":
            sys.exit(3)
        return ["child", 0]
    _, status = os.waitpid(child, 0)
    return ["parent", os.waitstatus_to_exitcode(status)]


@job(executor="process", max_retries=0, keep="1 hour", keep_result=True)
def terminate_a_child() -> int | None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join()
    return child.exitcode


@job(executor="process", max_retries=0)
def fail_with_a_number() -> None:
    raise KeyError(404)


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("not for anybody's eyes")


@job(executor="process", max_retries=0)
def fail_with_the_unspeakable() -> None:
    raise ValueError(Unspeakable())


class Obstinate(Exception):
    """An error that answers to nothing."""

    def __str__(self) -> str:
        raise SystemExit(3)

    @property
    def args(self) -> Any:
        raise RuntimeError("not for anybody's eyes")


@job(executor="process", max_retries=0)
def fail_obstinately() -> None:
    error = Obstinate()
    error.__dict__[1, 2] = "no name"
    raise error


@job(executor="process", max_retries=0)
def close_everything() -> None:
    os.closerange(3, 1000)


@job(executor="process", discard_on=PartnerDown)
def be_discarded() -> None:
    raise PartnerDown("partner", since=7)


@job(executor="process", max_retries=1, backoff=[0.0])
def die(how: str, folder: str) -> None:
    note = Path(folder, f"{current_job.attempt}")
    note.write_text(str(os.getpid()))
    if current_job.attempt > 1:
        return
    if how == "exit":
        os._exit(7)
    if how == "segfault":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL)


@job(executor="process", max_retries=0, retry_on=ValueError)
def die_for_good() -> None:
    os._exit(9)


@job(executor="process", timeout=0.3, max_retries=0)
def take_too_long(how: str) -> None:
    if how == "sleep":
        time.sleep(60)
    elif how == "compute":
        while True:
            sum(range(1000))
    with greenjobs.connection() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(60)")


@job(executor="process", timeout=0.3, max_retries=0)
def sleep_through_the_first_signal() -> None:
    """As one does that goes to sleep at the very moment in which it arrives."""
    kill, missed = signal.pthread_kill, []

    def pthread_kill(thread: int, number: int) -> None:
        if missed:
            kill(thread, number)
        missed.append(number)

    signal.pthread_kill = pthread_kill
    try:
        time.sleep(60)
    finally:
        signal.pthread_kill = kill


@job(executor="process", timeout=0.3, keep="1 hour", keep_result=True)
def end_well() -> str:
    try:
        time.sleep(60)
    except TimeoutError as error:
        return str(error)
    return "it slept"


@job(executor="process", hard_timeout=0.3, max_retries=0)
def ignore() -> None:
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


@job(executor="process")
def sleep(folder: str) -> None:
    beginning = Path(folder, "beginning")
    beginning.write_text(str(os.getpid()))
    beginning.rename(Path(folder, "begun"))  # so that nobody reads half of it
    time.sleep(60)


@job
def in_the_loop() -> None: ...


@job(executor="process")
def copy(text: str) -> None:
    with greenjobs.connection() as connection, connection.cursor() as cursor:
        cursor.copy_expert("COPY notes (text) FROM STDIN", io.StringIO(f"{text}\n"))


@job(executor="process", max_retries=1, backoff=0.0)
def fail_once() -> None:
    if current_job.attempt == 1:
        raise PartnerDown("the bank", since=1999)


@job(executor="process", keep="1 hour", keep_result=True)
def spans_of(job_type: str) -> list[list[str]]:
    """The outcome and the status of the spans of this type here."""
    mine = (span for span in recorded.get_finished_spans() if (span.attributes or {})["greenjobs.job_type"] == job_type)
    return [[str((span.attributes or {})["greenjobs.outcome"]), span.status.status_code.name] for span in mine]
