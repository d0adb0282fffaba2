"""Metrics: what a runner, several of them under a supervisor, and a process that only enqueues tell of themselves."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import databases
import gevent
import processes
import psycopg2
import pytest
import running
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from waiting import eventually

from greenjobs import job, lending, metrics_folder, pool, storage
from greenjobs.address import Address
from greenjobs.contrib import prometheus
from greenjobs.http_client import fetch
from greenjobs.runner import Runner

APPLICATION = """
    import os

    import greenjobs.contrib.prometheus
    from greenjobs import current_job, job
    from prometheus_client import Gauge

    there = Gauge("there", "Set in a process for jobs", multiprocess_mode="livesum")


    @job(queue="emails")
    def send():
        pass


    @job(queue="emails", max_retries=0)
    def break_down():
        raise ValueError("nothing that a label may hold")


    @job(queue="emails", max_retries=1, backoff=3600)
    def break_down_at_first():
        raise ValueError("no")


    @job(queue="reports")
    def send_all():
        send.delay_many([()] * 3)


    @job(queue="scrapes", priority=-1)
    def scrape(name):
        content_type, body = greenjobs.contrib.prometheus.render()
        with open(f"{name}.part", "wb") as file:
            file.write(body)
        os.rename(f"{name}.part", name)


    @job(queue="kills")
    def say_pid():
        os.write(1, f"pid {os.getpid()}\\n".encode())  # in one piece, as others write there, too


    @job(queue="kills", executor="process", max_retries=0)
    def die_there():
        there.set(7)
        os.kill(os.getpid(), 9)
"""

Scrape = dict[str, dict[tuple[tuple[str, str], ...], float]]


def parse(text: str) -> Scrape:
    samples: Scrape = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def value(scrape: Scrape, name: str, **labels: str) -> float | None:
    return scrape.get(name, {}).get(tuple(sorted(labels.items())))


def call(folder: Path, url: str, code: str) -> None:
    processes.run("python", "-c", code, folder=folder, database_url=url)


class Scraped:
    """What a running `greenjobs run` shows, each time that it is asked."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self._count = 0

    def now(self) -> Scrape:
        self._count += 1
        file = self.folder / f"scrape-{self._count}.txt"
        with psycopg2.connect(self.url) as connection, connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO background_jobs (job_type, queue, data) VALUES ('scrape', 'scrapes', %s)",
                (f'{{"name": "{file.name}"}}',),
            )
            cursor.execute("NOTIFY greenjobs, 'scrapes'")
        connection.close()
        eventually(file.exists, "nobody was scraped", seconds=processes.PATIENCE_SECONDS)
        return parse(file.read_text())

    def when(self, name: str, expected: float, **labels: str) -> Scrape:
        """The first scrape in which the sample has this value."""
        seen: list[Any] = []

        def look() -> Scrape | None:
            scrape = self.now()
            seen.append(value(scrape, name, **labels))
            return scrape if seen[-1] == expected else None

        message = f"{name} {labels} is not {expected}: {seen}"
        found = eventually(look, message, seconds=processes.PATIENCE_SECONDS)
        assert found is not None
        return found


