"""Lines of the log: plain and JSON, with the keys of the job, and beside whatever an application sets up itself."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import logging.config
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import databases
import gevent
import processes
import pytest
import running
from pythonjsonlogger.json import JsonFormatter as StrangersFormatter

from greenjobs import job, logs
from greenjobs.logs import JOB_KEYS, JobContext, JsonFormatter, PlainFormatter


class Unshowable:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


def record(message: Any = "hello", *args: Any, level: int = logging.INFO, error: Any = None, **extra: Any) -> Any:
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    return logging.getLogger("shop.cart").makeRecord(
        "shop.cart", level, "cart.py", 3, message, args, exc_info, extra=extra or None
    )


def written(*args: Any, **kwargs: Any) -> dict[str, Any]:
    line = JsonFormatter().format(record(*args, **kwargs))
    assert "\n" not in line
    document: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return document


def raised() -> BaseException:
    try:
        raise ValueError("first line\nsecond line")
    except ValueError as error:
        return error


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_line_of_json_has_time_level_logger_and_message() -> None:
    line = written("%s of %s", 1, 2)
    assert list(line) == ["time", "level", "logger", "message"]
    assert (line["level"], line["logger"], line["message"]) == ("INFO", "shop.cart", "1 of 2")


def test_time_is_one_of_rfc_3339_with_its_zone() -> None:
    time = written()["time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", time)
    assert datetime.fromisoformat(time).utcoffset() is not None


def test_traceback_is_in_the_same_line() -> None:
    line = written(level=logging.ERROR, error=raised())
    assert line["exc"].startswith("Traceback (most recent call last):\n")
    assert line["exc"].endswith("ValueError: first line\nsecond line")


def test_extras_of_a_call_are_in_the_line() -> None:
    line = written(order=17, tags=["a", {"b": None}], duration_ms=1.5)
    assert (line["order"], line["tags"], line["duration_ms"]) == (17, ["a", {"b": None}], 1.5)


def test_keys_of_the_job_come_before_other_extras() -> None:
    assert list(written(other=1, queue="q", job_id=3))[4:] == ["job_id", "queue", "other"]


def test_extra_that_is_called_as_a_part_of_the_line_is_kept_beside_it() -> None:
    line = written(time="noon", logger="mine", exc="none", error=raised())
    assert (line["logger"], line["extra_logger"], line["extra_time"]) == ("shop.cart", "mine", "noon")
    assert (line["exc"][:9], line["extra_exc"]) == ("Traceback", "none")


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (datetime(2026, 1, 2), "2026-01-02 00:00:00"),
        ({"at": datetime(2026, 1, 2)}, {"at": "2026-01-02 00:00:00"}),
        (float("nan"), "nan"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (CIRCLE, "[[...]]"),
        (b"bytes", "b'bytes'"),
        (Unshowable(), "<Unshowable that cannot be shown: RuntimeError>"),
        ([Unshowable()], ["<Unshowable that cannot be shown: RuntimeError>"]),
        ("\ud800\0é\x1b[31m", "\ud800\0é\x1b[31m"),
        (True, True),
    ],
)
def test_what_json_cannot_carry_is_a_text(given: Any, shown: Any) -> None:
    assert written(value=given)["value"] == shown


def test_number_that_python_does_not_write_is_not_raised() -> None:
    assert written(value=10**5000, within={"a": 10**5000})["value"]


def test_line_of_json_is_ascii() -> None:
    assert JsonFormatter().format(record("é\ud800", value="ü")).isascii()


def test_arguments_that_do_not_fit_are_shown_and_not_raised() -> None:
    assert written("%d of %d", "one")["message"].startswith("%d of %d (its arguments do not fit: ('one',); ")
    assert "cannot be shown" in written(Unshowable())["message"]


def test_error_that_cannot_be_shown_is_not_raised() -> None:
    class Bad(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert "Bad" in written(error=Bad())["exc"]


@pytest.mark.parametrize(
    "url",
    ["postgresql://ann:s3cret@db/shop", "redis://:s3cret@cache", "amqp://u:a:s3cret@h", "postgresql://u:p@s3cret@h"],
)
@pytest.mark.parametrize("formatter", [JsonFormatter(), PlainFormatter()])
def test_password_of_a_url_is_never_shown(url: str, formatter: logging.Formatter) -> None:
    try:
        raise ValueError(url)
    except ValueError as error:
        line = formatter.format(record("cannot reach %s", url, error=error, url=url, urls={"a": [url]}))
    assert "s3cret" not in line
    assert ":***@" in line


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://db/shop?user=ann&password=s3cret&sslmode=require",
        "postgresql://db/shop?sslpassword=s3cret",
        "host=db password=s3cret dbname=shop",
        "host=db password='s3cret \\' s3cret' dbname=shop",
        'dsn "password=s3cret user=ann"',
        "password = s3cret",
    ],
)
@pytest.mark.parametrize("formatter", [JsonFormatter(), PlainFormatter()])
def test_password_among_parameters_is_never_shown(text: str, formatter: logging.Formatter) -> None:
    line = formatter.format(record("cannot reach %s", text, text=text, texts={"a": [text]}))
    assert "s3cret" not in line and "***" in line


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8080/mail/a@b.example",
        "see https://example.com and write to a@b.example",
        "login(user, password=given)",
        "    password = ask()",
        "the password is wrong, passwords=3",
    ],
)
def test_url_without_a_password_is_shown_as_it_is(text: str) -> None:
    assert written(text)["message"] == text


# --- plain ------------------------------------------------------------------------------------------------------------


def test_plain_line_has_when_with_the_distance_from_utc_how_bad_who_and_what() -> None:
    line = PlainFormatter().format(record("%s of %s", 1, 2, level=logging.WARNING))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d WARNING shop\.cart: 1 of 2", line)


def test_plain_line_of_a_job_shows_its_id() -> None:
    assert PlainFormatter().format(record(job_id=17)).endswith("INFO    shop.cart [job 17]: hello")


def test_plain_line_that_names_its_job_does_not_say_it_twice() -> None:
    assert PlainFormatter().format(record("job %s (send) failed", 17, job_id=17)).endswith("cart: job 17 (send) failed")


def test_traceback_is_below_a_plain_line() -> None:
    assert PlainFormatter().format(record(error=raised())).splitlines()[1] == "Traceback (most recent call last):"


def test_colours_are_around_level_and_id() -> None:
    line = PlainFormatter(colours=True).format(record(level=logging.ERROR, job_id=17))
    assert "\x1b[31mERROR  \x1b[0m shop.cart\x1b[36m [job 17]\x1b[0m: hello" in line
    assert "\x1b" not in PlainFormatter().format(record(level=logging.ERROR, job_id=17))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "colours"),
    [
        (Terminal(), {}, True),
        (io.StringIO(), {}, False),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (Terminal(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_and_whoever_asks(
    stream: Any, environment: dict[str, str], colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert logs.has_colours(stream) is colours


# --- the keys of a job ------------------------------------------------------------------------------------------------


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url, max_retries=0) as database:
        yield database


@contextlib.contextmanager
def listening(name: str, formatter: logging.Formatter | None = None) -> Iterator[list[str]]:
    """The lines that a handler with this formatter writes for a logger, JSON if it has none."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, logger = Handler(), logging.getLogger(name)
    handler.setFormatter(formatter or JsonFormatter())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def test_lines_of_a_job_have_its_keys(database: running.Database) -> None:
    @job(queue="emails")
    def work() -> None:
        logging.getLogger("some.library").info("in it")

    with listening("some.library") as lines:
        id = work.delay().id
        running.work_off(work)
    (line,) = map(json.loads, lines)
    assert {key: line[key] for key in JOB_KEYS} == {
        "job_id": id,
        "job_type": "work",
        "queue": "emails",
        "attempt": 1,
        "runner": logs.runner_name,
    }
    assert re.fullmatch(rf".+:{os.getpid()}", line["runner"])


