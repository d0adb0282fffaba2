"""Sentry: a real SDK in real processes, which send to a real server over HTTP."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import databases
import processes
import pytest
import running
import sentry_receiver
from waiting import eventually

from greenjobs.contrib import sentry_events

JOBS = 100

APPLICATION = """
    import json, os, random, time
    import sentry_sdk
    from flask import Flask
    from greenjobs import Discard, Retry, Snooze, current_job, events, job

    options = json.loads(os.environ["SENTRY_TEST_OPTIONS"])
    if options.pop("report_retries", False):
        from greenjobs.contrib.sentry import GreenjobsIntegration
        options["integrations"] = [GreenjobsIntegration(report_retries=True)]

    def sample(context):
        if context.get("greenjobs_job", {}).get("job_type") == "unsampled":
            raise LookupError("no decision")
        return 1.0

    sentry_sdk.init(os.environ["SENTRY_TEST_DSN"], traces_sampler=sample, transport_queue_size=10000,
                    shutdown_timeout=60, **options)
    sentry_sdk.set_tag("region", "eu")

    app = Flask(__name__)

    @job(max_retries=0)
    def mix(number, secret):
        sentry_sdk.set_tag("number", str(number))
        sentry_sdk.add_breadcrumb(message=f"crumb {number}")
        time.sleep(random.random() / 4)
        sentry_sdk.add_breadcrumb(message=f"crumb {number}")
        raise ValueError(f"number {number}")

    @job(max_retries=1, backoff=0.01)
    def twice():
        raise LookupError(f"attempt {current_job.attempt}")

    @job(max_retries=1, backoff=0.01)
    def recover():
        if current_job.attempt == 1:
            raise LookupError("once")

    @job(max_retries=1)
    def control(how):
        if how == "discard":
            raise Discard("of no use")
        if how == "retry" and current_job.attempt == 1:
            raise Retry(after=0.01)
        if how == "snooze" and current_job.row.data["how"] == "snooze" and not os.path.exists("snoozed"):
            open("snoozed", "w").close()
            raise Snooze(0.01)

    @job(max_retries=0)
    def after_its_end():
        with current_job.transaction():
            pass
        raise OSError("too late")

    @job(executor="process", max_retries=1, backoff=0.01)
    def abroad(secret):
        sentry_sdk.set_tag("number", f"abroad {current_job.attempt}")
        sentry_sdk.add_breadcrumb(message=f"crumb {current_job.attempt}")
        raise LookupError(f"attempt {current_job.attempt}")

    @job(executor="process", max_retries=0)
    def die_abroad():
        os.kill(os.getpid(), 9)

    @job
    def work():
        with sentry_sdk.start_span(op="test", name="inside"):
            pass

    @job(max_retries=0)
    def unsampled():
        raise IndexError("still reported")

    @job(max_retries=0)
    def strict(number):
        pass

    @job(max_retries=0)
    def slow():
        print("slow runs", flush=True)
        time.sleep(0.5)
        raise OverflowError("during the shutdown")

    @job
    def held():
        # Twice as the watchdog sees it, who may have to wait for the processor.
        seen = []
        events.subscribe(seen.append, events.LoopHeld)
        while sum(event.job_type == "held" for event in seen) < 2:
            until = time.perf_counter() + 1.2
            while time.perf_counter() < until:
                pass
            time.sleep(0.01)

    @job
    def poison():
        os.kill(os.getpid(), 9)

    @job(cron=os.environ["SENTRY_TEST_CRON"], timezone="Asia/Kolkata")
    def daily():
        pass

    @job(cron=os.environ["SENTRY_TEST_CRON"], timezone="Asia/Kolkata", max_retries=0)
    def broken_daily():
        raise ArithmeticError("no day")

    @job(cron="* * * * * *")
    def each_second():
        pass

    @app.get("/enqueue")
    def enqueue():
        work.delay()
        return "done"

    def visit():
        assert app.test_client().get("/enqueue").text == "done"
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an application with Sentry is, and what arrives from it."""

    folder: Path
    database: running.Database
    sentry: sentry_receiver.Receiver
    minute: datetime
    """That in which the schedules have their tick."""

    @property
    def cron(self) -> str:
        return f"{self.minute.minute} {self.minute.hour} * * *"

    def environment(self, **options: Any) -> dict[str, str]:
        return {
            "SENTRY_TEST_DSN": self.sentry.dsn,
            "SENTRY_TEST_OPTIONS": json.dumps(options),
            "SENTRY_TEST_CRON": self.cron,
        }

    def python(self, code: str, **options: Any) -> str:
        """Run this in the application, in a process as those that enqueue are."""
        return processes.run(
            *("python", "-c", f"from app import *\n{code}"),
            folder=self.folder,
            database_url=self.database.url,
            environment=self.environment(**options),
        )

    @contextlib.contextmanager
    def runner(self, *arguments: str, **options: Any) -> Iterator[processes.Process]:
        command = ("greenjobs", "run", *arguments)
        environment = self.environment(**options)
        with processes.start(
            *command, folder=self.folder, database_url=self.database.url, environment=environment
        ) as process:
            process.wait_for_line(r"greenjobs\.cli: jobs: ")
            yield process

    def wait_until_settled(self, *, failed: int) -> None:
        """Block until no job waits or runs, but for ticks, and so many have failed."""
        unsettled = "state <> 'failed' AND job_type <> 'each_second'"
        eventually(
            lambda: (self.database.count("state = 'failed'"), self.database.count(unsettled)) == (failed, 0),
            "the jobs have not ended",
            seconds=sentry_receiver.PATIENCE_SECONDS,
        )

    def make_due(self, *schedules: str) -> None:
        """Have the tick of these schedules come now."""
        statement = "UPDATE background_schedules SET next_tick_at = %s WHERE name = ANY(%s)"
        self.database.rows(statement, self.minute, list(schedules))


@contextlib.contextmanager
def place(server_url: str, template: str, folder: Path) -> Iterator[Place]:
    processes.write_application(folder, APPLICATION)
    with databases.fresh(server_url, template=template) as url, sentry_receiver.receiver() as sentry:
        database = running.Database(url)
        try:
            minute = datetime.now(ZoneInfo("Asia/Kolkata")).replace(second=0, microsecond=0)
            yield Place(folder, database, sentry, minute)
        finally:
            database.connection.close()


@pytest.fixture(scope="module")
def usual(server_url: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """All that arrived from a runner with Sentry as it is by itself, which has ended."""
    with place(server_url, migrated_template, tmp_path_factory.mktemp("usual")) as made:
        made.python(
            f"mix.delay_many([(number, f'hush {{number}}') for number in range({JOBS})])\n"
            "twice.delay(); recover.delay(); after_its_end.delay(); unsampled.delay()\n"
            "abroad.delay('hush'); die_abroad.delay()\n"
            "[control.delay(how) for how in ('discard', 'retry', 'snooze')]\n"
            "visit(); visit()"
        )
        for _ in range(2):
            made.database.rows("INSERT INTO background_jobs (job_type, data) VALUES ('work', '{}')")
        made.database.rows("""INSERT INTO background_jobs (job_type, data) VALUES ('strict', '{"other": "hush"}')""")
        # A machine that is too busy for so many jobs at once is not what is reported here.
        with made.runner("--pool", str(JOBS), "--max-blocking", "0") as runner:
            made.make_due("daily", "broken_daily")
            made.sentry.wait_for(4, lambda: made.sentry.of_type("check_in"))
            made.sentry.wait_for(1, lambda: made.sentry.transactions("each_second"))
            made.wait_until_settled(failed=JOBS + 6)
            made.python("slow.delay()")
            runner.wait_for_line("slow runs")
            runner.terminate()
            assert runner.wait() == 0
        yield made


@pytest.fixture(scope="module")
def chosen(server_url: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """All that arrived from two runners under a supervisor, with all that can be asked for, and streamed spans."""
    options = {"send_default_pii": True, "report_retries": True, "trace_lifecycle": "stream"}
    with place(server_url, migrated_template, tmp_path_factory.mktemp("chosen")) as made:
        made.python(
            "mix.delay(1, 'hush'); mix.delay(2, 'x' * 20000); twice.delay(); control.delay('retry')\n"
            "visit(); held.delay()",
            **options,
        )
        with made.runner("--processes", "2", "--max-crashes", "1", **options) as runner:
            made.wait_until_settled(failed=3)
            # What a process has not sent is lost when it is killed.
            made.sentry.wait_for(
                4, lambda: [*made.sentry.errors(job_type="mix"), *made.sentry.errors(job_type="twice")]
            )
            made.sentry.wait_for(1, lambda: told_of_loop(made))
            made.sentry.wait_for(1, lambda: spans(made, "work", "queue.publish"))
            made.sentry.wait_for(1, lambda: spans(made, "work", "queue.process"))
            made.sentry.wait_for(2, lambda: spans(made, "mix", "queue.process"))
            made.python("poison.delay()", **options)
            made.sentry.wait_for(1, lambda: died(made))
            runner.terminate()
            assert runner.wait() == 0
        yield made


def told_of_loop(made: Place) -> list[dict[str, Any]]:
    """Of the job that holds it: on a busy machine others may be thought to."""
    return [each for each in made.sentry.errors(job_type="held") if "held the event loop" in each.get("message", "")]


def spans(made: Place, name: str, op: str) -> list[dict[str, Any]]:
    """The spans of this name that were streamed."""
    streamed = [span for batch in made.sentry.of_type("span") for span in batch["items"]]
    return [each for each in streamed if each["name"] == name and each["attributes"]["sentry.op"]["value"] == op]


def died(made: Place) -> list[dict[str, Any]]:
    # Of the job that did it: with one crash allowed, a tick that ran beside it has had enough of them, too.
    events = [event for event in made.sentry.errors() if event.get("logger") == "greenjobs.maintenance"]
    return [event for event in events if event["extra"]["job_type"] == "poison"]


def value(event: dict[str, Any]) -> str:
    """What the error of an event says."""
    return str(event["exception"]["values"][-1]["value"])


def trace(item: dict[str, Any]) -> dict[str, Any]:
    context: dict[str, Any] = item["contexts"]["trace"]
    return context


# --- errors -----------------------------------------------------------------------------------------------------------


def test_each_failed_job_is_reported_once_and_no_event_has_the_tags_of_another(usual: Place) -> None:
    events = usual.sentry.errors(job_type="mix")
    assert sorted(value(event) for event in events) == sorted(f"number {number}" for number in range(JOBS))
    assert all(f"number {event['tags']['number']}" == value(event) for event in events)
    ids = {event["contexts"]["job"]["id"] for event in events}
    assert len(ids) == JOBS


def test_no_event_has_breadcrumbs_of_another_job(usual: Place) -> None:
    for event in usual.sentry.errors(job_type="mix"):
        crumbs = [crumb["message"] for crumb in event["breadcrumbs"]["values"]]
        assert crumbs == [f"crumb {event['tags']['number']}"] * 2


def test_event_has_tags_and_context_of_its_job_and_what_the_application_said_for_all(usual: Place) -> None:
    (event,) = usual.sentry.errors(job_type="twice")
    expected = {"job_type": "twice", "queue": "default", "attempt": "2", "outcome": "failed", "region": "eu"}
    assert event["tags"] == expected
    assert event["transaction"] == "twice" and event["level"] == "error"
    context = event["contexts"]["job"]
    assert (context["job_type"], context["attempt"], context["max_retries"]) == ("twice", 2, 1)


def test_stack_begins_with_the_function_of_the_job(usual: Place) -> None:
    (event,) = usual.sentry.errors(job_type="twice")
    assert [frame["function"] for frame in event["exception"]["values"][0]["stacktrace"]["frames"]] == ["twice"]


def test_error_is_not_reported_before_the_last_attempt(usual: Place) -> None:
    assert [value(event) for event in usual.sentry.errors(job_type="twice")] == ["attempt 2"]
    assert usual.sentry.errors(job_type="recover") == []


def test_what_a_job_raises_to_say_how_it_ends_is_not_reported(usual: Place) -> None:
    assert usual.sentry.errors(job_type="control") == []


def test_error_after_the_job_has_completed_is_reported(usual: Place) -> None:
    (event,) = usual.sentry.errors(job_type="after_its_end")
    assert (value(event), event["tags"]["outcome"]) == ("too late", "done")


def test_error_in_a_process_of_its_own_is_reported_from_there_with_its_stack(usual: Place) -> None:
    (event,) = usual.sentry.errors(job_type="abroad")
    (thrown,) = event["exception"]["values"]
    assert (thrown["type"], thrown["value"]) == ("LookupError", "attempt 2")
    assert [frame["function"] for frame in thrown["stacktrace"]["frames"]] == ["abroad"]
    expected = {"queue": "default", "attempt": "2", "outcome": "failed", "region": "eu", "number": "abroad 2"}
    assert event["tags"] == {"job_type": "abroad", **expected}
    assert [crumb["message"] for crumb in event["breadcrumbs"]["values"]] == ["crumb 2"]


def test_death_of_a_process_is_reported_by_its_runner(usual: Place) -> None:
    (event,) = usual.sentry.errors(job_type="die_abroad", outcome="failed")
    assert value(event).endswith("was ended by SIGKILL")


def test_nothing_else_is_reported_and_nothing_twice(usual: Place) -> None:
    counts: dict[str, int] = {}
    for event in usual.sentry.errors():
        name = event["tags"].get("job_type", event.get("logger"))
        counts[name] = counts.get(name, 0) + 1
    once = ("twice", "after_its_end", "broken_daily", "unsampled", "slow", "abroad", "die_abroad", "strict")
    assert counts == {"mix": JOBS, **dict.fromkeys(once, 1)}


def test_job_runs_and_is_reported_where_a_function_of_the_application_for_sentry_fails(usual: Place) -> None:
    (event,) = usual.sentry.errors(job_type="unsampled", outcome="failed")
    assert value(event) == "still reported"
    assert usual.sentry.transactions("unsampled") == []


def test_arguments_are_not_sent(usual: Place) -> None:
    assert usual.sentry.items
    assert "hush" not in json.dumps(usual.sentry.items)


def test_neither_arguments_nor_the_password_are_sent_where_an_enqueue_fails(tmp_path: Path) -> None:
    code = """
    import os, sentry_sdk
    from greenjobs import job

    sentry_sdk.init(os.environ["SENTRY_TEST_DSN"], send_default_pii=True)

    @job
    def work(secret): ...

    def enqueue(shown):
        work.delay("hu" + "sh")

    try:
        enqueue("a variable")
    except Exception as error:
        sentry_sdk.capture_exception(error)
    sentry_sdk.flush(60)
    """
    processes.write_application(tmp_path, code)
    with sentry_receiver.receiver() as sentry:
        processes.run(
            *("python", "app.py"),
            folder=tmp_path,
            database_url="postgresql://web:hunter2@127.0.0.1:1/shop",
            environment={"SENTRY_TEST_DSN": sentry.dsn},
        )
        (event,) = sentry.wait_for(1, sentry.errors)
    assert "a variable" in json.dumps(event) and "cannot connect to postgresql://web:***@" in json.dumps(event)
    assert "hunter2" not in json.dumps(event) and "\"'hush'\"" not in json.dumps(event)


def test_what_fails_during_the_shutdown_arrives(usual: Place) -> None:
    assert [value(event) for event in usual.sentry.errors(job_type="slow")] == ["during the shutdown"]
    assert len(usual.sentry.transactions("slow")) == 1


# --- traces -----------------------------------------------------------------------------------------------------------


def test_every_attempt_is_a_transaction(usual: Place) -> None:
    assert len(usual.sentry.transactions("mix")) == JOBS
    assert len(usual.sentry.transactions("twice")) == len(usual.sentry.transactions("recover")) == 2
    statuses = sorted(trace(each)["status"] for each in usual.sentry.transactions("recover"))
    assert statuses == ["internal_error", "ok"]
    assert sorted(trace(each)["status"] for each in usual.sentry.transactions("control")) == [
        "aborted",
        "aborted",
        "internal_error",
        "ok",
        "ok",
    ]


def test_transaction_tells_of_its_job_by_the_conventions_for_queues(usual: Place) -> None:
    first, second = sorted(usual.sentry.transactions("twice"), key=lambda each: str(each["timestamp"]))
    for retries, transaction in enumerate((first, second)):
        data = trace(transaction)["data"]
        assert trace(transaction)["op"] == "queue.process" and transaction["transaction_info"] == {"source": "task"}
        assert (data["messaging.system"], data["messaging.destination.name"]) == ("greenjobs", "default")
        assert data["messaging.message.id"] == str(transaction["contexts"]["job"]["id"])
        assert data["messaging.message.retry.count"] == retries
        assert data["messaging.message.receive.latency"] >= 0


def test_error_is_in_the_trace_of_its_attempt(usual: Place) -> None:
    spans = {trace(each)["span_id"]: trace(each)["trace_id"] for each in usual.sentry.transactions("mix")}
    for event in usual.sentry.errors(job_type="mix"):
        assert spans.pop(trace(event)["span_id"]) == trace(event)["trace_id"]


def test_job_belongs_to_the_trace_of_the_request_that_enqueued_it(usual: Place) -> None:
    requests = usual.sentry.transactions("enqueue")
    assert len({trace(request)["trace_id"] for request in requests}) == len(requests) == 2
    published = {
        span["span_id"]: span for request in requests for span in request["spans"] if span["op"] == "queue.publish"
    }
    jobs = [each for each in usual.sentry.transactions("work") if trace(each)["parent_span_id"] in published]
    assert {trace(job)["trace_id"] for job in jobs} == {trace(request)["trace_id"] for request in requests}
    for span in published.values():
        assert (span["description"], span["data"]["messaging.destination.name"]) == ("work", "default")


def test_job_that_was_enqueued_outside_of_any_trace_has_one_of_its_own(usual: Place) -> None:
    traces = [trace(each)["trace_id"] for each in usual.sentry.transactions("work")]
    assert len(traces) == len(set(traces)) == 4
    ticks = [trace(each)["trace_id"] for each in usual.sentry.transactions("each_second")]
    assert len(ticks) == len(set(ticks))


def test_spans_of_a_job_are_in_its_transaction(usual: Place) -> None:
    for transaction in usual.sentry.transactions("work"):
        assert [span["description"] for span in transaction["spans"]] == ["inside"]


# --- schedules --------------------------------------------------------------------------------------------------------


def check_ins(made: Place, slug: str) -> list[dict[str, Any]]:
    return [each for each in made.sentry.of_type("check_in") if each["monitor_slug"] == slug]


def test_tick_checks_in_and_out_of_a_monitor_that_is_made_after_its_schedule(usual: Place) -> None:
    begin, end = check_ins(usual, "daily")
    assert (begin["status"], end["status"]) == ("in_progress", "ok")
    assert begin["check_in_id"] == end["check_in_id"] and end["duration"] >= 0
    schedule = {"type": "crontab", "value": usual.cron}
    assert begin["monitor_config"] == {"schedule": schedule, "timezone": "Asia/Kolkata"}


def test_tick_that_fails_says_so(usual: Place) -> None:
    assert [each["status"] for each in check_ins(usual, "broken_daily")] == ["in_progress", "error"]


def test_schedule_with_seconds_has_no_monitor(usual: Place) -> None:
    assert usual.sentry.transactions("each_second")
    assert {each["monitor_slug"] for each in usual.sentry.of_type("check_in")} == {"daily", "broken_daily"}


def test_slugs_are_what_sentry_takes_and_as_different_as_the_names() -> None:
    assert sentry_events.slug("Nightly report") == "nightly-report"
    names = ["send */5 * * * *", "send 5 * * * *", "Bücher", "B cher", "x" * 60, "x" * 61, "***", "123", "send_mail"]
    slugs = [sentry_events.slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all(sentry_events._SLUG.fullmatch(slug) for slug in slugs)


# --- what can be asked for --------------------------------------------------------------------------------------------


def test_retried_attempt_is_reported_as_a_warning_when_that_is_asked_for(chosen: Place) -> None:
    seen = [(event["level"], event["tags"]["outcome"]) for event in chosen.sentry.errors(job_type="twice")]
    # From two processes, in either order.
    assert sorted(seen) == [("error", "failed"), ("warning", "retried")]
    assert chosen.sentry.errors(job_type="control") == []


def test_arguments_are_sent_where_the_client_may_send_personal_data(chosen: Place) -> None:
    event, large = sorted(chosen.sentry.errors(job_type="mix"), key=value)
    assert event["contexts"]["job"]["arguments"] == {"number": 1, "secret": "hush"}
    assert isinstance(large["contexts"]["job"]["arguments"], str)
    assert len(large["contexts"]["job"]["arguments"]) <= 10_001


def test_streamed_spans_are_in_one_trace_too(chosen: Place) -> None:
    assert not chosen.sentry.of_type("transaction")
    (published,) = spans(chosen, "work", "queue.publish")
    (job,) = spans(chosen, "work", "queue.process")
    assert (job["trace_id"], job["parent_span_id"]) == (published["trace_id"], published["span_id"])
    assert job["status"] == "ok"
    assert {each["status"] for each in spans(chosen, "mix", "queue.process")} == {"error"}


def test_job_whose_runners_died_is_reported(chosen: Place) -> None:
    (event,) = died(chosen)
    assert event["level"] == "error" and "poison" in event["logentry"]["formatted"]
    assert event["extra"]["job_type"] == "poison"


def test_loop_that_was_held_is_told_once_in_a_while_with_the_job_and_its_stack(chosen: Place) -> None:
    (event,) = told_of_loop(chosen)
    assert event["level"] == "warning"
    assert re.fullmatch(r"job held held the event loop for \d+\.\d s", event["message"])
    assert "while time.perf_counter() < until" in event["extra"]["stack"]
    assert event["contexts"]["job"]["id"] > 0
    assert event["tags"]["job_type"] == "held"


def test_sending_is_no_part_of_the_job_that_has_the_first_event(database_url: str, tmp_path: Path) -> None:
    code = """
    import os, sentry_sdk
    from greenjobs import job

    sentry_sdk.init(os.environ["SENTRY_TEST_DSN"], traces_sample_rate=1.0, shutdown_timeout=60)

    @job(executor="thread")
    def work():
        sentry_sdk.capture_message("here")
        sentry_sdk.flush(60)
    """
    processes.write_application(tmp_path, code)
    processes.run(
        "python",
        "-c",
        "import app; app.work.delay()",
        folder=tmp_path,
        database_url=database_url,
        environment={"SENTRY_TEST_DSN": "http://key@127.0.0.1:9/1"},
    )
    with sentry_receiver.receiver() as sentry:
        environment = {"SENTRY_TEST_DSN": sentry.dsn}
        command = ("greenjobs", "run", "--until-empty")
        processes.run(*command, folder=tmp_path, database_url=database_url, environment=environment)
        (transaction,) = sentry.wait_for(1, lambda: sentry.transactions("work"))
        assert [event["message"] for event in sentry.errors()] == ["here"]
    assert transaction["spans"] == []


@pytest.mark.parametrize(
    "options", ["auto_enabling_integrations=False", "disabled_integrations=[GreenjobsIntegration]", "dsn=None"]
)
def test_nothing_is_stored_where_it_is_not_wanted(
    options: str, database_url: str, tmp_path: Path, check_options: Callable[[str], list[Any]]
) -> None:
    code = f"""
    import sentry_sdk
    from greenjobs.contrib.sentry import GreenjobsIntegration
    from greenjobs import job
    sentry_sdk.init(**{{"dsn": "http://key@127.0.0.1:9/1", **dict({options})}})

    @job
    def work(): ...

    work.delay()
    """
    processes.write_application(tmp_path, code)
    processes.run("python", "app.py", folder=tmp_path, database_url=database_url)
    assert check_options(database_url) == [None]


def test_application_that_sets_sentry_up_after_its_first_job_is_noticed(
    database_url: str, tmp_path: Path, check_options: Callable[[str], list[Any]]
) -> None:
    code = """
    import sentry_sdk
    from greenjobs import job

    @job
    def work(): ...

    work.delay()
    sentry_sdk.init("http://key@127.0.0.1:9/1", traces_sample_rate=1.0, shutdown_timeout=0)
    work.delay()
    """
    processes.write_application(tmp_path, code)
    processes.run("python", "app.py", folder=tmp_path, database_url=database_url)
    first, second = check_options(database_url)
    assert first is None and set(second["headers"]) == {"sentry-trace", "baggage"}


@pytest.fixture
def check_options() -> Callable[[str], list[Any]]:
    def look(url: str) -> list[Any]:
        database = running.Database(url)
        try:
            return database.column("SELECT options FROM background_jobs ORDER BY id")
        finally:
            database.connection.close()

    return look