def wait_for_rows(url: str, **states: int) -> None:
    """Until nothing waits or runs, and so many rows are in these states."""
    with databases.administration(url) as cursor:

        def count() -> dict[str, int]:
            cursor.execute("SELECT state, count(*) FROM background_jobs GROUP BY state")
            return dict(cursor.fetchall())

        eventually(lambda: count() == states, f"not {states}", seconds=processes.PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("application")
    processes.write_application(folder, APPLICATION)
    return folder


@pytest.fixture(scope="module")
def scrape(server_url: str, migrated_template: str, folder: Path) -> Iterator[Scrape]:
    """What one runner shows after its jobs: of 4 that were sent 3 by a job, and 2 that failed."""
    with databases.fresh(server_url, template=migrated_template) as url:
        call(folder, url, "import app; app.send.delay(); app.send_all.delay(); app.break_down.delay()")
        call(folder, url, "import app; app.break_down_at_first.delay(); app.send.options(delay=3600).delay()")
        with processes.runner(folder, url):
            wait_for_rows(url, failed=1, scheduled=2)
            scraped = Scraped(folder, url)
            scraped.when("greenjobs_attempts_ended_total", 4, job_type="send", queue="emails", outcome="done")
            # The same, and what the database says, which may be late on a busy machine.
            yield scraped.when("greenjobs_database_up", 1)


# --- one runner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job_type", "queue", "outcome", "count"),
    [
        ("send", "emails", "done", 4),
        ("send_all", "reports", "done", 1),
        ("break_down", "emails", "failed", 1),
        ("break_down", "emails", "done", 0),
        ("break_down_at_first", "emails", "retried", 1),
    ],
)
def test_attempts_are_counted_by_outcome(scrape: Scrape, job_type: str, queue: str, outcome: str, count: int) -> None:
    labels = {"job_type": job_type, "queue": queue}
    assert value(scrape, "greenjobs_attempts_ended_total", **labels, outcome=outcome) == count


def test_what_a_job_enqueues_is_counted_in_its_runner(scrape: Scrape) -> None:
    assert value(scrape, "greenjobs_jobs_enqueued_total", job_type="send", queue="emails") == 3


def test_attempt_that_runs_is_started_and_has_not_ended(scrape: Scrape) -> None:
    """The scrape is one itself."""
    labels = {"job_type": "scrape", "queue": "scrapes"}
    ended = value(scrape, "greenjobs_attempts_ended_total", **labels, outcome="done")
    assert ended is not None
    assert value(scrape, "greenjobs_attempts_started_total", **labels) == ended + 1


def test_every_attempt_is_in_both_histograms(scrape: Scrape) -> None:
    for name in ("greenjobs_attempt_run_seconds", "greenjobs_job_wait_seconds"):
        labels = {"job_type": "send", "queue": "emails"}
        assert value(scrape, f"{name}_count", **labels) == 4
        assert value(scrape, f"{name}_bucket", **labels, le="+Inf") == 4
        assert 0 < (value(scrape, f"{name}_sum", **labels) or 0) < 4 * processes.PATIENCE_SECONDS


def test_buckets_of_a_histogram_add_up_to_those_above_them(scrape: Scrape) -> None:
    buckets = scrape["greenjobs_job_wait_seconds_bucket"]
    counts = [count for labels, count in buckets.items() if dict(labels)["job_type"] == "send"]
    assert counts == sorted(counts)
    assert len(counts) == len(prometheus.BUCKETS) + 1


def test_job_type_is_shown_only_in_the_queues_that_it_was_in(scrape: Scrape) -> None:
    queues = {(dict(labels)["job_type"], dict(labels)["queue"]) for labels in scrape["greenjobs_attempts_ended_total"]}
    at_home = {("break_down", "emails"), ("break_down_at_first", "emails"), ("send", "emails"), ("send_all", "reports")}
    assert queues == {*at_home, ("scrape", "scrapes"), ("say_pid", "kills"), ("die_there", "kills")}


def test_buckets_reach_from_five_milliseconds_to_an_hour() -> None:
    assert (prometheus.BUCKETS[0], prometheus.BUCKETS[-1]) == (0.005, 3600.0)


def test_slots_and_those_in_use_are_shown_for_each_queue(scrape: Scrape) -> None:
    assert value(scrape, "greenjobs_slots", queue="emails") == 50
    assert value(scrape, "greenjobs_slots_in_use", queue="emails") == 0
    assert value(scrape, "greenjobs_slots_in_use", queue="scrapes") == 1
    assert value(scrape, "greenjobs_read_ahead", queue="scrapes") == 0