def test_lines_about_the_end_of_a_job_have_the_same_keys_and_how_long_it_ran(database: running.Database) -> None:
    @job(queue="emails")
    def work() -> None:
        raise ValueError("no")

    @job(queue="emails")
    def done() -> None: ...

    with listening("greenjobs.execution") as lines:
        work.delay()
        done.delay()
        running.work_off(work, done)
    assert len(lines) == 2
    for line in map(json.loads, lines):
        assert {*JOB_KEYS, "duration_ms"} <= line.keys()


def test_jobs_that_run_beside_one_another_each_have_their_own_keys(database: running.Database) -> None:
    @job
    def work(number: int) -> None:
        for _ in range(3):
            gevent.sleep(0.001)
            logging.getLogger("beside").info("%s", number)

    with listening("beside") as lines:
        handles = work.delay_many([(number,) for number in range(20)])
        running.work_off(work, pool=20)
    said = {(json.loads(line)["job_id"], json.loads(line)["message"]) for line in lines}
    assert said == {(handle.id, str(number)) for number, handle in enumerate(handles)}


def test_extra_of_a_call_wins_over_the_key_of_the_job(database: running.Database) -> None:
    @job
    def work() -> None:
        logging.getLogger("wins").info("x", extra={"queue": "of the call"})

    with listening("wins") as lines:
        work.delay()
        running.work_off(work)
    assert json.loads(lines[0])["queue"] == "of the call"


