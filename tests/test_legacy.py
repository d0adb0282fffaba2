"""Code that was written for threads runs unchanged: of each library fifty jobs are under way at once, in one process.

That they are is counted, not timed: each waits for something that comes when all fifty wait for it, and not before. So
one that held up the others would keep them, and itself, from ever ending.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import databases
import pages
import processes
import psycopg2
import pytest
import running
from gevent.event import Event
from gevent.pywsgi import WSGIServer
from gevent.server import StreamServer
from waiting import eventually

AT_ONCE = 50

APPLICATION = """
    import concurrent.futures, logging, os, queue, smtplib, subprocess, threading, time
    from collections import Counter
    from email.message import EmailMessage

    import gevent, gevent.monkey
    import boto3, psycopg2, psycopg2.pool, requests, sqlalchemy, urllib3
    from botocore.config import Config
    from greenjobs import config, job

    AT_ONCE = 50
    HTTP = "http://127.0.0.1:" + os.environ["LEGACY_HTTP"]
    DATABASE = os.environ["GREENJOBS_DATABASE_URL"]
    logger = logging.getLogger("legacy")
    logger.addHandler(logging.FileHandler("legacy.log"))
    logger.propagate = False

    arrived = Counter()

    def meet(what, count=AT_ONCE):
        arrived[what] += 1
        while arrived[what] < count:
            time.sleep(0.01)

    @job(queue="time", max_retries=0)
    def with_time(number):
        meet("time")

    @job(queue="requests", max_retries=0)
    def with_requests(number):
        answer = requests.get(f"{HTTP}/requests", timeout=60)
        assert answer.text == "all there"

    http = urllib3.PoolManager(maxsize=AT_ONCE, block=True)

    @job(queue="urllib3", max_retries=0)
    def with_urllib3(number):
        assert http.request("GET", f"{HTTP}/urllib3", timeout=60).data == b"all there"

    s3 = boto3.client(
        "s3",
        endpoint_url=HTTP,
        region_name="eu-west-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=Config(s3={"addressing_style": "path"}, max_pool_connections=AT_ONCE),
    )

    @job(queue="boto3", max_retries=0)
    def with_boto3(number):
        s3.head_bucket(Bucket="boto3")

    @job(queue="smtplib", max_retries=0)
    def with_smtplib(number):
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = "shop@example.com", "ann@example.com", f"Order {number}"
        mail.set_content("Thank you!")
        with smtplib.SMTP("127.0.0.1", int(os.environ["LEGACY_SMTP"]), timeout=60) as server:
            server.send_message(mail)

    @job(queue="psycopg2", max_retries=0)
    def with_psycopg2(number):
        connection = psycopg2.connect(DATABASE)
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock_shared(hashtext('psycopg2'))")
        connection.close()

    threaded_pool = psycopg2.pool.ThreadedConnectionPool(1, AT_ONCE, DATABASE)

    @job(queue="psycopg2.pool", max_retries=0)
    def with_psycopg2_pool(number):
        connection = threaded_pool.getconn()
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock_shared(hashtext('psycopg2.pool'))")
        threaded_pool.putconn(connection)

    engine = sqlalchemy.create_engine(
        DATABASE.replace("postgresql:", "postgresql+psycopg2:", 1),
        pool_size=AT_ONCE // 2,
        max_overflow=AT_ONCE // 2,
    )

    @job(queue="sqlalchemy", max_retries=0)
    def with_sqlalchemy(number):
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock_shared(hashtext('sqlalchemy'))"))

    @job(queue="subprocess", max_retries=0)
    def with_subprocess(number):
        script = f"touch began/{number}; read go < gate; echo {number}"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout == f"{number}\\n"

    here = threading.local()

    @job(queue="threading", max_retries=0)
    def with_threading(number):
        assert not hasattr(here, "number")
        here.number = number
        meet("threading")
        assert here.number == number

    @job(queue="logging", max_retries=0)
    def with_logging(number):
        logger.warning("%s began", number)
        meet("logging")
        logger.warning("%s ended", number)

    @job(queue="queue", max_retries=0)
    def with_queue(number):
        mine = queue.Queue()

        def feed():
            meet("queue")
            mine.put(number)

        thread = threading.Thread(target=feed)
        thread.start()
        assert mine.get(timeout=60) == number
        thread.join()

    @job(queue="concurrent.futures", max_retries=0)
    def with_concurrent_futures(number):
        def work(half):
            meet("concurrent.futures", 2 * AT_ONCE)
            return half, number

        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            assert list(executor.map(work, "ab")) == [("a", number), ("b", number)]

    def wait_as_c_code_does(number):
        open(f"blocked/{number}", "w").close()
        while not os.path.exists("blocked/gate"):
            gevent.monkey.get_original("time", "sleep")(0.02)

    @job(queue="native", max_retries=0)
    def with_native(number):
        gevent.get_hub().threadpool.apply(wait_as_c_code_does, (number,))