@pytest.mark.parametrize(("name", "limit"), [("runner", 4), ("enqueue", 10), ("job", 10)])
def test_connections_are_shown_by_what_they_are_for(scrape: Scrape, name: str, limit: int) -> None:
    assert value(scrape, "greenjobs_connections_limit", pool=name) == limit
    assert 0 <= (value(scrape, "greenjobs_connections_in_use", pool=name) or 0) <= limit
    assert value(scrape, "greenjobs_connection_waits_total", pool=name) is not None
    assert value(scrape, "greenjobs_connection_wait_seconds_total", pool=name) is not None
    assert value(scrape, "greenjobs_connection_waits_given_up_total", pool=name) == 0


def test_outcomes_that_were_written_are_measured(scrape: Scrape) -> None:
    assert (value(scrape, "greenjobs_acknowledge_seconds_count") or 0) >= 3
    assert (value(scrape, "greenjobs_acknowledge_seconds_sum") or 0) > 0


def test_loop_lag_is_measured(scrape: Scrape) -> None:
    lag = value(scrape, "greenjobs_loop_lag_seconds")
    assert lag is not None
    assert lag >= 0


def test_database_is_up_and_what_is_in_it_is_shown(scrape: Scrape) -> None:
    assert value(scrape, "greenjobs_database_up") == 1
    assert value(scrape, "greenjobs_jobs", queue="emails", state="failed") == 1
    # The one for later, and the retry.
    assert value(scrape, "greenjobs_jobs", queue="emails", state="scheduled") == 2
    assert value(scrape, "greenjobs_oldest_waiting_seconds", queue="emails") == 0


def test_empty_queue_is_shown_with_zeros(scrape: Scrape) -> None:
    for state in ("available", "running", "scheduled", "failed"):
        assert value(scrape, "greenjobs_jobs", queue="kills", state=state) == 0
    assert value(scrape, "greenjobs_oldest_waiting_seconds", queue="kills") == 0


def test_version_of_the_runner_is_shown(scrape: Scrape) -> None:
    ((labels, count),) = scrape["greenjobs_runner_info"].items()
    assert (set(dict(labels)), count) == ({"version", "python_version", "session"}, 1)


def test_no_label_holds_anything_of_a_job(scrape: Scrape) -> None:
    words = {word for samples in scrape.values() for labels in samples for _, word in labels}
    assert not [word for word in words if "nothing that a label may hold" in word]


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def supervised(server_url: str, migrated_template: str, folder: Path) -> Iterator[tuple[Scraped, processes.Process]]:
    """Two processes and their supervisor, with a folder for temporary files of their own."""
    temporary = folder / "temporary"
    temporary.mkdir()
    with databases.fresh(server_url, template=migrated_template) as url:
        call(folder, url, "import app; app.send.options(queue='nobodys', delay=3600).delay()")
        command = ("greenjobs", "run", "--processes", "2")
        environment = {"TMPDIR": str(temporary)}
        with processes.start(*command, folder=folder, database_url=url, environment=environment) as supervisor:
            eventually(
                lambda: supervisor.output.count("is up after") == 2,
                "the processes do not come up",
                seconds=processes.PATIENCE_SECONDS,
            )
            yield Scraped(folder, url), supervisor
            supervisor.terminate()
            assert supervisor.wait() == 0


def test_whoever_is_asked_answers_for_all(supervised: tuple[Scraped, processes.Process]) -> None:
    scraped, _ = supervised
    call(scraped.folder, scraped.url, "import app; app.send.delay_many([()] * 200)")
    labels = {"job_type": "send", "queue": "emails"}
    seen = scraped.when("greenjobs_attempts_ended_total", 200, **labels, outcome="done")
    assert value(seen, "greenjobs_attempt_run_seconds_count", **labels) == 200
    assert value(seen, "greenjobs_slots", queue="emails") == 100


def test_what_is_in_the_database_is_shown_once_for_all_processes(supervised: tuple[Scraped, processes.Process]) -> None:
    scraped, _ = supervised
    scraped.when("greenjobs_jobs", 1, queue="nobodys", state="scheduled")