def test_log_of_the_job_has_the_keys_too(database: running.Database) -> None:
    from greenjobs import current_job

    @job
    def work() -> None:
        current_job.log.info("x")

    with listening(__name__) as lines:
        work.delay()
        running.work_off(work)
    assert set(JOB_KEYS) <= json.loads(lines[0]).keys()


def test_line_outside_of_a_job_has_no_keys_of_one() -> None:
    handler = logging.NullHandler()
    handler.addFilter(JobContext())
    line = record()
    assert handler.filter(line)
    assert not hasattr(line, "job_id")


def test_format_of_ones_own_may_name_a_key_that_a_line_does_not_have() -> None:
    with listening("own.format", logging.Formatter("%(job_id)s %(message)s")) as lines:
        logs.add_job_keys()
        logging.getLogger("own.format").info("x")
        logging.getLogger("own.format").info("y", extra={"job_id": 4})
    assert lines == ["- x", "4 y"]


def test_formatter_of_a_stranger_sees_no_placeholder() -> None:
    """A reader of JSON would take "-" for another type of job_id than a number is."""
    with (
        listening("stranger", logging.Formatter("%(job_id)s %(message)s")),
        listening("stranger", StrangersFormatter()) as lines,
    ):
        logs.add_job_keys()
        logging.getLogger("stranger").info("x")
    assert "job_id" not in json.loads(lines[0])


def test_python_json_logger_writes_the_keys(database: running.Database) -> None:
    @job
    def work() -> None:
        logging.getLogger("of.others").info("x")

    with listening("of.others", StrangersFormatter()) as lines:
        id = work.delay().id
        running.work_off(work)
    assert json.loads(lines[0])["job_id"] == id


def test_handlers_get_the_filter_once(database: running.Database) -> None:
    handler = logging.NullHandler()
    logging.getLogger("once").addHandler(handler)
    try:
        logs.add_job_keys()
        logs.add_job_keys()
        assert [type(each) for each in handler.filters] == [JobContext]
    finally:
        logging.getLogger("once").removeHandler(handler)


def test_payload_is_in_no_line(database: running.Database) -> None:
    @job(queue="emails")
    def work(secret: str) -> None:
        raise ValueError("no")

    @job(queue="emails")
    def done(secret: str) -> None: ...

    with listening("greenjobs") as lines:
        work.delay("hush-hush")
        done.delay("hush-hush")
        running.work_off(work, done)
    assert lines
    assert not [line for line in lines if "hush-hush" in line]


# --- the command line -------------------------------------------------------------------------------------------------


JOBS = """
    import logging
    import sys

    from greenjobs import job

    {set_up}

    logging.getLogger("app").warning("while it is loaded")

    @job(queue="emails")
    def work():
        logging.getLogger("library").info("in the job")

    @job(queue="emails", max_retries=0)
    def fail():
        raise ValueError("no")
"""


@pytest.fixture(scope="module")
def waiting_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """A database in which a job that works and one that fails wait, to be copied."""
    with databases.fresh(server_url, template=migrated_template) as url:
        with databases.administration(url) as cursor:
            cursor.execute("INSERT INTO background_jobs (job_type, data, queue) VALUES ('work', '{}', 'emails')")
            cursor.execute("INSERT INTO background_jobs (job_type, data, queue) VALUES ('fail', '{}', 'emails')")
        yield url


@pytest.fixture
def printed(waiting_url: str, server_url: str, tmp_path: Path) -> Any:
    """What a runner prints that runs both, where the application does this about logging."""

    def run(set_up: str, *arguments: str, **environment: str) -> str:
        processes.write_application(tmp_path, JOBS.replace("{set_up}", set_up))
        template = databases._name_in(waiting_url)
        with databases.fresh(server_url, template=template) as url:
            command = ("greenjobs", "run", "--until-empty", *arguments)
            return processes.run(*command, folder=tmp_path, database_url=url, environment=environment)

    return run


def json_lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_every_line_of_a_runner_is_json_when_it_is_told_so(printed: Any) -> None:
    lines = json_lines(printed("import warnings; warnings.warn('of Python')", "--log-format", "json"))
    (warning,) = [line for line in lines if line["logger"] == "py.warnings"]
    assert "UserWarning: of Python" in warning["message"]
    (failure,) = [line for line in lines if "exc" in line]
    assert failure["exc"].endswith("ValueError: no")
    assert (failure["job_type"], failure["queue"], failure["attempt"]) == ("fail", "emails", 1)
    (own,) = [line for line in lines if line["logger"] == "library"]
    assert own["job_type"] == "work"
    assert {line["runner"] for line in lines if line["logger"] == "greenjobs.runner"} == {own["runner"]}