"""

BY_HTTP = ("requests", "urllib3", "boto3")
IN_DATABASE = ("psycopg2", "psycopg2.pool", "sqlalchemy")
IN_PROCESS = ("time", "threading", "queue", "concurrent.futures")
OTHERS = ("smtplib", "subprocess", "logging")


class Meeting:
    """Lets those that arrive go on when fifty of their kind are there."""

    def __init__(self) -> None:
        self.arrived: Counter[str] = Counter()
        self._all_there: dict[str, Event] = {}

    def wait(self, kind: str) -> None:
        all_there = self._all_there.setdefault(kind, Event())
        self.arrived[kind] += 1
        if self.arrived[kind] >= AT_ONCE:
            all_there.set()
        all_there.wait()


def serve_http(meeting: Meeting) -> WSGIServer:
    """A server that answers the requests for a path when there are fifty of them."""

    def application(environ: dict[str, str], start_response: Callable[..., object]) -> list[bytes]:
        meeting.wait(environ["PATH_INFO"].strip("/"))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"all there"]

    return WSGIServer(("127.0.0.1", 0), application, log=None)


def serve_smtp(meeting: Meeting, mails: list[str]) -> StreamServer:
    """A server that takes a mail when there are fifty of them."""

    def talk(connection: object, address: object) -> None:
        stream = connection.makefile("rwb")  # type: ignore[attr-defined]

        def answer(line: str) -> None:
            stream.write(f"{line}\r\n".encode())
            stream.flush()

        answer("220 here")
        while line := stream.readline().decode().strip().upper():
            if line == "DATA":
                answer("354 go on")
                mails.append("".join(iter(lambda: stream.readline().decode(), ".\r\n")))
                meeting.wait("smtplib")
            elif line == "QUIT":
                answer("221 bye")
                break
            answer("250 all right")
        stream.close()

    return StreamServer(("127.0.0.1", 0), talk)


class Site:
    """One runner with a queue of fifty for each library, and the servers that its jobs call."""

    def __init__(self, folder: Path, database: running.Database, mails: list[str]) -> None:
        self.folder = folder
        self.database = database
        self.mails = mails

    def enqueue(self, library: str) -> None:
        """Commit fifty jobs with this library."""
        self.database.rows(
            "INSERT INTO background_jobs (job_type, data, queue)"
            " SELECT %s, jsonb_build_object('number', number), %s FROM generate_series(1, %s) AS number",
            *("with_" + library.replace(".", "_"), library, AT_ONCE),
        )
        self.database.rows("SELECT pg_notify('greenjobs', '*:' || %s)", library)

    def wait_until_done(self, library: str) -> None:
        """Block until all fifty are done, and none has failed."""
        unfinished = "queue = %s AND state <> 'failed'"
        message = f"the jobs with {library} hold each other up"
        eventually(lambda: not self.database.count(unfinished, library), message, seconds=processes.PATIENCE_SECONDS)
        assert self.database.column("SELECT errors->-1 FROM background_jobs WHERE queue = %s", library) == []


@pytest.fixture(scope="module")
def site(server_url: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder, meeting, mails = tmp_path_factory.mktemp("legacy"), Meeting(), list[str]()
    processes.write_application(folder, APPLICATION)
    (folder / "began").mkdir()
    os.mkfifo(folder / "gate")
    (folder / "blocked").mkdir()
    http, smtp = serve_http(meeting), serve_smtp(meeting, mails)
    http.start()
    smtp.start()
    environment = {"LEGACY_HTTP": str(http.server_port), "LEGACY_SMTP": str(smtp.server_port)}
    with databases.fresh(server_url, template=migrated_template) as url:
        database = running.Database(url)
        with processes.runner(folder, url, "--pool", str(AT_ONCE), environment=environment):
            yield Site(folder, database, mails)
        database.connection.close()
    http.stop()
    smtp.stop()


@pytest.mark.parametrize("library", BY_HTTP)
def test_requests_are_under_way_at_once(site: Site, library: str) -> None:
    """The server answers when all are there."""
    site.enqueue(library)
    site.wait_until_done(library)


def test_mails_are_under_way_at_once(site: Site) -> None:
    """The server takes them when all are there."""
    site.enqueue("smtplib")
    site.wait_until_done("smtplib")
    subjects = [re.search(r"Subject: Order (\d+)", mail)[1] for mail in site.mails]  # type: ignore[index]
    assert sorted(map(int, subjects)) == list(range(1, AT_ONCE + 1))


@pytest.mark.parametrize("library", IN_DATABASE)
def test_statements_are_under_way_at_once(site: Site, library: str) -> None:
    """They wait for a lock, which is there for them when all wait."""
    waiting = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    with psycopg2.connect(site.database.url) as holder:
        holder.cursor().execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (library,))
        site.enqueue(library)
        eventually(lambda: site.database.value(waiting) == AT_ONCE, "not all wait", seconds=processes.PATIENCE_SECONDS)
    holder.close()
    site.wait_until_done(library)


@pytest.mark.parametrize("library", IN_PROCESS)
def test_jobs_that_wait_for_each_other_meet(site: Site, library: str) -> None:
    """In time.sleep, with a thread-local value each, at a queue of a thread, for the threads of an executor."""
    site.enqueue(library)
    site.wait_until_done(library)


def test_log_has_every_line_of_jobs_that_overlap(site: Site) -> None:
    site.enqueue("logging")
    site.wait_until_done("logging")
    lines = (site.folder / "legacy.log").read_text().splitlines()
    began, ended = ([f"{number} {what}" for number in range(1, AT_ONCE + 1)] for what in ("began", "ended"))
    assert (sorted(lines[:AT_ONCE]), sorted(lines[AT_ONCE:])) == (sorted(began), sorted(ended))


def test_programs_run_at_once(site: Site) -> None:
    """They end when all have begun."""
    site.enqueue("subprocess")
    began = site.folder / "began"
    eventually(lambda: len(list(began.iterdir())) == AT_ONCE, "not all begin", seconds=processes.PATIENCE_SECONDS)
    with (site.folder / "gate").open("w") as gate:
        gate.write("\n" * AT_ONCE)
        gate.flush()
        site.wait_until_done("subprocess")


def test_native_threads_keep_others_free(site: Site) -> None:
    """What the page advises for code that waits outside of gevent: ten of it at a time, and all other jobs go on."""
    site.enqueue("native")
    blocked = site.folder / "blocked"
    eventually(lambda: len(list(blocked.iterdir())) == 10, "not ten at a time", seconds=processes.PATIENCE_SECONDS)
    site.enqueue("time")
    site.wait_until_done("time")
    (blocked / "gate").touch()
    site.wait_until_done("native")


def test_page_names_what_is_tested_here() -> None:
    text = (pages.DOCS / "legacy.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w.]+)`", text[: text.index("## What does not")]))
    assert {*BY_HTTP, *IN_DATABASE, *IN_PROCESS, *OTHERS} <= named