def test_counters_survive_a_killed_process_and_its_gauges_do_not(
    supervised: tuple[Scraped, processes.Process],
) -> None:
    scraped, supervisor = supervised
    call(scraped.folder, scraped.url, "import app; app.break_down.delay_many([()] * 20)")
    labels = {"job_type": "break_down", "queue": "emails", "outcome": "failed"}
    scraped.when("greenjobs_attempts_ended_total", 20, **labels)
    files = set(metrics_files(scraped, of_jobs=False))
    call(scraped.folder, scraped.url, "import app; app.say_pid.delay()")
    os.kill(int(supervisor.wait_for_line(r"^pid (\d+)$")[1]), signal.SIGKILL)
    # Its successor comes up, and there are two again: its slots were not counted as if it were alive.
    eventually(lambda: supervisor.output.count("is up after") == 3, "no successor", seconds=processes.PATIENCE_SECONDS)
    seen = scraped.when("greenjobs_slots", 100, queue="emails")
    assert value(seen, "greenjobs_attempts_ended_total", **labels) == 20
    ((_, runners),) = seen["greenjobs_runner_info"].items()
    assert runners == 2
    # It goes on with the files of the one before it: they do not become more with every replacement.
    assert set(metrics_files(scraped, of_jobs=False)) == files


def test_process_for_jobs_leaves_no_gauge_behind_and_its_successor_goes_on_with_its_files(
    supervised: tuple[Scraped, processes.Process],
) -> None:
    scraped, _ = supervised
    call(scraped.folder, scraped.url, "import app; app.die_there.delay_many([()] * 4)")
    labels = {"job_type": "die_there", "queue": "kills", "outcome": "failed"}
    scraped.when("greenjobs_attempts_ended_total", 4, **labels)
    scraped.when("there", 0)
    numbers = {name.rpartition("_")[2] for name in metrics_files(scraped)}
    assert all(re.fullmatch(r"[1-3](-\d)?\.db", number) for number in numbers), numbers


def test_what_a_job_enqueues_in_a_process_of_its_own_is_counted(database_url: str, tmp_path: Path) -> None:
    """Also where the application knows nothing of metrics."""
    code = """
        from greenjobs import job

        @job(executor="process")
        def send_all():
            send.delay_many([()] * 3)

        @job
        def send():
            pass
    """
    processes.write_application(tmp_path, code)
    call(tmp_path, database_url, "import app; app.send_all.delay()")
    path = tmp_path / "http"
    command = ("greenjobs", "run", "--max-jobs", "1000", "--http", f"unix:{path}")
    with processes.start(*command, folder=tmp_path, database_url=database_url) as supervisor:
        supervisor.wait_for_line("is up after")
        labels = {"job_type": "send", "queue": "default"}

        def count() -> float | None:
            _, _, body = fetch(Address.parse(f"unix:{path}"), "/metrics", timeout=processes.PATIENCE_SECONDS)
            return value(parse(body.decode()), "greenjobs_jobs_enqueued_total", **labels)

        eventually(lambda: count() == 3, "they are not counted", seconds=processes.PATIENCE_SECONDS)
        supervisor.terminate()
        assert supervisor.wait() == 0


def metrics_files(scraped: Scraped, *, of_jobs: bool = True) -> Iterator[str]:
    """Their names; those of processes for jobs, too, or not."""
    for file in scraped.folder.glob("temporary/greenjobs-metrics-*/*.db"):
        if of_jobs or "-" not in file.name:
            yield file.name


def test_folder_of_metrics_is_private_and_is_removed_at_the_end(
    server_url: str, migrated_template: str, folder: Path, tmp_path: Path
) -> None:
    with databases.fresh(server_url, template=migrated_template) as url:
        command = ("greenjobs", "run", "--max-jobs", "1000")
        environment = {"TMPDIR": str(tmp_path)}
        with processes.start(*command, folder=folder, database_url=url, environment=environment) as supervisor:
            supervisor.wait_for_line("is up after")
            (made,) = tmp_path.glob("greenjobs-metrics-*")
            assert made.stat().st_mode & 0o777 == 0o700
            supervisor.terminate()
            assert supervisor.wait() == 0
        assert list(tmp_path.glob("greenjobs-metrics-*")) == []