def test_what_nobody_catches_is_json_too(waiting_url: str, server_url: str, tmp_path: Path) -> None:
    code = """
        import os, sys, threading
        import gevent
        from greenjobs import job

        class Broken:
            def __del__(self):
                raise LookupError("in a destructor")

        def fail(secret):
            raise LookupError(f"in {threading.current_thread().name}")

        @job(queue="emails")
        def work():
            thread = threading.Thread(target=fail, args=["hush"], name="a-thread")
            thread.start()
            thread.join()
            gevent.spawn(fail, "hush").join()
            del Broken().__dict__
            gevent.get_hub().loop.run_callback(fail, "hush")
            gevent.sleep(0.01)

        @job(queue="emails", executor="thread", name="fail")
        def work_in_thread():
            gevent.spawn(fail, "hush").join()
    """
    processes.write_application(tmp_path, code)
    with databases.fresh(server_url, template=databases._name_in(waiting_url)) as url:
        command = ("greenjobs", "run", "--until-empty", "--log-format", "json")
        output = processes.run(*command, folder=tmp_path, database_url=url)
    lines = [line for line in json_lines(output) if line["logger"] == "py.uncaught"]
    assert len(lines) == 5
    assert all(
        "Traceback (most recent call last):" in line["exc"] and "LookupError: in" in line["exc"] for line in lines
    )
    assert "a-thread ended with an error" in [line["message"] for line in lines]
    assert "hush" not in output


def test_application_that_cannot_be_loaded_in_a_process_for_jobs_is_said_in_json(
    database_url: str, tmp_path: Path
) -> None:
    code = """
        import sys
        if "greenjobs.job_process" in sys.modules:
            raise LookupError("only there")
        from greenjobs import job

        @job(executor="process")
        def work(): ...
    """
    processes.write_application(tmp_path, code)
    command = ("greenjobs", "run", "--log-format", "json")
    with processes.start(*command, folder=tmp_path, database_url=database_url) as runner:
        runner.wait_for_line("did not come up")
        runner.terminate()
        assert runner.wait() == 0
        lines = json_lines(runner.output)
    assert "only there" in {line["exc"].rpartition("LookupError: ")[2] for line in lines if "exc" in line}


def test_plain_lines_are_without_colours_in_a_file(printed: Any) -> None:
    output = printed("")
    assert re.search(r"INFO    library \[job 1\]: in the job$", output, re.MULTILINE)
    assert "WARNING app: while it is loaded" in output
    assert "\x1b" not in output


def test_dict_config_of_the_application_is_respected(printed: Any) -> None:
    config = {
        "version": 1,
        "formatters": {"own": {"format": "own %(levelname)s %(job_id)s %(message)s"}},
        "handlers": {"own": {"class": "logging.StreamHandler", "formatter": "own"}},
        "root": {"level": "INFO", "handlers": ["own"]},
    }
    output = printed(f"import logging.config; logging.config.dictConfig({config!r})", "--log-format", "json")
    assert [line for line in output.splitlines() if line.startswith("{")] == []
    assert "own INFO 1 in the job" in output
    assert "own INFO - stopped" in output  # although disable_existing_loggers is True by default
    assert output.count("in the job") == 1


def test_format_of_basic_config_is_respected(printed: Any) -> None:
    output = printed("logging.basicConfig(level=logging.INFO, format='own %(message)s')")
    assert "own while it is loaded" in output
    assert "own in the job" in output
    assert "[job 1]" not in output


def test_basic_config_without_a_format_sets_the_level(printed: Any) -> None:
    lines = json_lines(printed("logging.basicConfig(level=logging.ERROR)", "--log-format", "json"))
    assert [line["level"] for line in lines] == ["ERROR"]


def test_handler_that_the_application_gives_the_root_is_respected(printed: Any) -> None:
    output = printed("logging.getLogger().addHandler(logging.StreamHandler(sys.stdout))")
    assert output.count("in the job") == 1
    assert re.search("^in the job$", output, re.MULTILINE)


def test_line_of_a_library_while_loading_is_seen(printed: Any) -> None:
    """Many have a handler that does nothing."""
    set_up = "lib = logging.getLogger('lib'); lib.addHandler(logging.NullHandler()); lib.warning('of a library')"
    assert "WARNING lib: of a library" in printed(set_up)