# --- the folder -------------------------------------------------------------------------------------------------------


def test_folder_of_somebody_else_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "theirs"
    monkeypatch.setenv(metrics_folder.FOLDER, str(theirs))
    made = metrics_folder.MetricsFolder()
    assert made.environment(1) == {}
    for name in ("gauge_livesum_17.db", "gauge_livesum_1.db", "gauge_all_17.db", "counter_17.db"):
        (theirs / name).touch()
    made.forget(1, 17)
    made.close()
    assert sorted(each.name for each in theirs.iterdir()) == ["counter_17.db", "gauge_all_17.db", "gauge_livesum_1.db"]


def test_folder_that_a_killed_supervisor_left_behind_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(metrics_folder.FOLDER, raising=False)
    monkeypatch.setattr(metrics_folder.tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal; from greenjobs.metrics_folder import MetricsFolder; folder = MetricsFolder();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    processes.run("python", "-c", code, folder=tmp_path, environment={"TMPDIR": str(tmp_path)}, status=-signal.SIGKILL)
    (left,) = tmp_path.glob("greenjobs-metrics-*")
    (tmp_path / "greenjobs-metrics-of-something-else").mkdir()
    first, second = metrics_folder.MetricsFolder(), metrics_folder.MetricsFolder()
    assert not left.exists()
    assert first._path is not None
    assert first._path.exists()
    first.close()
    second.close()
    assert [each.name for each in tmp_path.glob("greenjobs-metrics-*")] == ["greenjobs-metrics-of-something-else"]


def test_without_prometheus_client_there_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metrics_folder.FOLDER, raising=False)
    monkeypatch.setattr(metrics_folder.importlib.util, "find_spec", lambda name: None)
    made = metrics_folder.MetricsFolder()
    assert made.environment(1) == {}
    made.forget(1, 17)
    made.close()


def test_without_a_place_for_temporary_files_there_is_no_folder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.delenv(metrics_folder.FOLDER, raising=False)
    monkeypatch.setattr(metrics_folder.tempfile, "mkdtemp", refuse)
    made = metrics_folder.MetricsFolder()
    assert made.environment(1) == {}
    assert "no folder for metrics (no usable temporary directory)" in caplog.text
    made.close()


@pytest.mark.parametrize(("taken", "number"), [([], 1), ([1, 3], 2), ([2], 1), ([1, 2], 3)])
def test_number_is_the_lowest_that_is_free(taken: list[int], number: int) -> None:
    assert metrics_folder.free_number(taken) == number


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[running.Database]:
    # Whether the database answers, and what it says, is no matter of how busy the machine is.
    monkeypatch.setattr(prometheus, "_PATIENCE_SECONDS", running.PATIENCE_SECONDS)
    monkeypatch.setattr(prometheus, "_FRESH_SECONDS", 3600.0)
    with running.application(database_url, max_retries=0) as database:
        yield database


@contextlib.contextmanager
def watched(runner: Runner) -> Iterator[prometheus.Watch]:
    handle = runner.prepare()
    watch = prometheus.watch(handle)
    try:
        handle.start()
        yield watch
        handle.shutdown()
        assert handle.wait_for_shutdown(running.PATIENCE_SECONDS)
    finally:
        handle.shutdown(urgency=3)
        watch.stop()


def rendered() -> Scrape:
    content_type, body = prometheus.render()
    assert content_type.startswith("text/plain")
    return parse(body.decode())


def test_what_is_enqueued_is_counted_where_that_is_done(database: running.Database) -> None:
    @job(queue="web")
    def counted_here() -> None: ...

    counted_here.delay()
    counted_here.delay_many([(), ()])
    counted_here.options(queue="other").delay()
    name = "greenjobs_jobs_enqueued_total"
    assert REGISTRY.get_sample_value(name, {"job_type": "counted_here", "queue": "web"}) == 3
    assert REGISTRY.get_sample_value(name, {"job_type": "counted_here", "queue": "other"}) == 1


def test_web_application_shows_nothing_of_runners(tmp_path: Path) -> None:
    code = "from greenjobs.contrib import prometheus; print(prometheus.render()[1].decode())"
    printed = processes.run("python", "-c", code, folder=tmp_path)
    assert set(re.findall(r"^# TYPE (greenjobs\w+)", printed, re.MULTILINE)) == {"greenjobs_jobs_enqueued_total"}


def test_to_count_what_is_enqueued_needs_neither_gevent_nor_a_runner(tmp_path: Path) -> None:
    code = "import greenjobs.contrib.prometheus, sys; print({'gevent', 'greenjobs.runner'} & set(sys.modules))"
    assert processes.run("python", "-c", code, folder=tmp_path).strip() == "set()"


def test_rescued_jobs_are_counted(database: running.Database) -> None:
    @job(queue="lost")
    def work() -> None: ...

    id = work.delay().id
    opened = pool.connect(database.url, application_name="dead", timeout_seconds=10)
    with contextlib.closing(opened) as connection:
        dead = storage.register_runner(
            connection, hostname="h", pid=1, version="0", queues={}, job_types=["work"], former=()
        )
        assert [row.id for row in storage.claim(connection, runner=dead, queue="lost", job_types=["work"], limit=1)]
    before = REGISTRY.get_sample_value("greenjobs_rescued_total") or 0
    with watched(Runner().register(work)):
        eventually(lambda: database.state(id) is None, "it was not rescued", seconds=running.PATIENCE_SECONDS)
        # Who rescued it may hear later that it did than another who has run it by now.
        eventually(lambda: value(rendered(), "greenjobs_rescued_total") == before + 1, "not counted")


def test_scrape_is_answered_while_the_database_is_away(database: running.Database) -> None:
    @job(queue="away")
    def work() -> None: ...

    with watched(Runner().register(work)) as watch:
        prometheus._database._fresh_until = 0.0
        assert value(rendered(), "greenjobs_database_up") == 1
        with closed_to_newcomers(database):
            database.terminate_sessions("greenjobs")
            prometheus._database._fresh_until = 0.0
            seen = rendered()
        assert value(seen, "greenjobs_database_up") == 0
        assert "greenjobs_jobs" not in seen
        assert value(seen, "greenjobs_slots", queue="away") == watch.handle.workers["away"].pool