def test_basic_config_is_logging_s_own_again_afterwards(tmp_path: Path) -> None:
    code = (
        "import logging; from greenjobs import config, logs; own = logging.basicConfig;"
        "logs.set_up(config.load(), loads_application=True); logs.settle(); print(logging.basicConfig is own)"
    )
    assert processes.run("python", "-c", code, folder=tmp_path).strip() == "True"


def test_line_of_the_root_logger_while_loading_does_not_decide_the_format(printed: Any) -> None:
    """`logging.warning(…)` makes a handler where there is none."""
    output = printed("logging.warning('in passing')")
    assert "WARNING root: in passing" in output
    assert re.search(r"^\d{4}.* INFO    greenjobs\.cli: stopped$", output, re.MULTILINE)


def test_level_of_ours_can_be_set_by_the_application(printed: Any) -> None:
    output = printed("logging.getLogger('greenjobs').setLevel('ERROR')")
    assert "greenjobs.cli" not in output
    assert "(fail) failed on attempt 1" in output


def test_logger_of_flask_is_written_once(printed: Any) -> None:
    set_up = "from flask import Flask; app = Flask('shop'); app.logger.warning('of flask')"
    more = "; import logging as l; l.getLogger('library').info = lambda text: app.logger.warning('flask in the job')"
    output = printed(set_up + more, "--log-format", "json", "--app", "app")
    said = [line for line in output.splitlines() if "flask in the job" in line]
    assert [json.loads(line)["logger"] for line in said] == ["shop"]


def test_error_of_a_person_is_json_too(tmp_path: Path) -> None:
    output = processes.run("greenjobs", "run", "--log-format", "json", "--pool", "x", folder=tmp_path, status=2)
    assert output.startswith("greenjobs: pool is 'x'")  # nobody knows what the settings are then
    output = processes.run("greenjobs", "run", "--log-format", "json", folder=tmp_path, status=2)
    (line,) = json_lines(output)
    assert (line["level"], line["logger"]) == ("ERROR", "greenjobs.cli_options")


def test_application_that_cannot_be_loaded_is_said_in_json(tmp_path: Path) -> None:
    processes.write_application(tmp_path, "1 / 0")
    output = processes.run("greenjobs", "run", "--log-format", "json", folder=tmp_path, status=2)
    (line,) = json_lines(output)
    assert line["exc"].endswith("ZeroDivisionError: division by zero")


def test_stacks_that_somebody_asks_for_are_json_too(database: running.Database, tmp_path: Path) -> None:
    code = """
        import time
        from greenjobs import job

        @job
        def work():
            print("working", flush=True)
            time.sleep(600)
    """
    processes.write_application(tmp_path, code)
    processes.run("python", "-c", "import app; app.work.delay()", folder=tmp_path, database_url=database.url)
    command = ("greenjobs", "run", "--log-format", "json")
    with processes.start(*command, folder=tmp_path, database_url=database.url) as runner:
        runner.wait_for_line("^working$")
        runner.send(signal.SIGQUIT)
        said = runner.wait_for_line(r'^\{.*"message": "[^"]* runs 1 jobs.*\}$')[0]
    assert "time.sleep(600)" in json.loads(said)["message"]


def test_supervisor_and_its_processes_write_json(waiting_url: str, server_url: str, tmp_path: Path) -> None:
    processes.write_application(tmp_path, JOBS.replace("{set_up}", ""))
    with databases.fresh(server_url, template=databases._name_in(waiting_url)) as url:
        command = ("greenjobs", "run", "--until-empty", "--max-jobs", "1000", "--log-format=json")
        output = processes.run(*command, folder=tmp_path, database_url=url)
    names = {line["logger"] for line in json_lines(output)}
    assert {"greenjobs.supervisor", "greenjobs.cli", "library"} <= names


def test_terminal_has_colours(tmp_path: Path) -> None:
    code = "import logging; from greenjobs import config, logs; logs.set_up(config.load()); logging.error('y')"
    master, slave = pty.openpty()
    environment = {**processes.make_environment(), "TERM": "xterm"}
    for name in ("NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    try:
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=slave, check=True, timeout=60
        )
        assert b"\x1b[31mERROR" in os.read(master, 10_000)
    finally:
        os.close(master)
        os.close(slave)


def test_supervisor_loads_neither_gevent_nor_psycopg2_to_log() -> None:
    code = "import greenjobs.logs, greenjobs.supervisor, sys; print({'gevent', 'psycopg2'} & set(sys.modules))"
    assert processes.run("python", "-c", code, folder=processes.ROOT).strip() == "set()"