def test_scrape_is_answered_while_the_database_does_not_answer(
    database: running.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    @job(queue="stuck")
    def work() -> None: ...

    with watched(Runner().register(work)):
        prometheus._database._fresh_until = 0.0
        assert value(rendered(), "greenjobs_database_up") == 1
        monkeypatch.setattr(prometheus, "_PATIENCE_SECONDS", 0.05)
        monkeypatch.setattr(prometheus, "_FRESH_SECONDS", 0.0)
        with databases.administration(database.url) as cursor:
            cursor.execute("BEGIN; LOCK TABLE background_jobs")
            prometheus._database._fresh_until = 0.0
            seen = rendered()
            cursor.execute("ROLLBACK")
        monkeypatch.setattr(prometheus, "_PATIENCE_SECONDS", running.PATIENCE_SECONDS)
        assert value(seen, "greenjobs_database_up") == 0
        assert "greenjobs_jobs" not in seen
        assert value(seen, "greenjobs_slots", queue="stuck") is not None
        eventually(lambda: value(rendered(), "greenjobs_database_up") == 1, "it does not answer again")


@contextlib.contextmanager
def closed_to_newcomers(database: running.Database) -> Iterator[None]:
    name = database.value("SELECT current_database()")
    with databases.administration(databases.with_database(database.url, "postgres")) as cursor:
        cursor.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        try:
            yield
        finally:
            cursor.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


def test_database_is_asked_once_for_several_scrapes(database: running.Database) -> None:
    @job(queue="asked")
    def work() -> None: ...

    with watched(Runner().register(work)):
        prometheus._database._fresh_until = 0.0
        assert value(rendered(), "greenjobs_jobs", queue="asked", state="scheduled") == 0
        work.options(delay=3600).delay()
        assert value(rendered(), "greenjobs_jobs", queue="asked", state="scheduled") == 0
        prometheus._database._fresh_until = 0.0
        assert value(rendered(), "greenjobs_jobs", queue="asked", state="scheduled") == 1


def test_oldest_waiting_job_is_shown_with_its_age(database: running.Database) -> None:
    @job(queue="old")
    def work() -> None: ...

    work.options(queue="unserved").delay()
    database.rows(
        "UPDATE background_jobs SET created_at = created_at - interval '1 hour', run_at = run_at - interval '1 hour'"
    )
    with watched(Runner().register(work)):
        prometheus._database._fresh_until = 0.0
        assert (value(rendered(), "greenjobs_oldest_waiting_seconds", queue="unserved") or 0) >= 3600


def test_lag_of_the_loop_is_the_worst_of_late(database: running.Database) -> None:
    @job(queue="lag")
    def block() -> None:
        until = time.perf_counter() + 0.6
        while time.perf_counter() < until:
            pass

    with watched(Runner().register(block)):
        block.delay()
        eventually(
            lambda: (value(rendered(), "greenjobs_loop_lag_seconds") or 0) > 0.3,
            "the lag is not seen",
            seconds=running.PATIENCE_SECONDS,
        )


def test_who_waits_for_a_connection_is_counted(database_url: str) -> None:
    with running.application(database_url, job_connections=1):

        @job(queue="connections")
        def hold() -> None: ...

        name, labels = "greenjobs_connection_waits_total", {"pool": "job"}
        with watched(Runner().register(hold)) as watch:
            before = value(rendered(), name, **labels) or 0
            lent = lending.Lent(lending.job_pool(watch.handle._settings))
            with lent:
                assert value(rendered(), "greenjobs_connections_in_use", pool="job") == 1
                waiter = gevent.spawn(lambda: lending.Lent(lending.job_pool(watch.handle._settings)).__enter__())
                eventually(lambda: watch.handle.pools["job"]._waiting, "nobody waits")
            waiter.get(timeout=running.PATIENCE_SECONDS).close()
            assert value(rendered(), name, **labels) == before + 1


def test_runner_that_is_not_watched_has_no_meters(database: running.Database) -> None:
    @job(queue="plain")
    def work() -> None: ...

    with running.started(Runner().register(work)) as handle:
        assert handle.workers["plain"]._executor.meters is None
        assert handle.on_outcomes_written == []


def test_watch_that_was_stopped_leaves_nothing_behind(database: running.Database) -> None:
    @job(queue="left")
    def work() -> None: ...

    with watched(Runner().register(work)) as watch:
        work.delay()
        eventually(lambda: watch.handle.finished_jobs() == 1, "it does not run", seconds=running.PATIENCE_SECONDS)
        assert value(rendered(), "greenjobs_slots", queue="left")
    assert watch.handle.workers["left"]._executor.meters is None
    assert watch.handle.on_outcomes_written == []
    labels = {"job_type": "work", "queue": "left"}
    assert REGISTRY.get_sample_value("greenjobs_attempts_ended_total", {**labels, "outcome": "done"}) == 1
    assert REGISTRY.get_sample_value("greenjobs_slots", {"queue": "left"}) == 0


def test_runner_without_a_wish_for_metrics_does_not_load_the_library(
    server_url: str, migrated_template: str, tmp_path: Path
) -> None:
    code = """
        import sys
        from greenjobs import job

        @job
        def look():
            print("loaded" if "prometheus_client" in sys.modules else "not loaded", flush=True)
    """
    processes.write_application(tmp_path, code)
    with databases.fresh(server_url, template=migrated_template) as url:
        call(tmp_path, url, "import app; app.look.delay()")
        printed = processes.run("greenjobs", "run", "--until-empty", folder=tmp_path, database_url=url)
    assert "not loaded" in printed
