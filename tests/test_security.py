"""What must never happen: SQL made of what users give, objects made of what the database holds, passwords in a log."""

from __future__ import annotations

import ast
import contextlib
import re
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import running
from click.testing import CliRunner
from psycopg2 import extensions
from waiting import eventually

import greenjobs
from greenjobs import cli, counts, current_job, job, jobs, queues, schedules, testing
from greenjobs.errors import ConfigError, DatabaseUnavailable, JobDefinitionError, OptionError
from greenjobs.pool import connect
from greenjobs.runner import Runner
from greenjobs.surroundings import around_enqueues, surround_enqueue

PACKAGE = Path(greenjobs.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Ways out of a literal, an identifier, a comment, a pattern, and the formats of psycopg2 and of Python.
HOSTILE = [
    "'; DROP TABLE canary; --",
    '"; DROP TABLE canary; --',
    "\\'; DROP TABLE canary; --",
    "$$; DROP TABLE canary; $$",
    "*/; DROP TABLE canary; /*",
    "' OR 'a' = 'a",
    "%s %(job_type)s %% %",
    "{job_type} {0} {",
    ":job_type ::text",
    "E'\\\\x27' \\u0027 \\n",
    "%' OR data LIKE '%",
    "\N{MODIFIER LETTER APOSTROPHE}\N{FULLWIDTH SEMICOLON} DROP TABLE canary \N{RIGHT-TO-LEFT OVERRIDE}",
]
# As above, where no spaces, colons, commas and equals signs are allowed.
HOSTILE_NAMES = ["';DROP/**/TABLE/**/canary;--", '";DROP/**/TABLE/**/canary;--', "%s%(name)s", "{name}", "\\';", "$$"]


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url, max_retries=0) as database:
        database.rows("CREATE TABLE canary (alive bool)")
        database.rows("INSERT INTO canary VALUES (true)")
        yield database
        assert database.column("SELECT alive FROM canary") == [True]


# --- SQL --------------------------------------------------------------------------------------------------------------


def test_arguments_headers_keys_and_options_are_data_whatever_they_say(database: running.Database) -> None:
    seen: list[Any] = []

    @job(
        unique_key="{text}", on_conflict="replace", overlap_key="{text}", overlap=False, keep="1 day", keep_result=True
    )
    def work(text: str, more: dict) -> str:
        with contextlib.suppress(AttributeError):
            current_job.progress(1, 2, text)
            current_job.log.warning("%s", text)
        seen.append((text, more, current_job.headers))
        return text

    @surround_enqueue
    @contextlib.contextmanager
    def with_header(enqueue: Any) -> Iterator[dict[str, str]]:
        yield {text: text for text in HOSTILE}

    try:
        handles = [work.delay(text, {text: [text]}) for text in HOSTILE]
        assert [work.delay(text, {text: [text]}).action for text in HOSTILE] == ["replaced"] * len(HOSTILE)
        handles += work.delay_many([(f"{text} ", {text: [text]}) for text in HOSTILE])
    finally:
        around_enqueues.clear()
    running.work_off(work)
    headers = {text: text for text in HOSTILE}
    assert sorted(seen) == sorted([(text, {text.strip(): [text.strip()]}, headers) for text in _with_spaces()])
    assert [handle.result(timeout=running.PATIENCE_SECONDS) for handle in handles] == _with_spaces()


def _with_spaces() -> list[str]:
    return [*HOSTILE, *(f"{text} " for text in HOSTILE)]


def test_errors_and_reasons_are_data_whatever_they_say(database: running.Database) -> None:
    @job
    def work(text: str) -> None:
        raise type(text.replace("\0", ""), (Exception,), {})(text)

    @job(keep="1 day")
    def leave(text: str) -> None:
        raise greenjobs.Discard(text)

    work.delay_many([(text,) for text in HOSTILE])
    leave.delay_many([(text,) for text in HOSTILE])
    running.work_off(work, leave)
    failed = jobs.find(state="failed", limit=None)
    assert sorted(each.errors[-1]["message"] for each in failed) == sorted(HOSTILE)
    assert sorted(each.errors[-1]["message"] for each in jobs.find(state="discarded", limit=None)) == sorted(HOSTILE)
    for text in HOSTILE:
        assert text in {each.errors[-1]["message"] for each in jobs.find(error=text)}
    # A pattern of a user's is text, too: a percent sign finds percent signs.
    assert len(jobs.find(error="%")) == sum("%" in text for text in HOSTILE)


def test_names_of_queues_are_data_whatever_they_say(database: running.Database) -> None:
    ran = []

    @job
    def work(queue: str) -> None:
        ran.append(queue)

    for name in HOSTILE_NAMES:
        work.options(queue=name).delay(name)
        assert queues.pause(name, force=True) == [name]
        assert queues.resize(name, 3, force=True)
        assert queues.get(name).waiting == 1
        assert queues.resume(name) == [name]
    runner = Runner().register(work).shutdown_when_queue_empty()
    for name in HOSTILE_NAMES:
        runner.configure_queue(name, pool=2)
    assert runner.start().wait_for_shutdown(running.PATIENCE_SECONDS)
    assert sorted(ran) == sorted(HOSTILE_NAMES)
    assert {each.queue for each in counts.totals(since="1 hour", queue=HOSTILE_NAMES)} == set(HOSTILE_NAMES)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_filters_and_names_schedules_and_jobs_is_data_whatever_it_says(
    text: str, database: running.Database
) -> None:
    @job
    def work(text: str) -> None: ...

    handle = work.delay(text)
    assert jobs.find(queue=text) == jobs.find(job_type=text) == jobs.find(error=text) == []
    assert jobs.count(queue=[text, "default"]) == 1
    assert jobs.discard(job_type=[text]).ids == ()
    assert counts.totals(since="1 hour", queue=text, job_type=text) == []
    with contextlib.suppress(greenjobs.GreenjobsError):
        schedules.add(work, name=text, cron="0 0 1 1 *", args=(text,))
        schedules.pause(text)
        schedules.resume(text)
        assert [each.name for each in schedules.find()] == [text]
        schedules.remove(text)
    assert schedules.find() == []
    with pytest.raises(JobDefinitionError):
        job(name=text)(print)
    with pytest.raises(JobDefinitionError):
        job(aliases=[text])(lambda: None)
    with pytest.raises(OptionError):
        work.options(queue=f"{text} ")
    with pytest.raises((OptionError, ConfigError, TypeError)):
        work.options(priority=text)
    assert handle.status() == "available"


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_typed_is_data_whatever_it_says(text: str, database: running.Database) -> None:
    for arguments in (
        ["jobs", "list", "--queue", text, "--type", text, "--error", text],
        ["jobs", "discard", "--yes", "--queue", text],
        ["jobs", "show", text],
        ["jobs", "cancel", text],
        ["queues", "pause", text],
        ["queues", "resize", text, text],
        ["schedules", "pause", text],
        ["schedules", "remove", text],
        ["counts", "--queue", text, "--since", text],
        ["migrate", "--grant", f"read={text}"],
    ):
        result = CliRunner().invoke(cli.main, [*arguments, "--database-url", database.url])
        assert isinstance(result.exception, (SystemExit, type(None))), (arguments, result.exception)
    greenjobs.configure(database_url=database.url)


def test_rows_that_strangers_wrote_are_data_whatever_they_say(database: running.Database) -> None:
    ran = []

    @job
    def work(text: str) -> None:
        ran.append(text)

    for text in HOSTILE:
        insert = "INSERT INTO background_jobs (job_type, data, queue) VALUES (%s, jsonb_build_object('text', %s), %s)"
        database.rows(insert, text, text, text)
        database.rows(insert, "work", text, "default")
    running.work_off(work)
    assert sorted(ran) == sorted(HOSTILE)
    assert {each.job_type for each in jobs.find(limit=None)} == set(HOSTILE)
    for arguments in (["status"], ["jobs", "list"], ["queues"]):
        result = CliRunner().invoke(cli.main, [*arguments, "--database-url", database.url])
        assert result.exit_code == 0, result.output
    greenjobs.configure(database_url=database.url)


@pytest.mark.parametrize(
    "options",
    [
        *("[]", "1", '"text"', "null", "[" * 2000 + "]" * 2000),
        *('{"max_retries": "many"}', '{"max_retries": null}', '{"max_retries": -1}', '{"max_retries": 1e300}'),
        *('{"timeout": "x"}', '{"timeout": -1}', '{"hard_timeout": []}', '{"timeout": true}'),
        *('{"keep": {}}', '{"tick_at": 3}', '{"tick_at": "noon"}', '{"schedule": 1}', '{"headers": [1]}'),
    ],
    ids=lambda options: options[:24],
)
def test_options_that_make_no_sense_leave_things_to_the_job(options: str, database: running.Database) -> None:
    """A row that cannot be settled would be held for as long as its runner lives."""
    ran = []

    @job(max_retries=3, backoff=3600)
    def work(fails: bool) -> None:
        assert (current_job.tick_at, current_job.schedule, current_job.headers) == (None, None, {})
        ran.append(current_job.max_retries)
        if fails:
            raise ValueError("as ever")

    for fails in ("true", "false"):
        insert = "INSERT INTO background_jobs (job_type, data, options) VALUES ('work', %s, %s)"
        database.rows(insert, f'{{"fails": {fails}}}', options)
    running.work_off(work)
    assert ran == [3, 3]
    assert [(each.state, each.error) for each in jobs.find()] == [("scheduled", "ValueError: as ever")]


_SQL = re.compile(r"\b(SELECT|INSERT|UPDATE|DELETE|LISTEN|NOTIFY|GRANT|REVOKE|TRUNCATE|SET LOCAL|SAVEPOINT)\b")


def test_no_statement_is_made_of_values_where_it_is_run() -> None:
    """Texts of SQL are put together where a module is loaded, of constants; not in functions, which know values."""
    found = set()
    for file in MODULES:
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found |= {(str(file.relative_to(PACKAGE)), function.name) for _ in _statements_made_in(function)}
    assert found == {
        ("embedded_guard.py", "_make_database"),  # of a constant
        ("grants.py", "_statements"),  # of a constant, with names that psycopg2.sql quotes
        ("lending.py", "refuse_to_end"),  # a message
        ("migrate.py", "as_sql"),  # to be printed, of our own files
        ("storage/history.py", "listen_for_end"),  # of numbers
        ("storage/history.py", "removal"),  # called where modules are loaded
    }


def _statements_made_in(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        is_made = isinstance(node, ast.JoinedStr) and any(isinstance(part, ast.FormattedValue) for part in node.values)
        is_made = is_made or (isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mod, ast.Add)))
        is_made = is_made or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("format", "join", "replace")
            and isinstance(node.func.value, ast.Constant)
        )
        if is_made and any(
            isinstance(part, ast.Constant) and isinstance(part.value, str) and _SQL.search(part.value)
            for part in ast.walk(node)
        ):
            yield ast.unparse(node)


# --- objects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    forbidden = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "yaml"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not forbidden & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in forbidden
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "__import__")


def test_payload_that_names_classes_makes_no_object(database: running.Database) -> None:
    ran = []

    @job
    def work(value: dict) -> None:
        ran.append(value)

    value = {"py/object": "os.system", "__class__": "subprocess.Popen", "!!python/object/apply": ["os.system", "true"]}
    work.delay(value)
    running.work_off(work)
    assert ran == [value]


def test_payload_is_bounded_in_size_and_depth() -> None:
    @job(name="security_bounded")
    def work(value: list) -> None: ...

    deep: list[Any] = []
    for _ in range(101):
        deep = [deep]
    with testing.recording():
        with pytest.raises(greenjobs.GreenjobsError, match="deep|nested"):
            work.delay(deep)
        with pytest.raises(greenjobs.GreenjobsError, match="bytes"):
            work.delay(["x" * (1024 * 1024)])


def test_row_that_is_too_deep_to_read_fails_for_good_and_others_run(database: running.Database) -> None:
    """PostgreSQL takes it where a stranger inserts it."""
    ran = []

    @job
    def work(value: list) -> None:
        ran.append(value)

    depth = 5000
    insert = "INSERT INTO background_jobs (job_type, data) VALUES ('work', %s)"
    database.rows(insert, '{"value": ' + "[" * depth + "]" * depth + "}")
    work.delay([1])
    running.work_off(work)
    assert ran == [[1]]
    assert [each.state for each in jobs.find()] == ["failed"]


# --- secrets ----------------------------------------------------------------------------------------------------------

SECRET = "hunter2-très-secret"


def with_password(url: str) -> str:
    if "://" in url:
        return f"{url}{'&' if '?' in url else '?'}password={quote(SECRET)}"
    return str(extensions.make_dsn(url, password=SECRET))


APPLICATION = """
import os, time
from greenjobs import job

@job(max_retries=0)
def fail():
    raise ValueError("as ever")

@job
def wait():
    open("waiting", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.05)
"""


def test_password_of_the_database_is_in_nothing_that_is_printed(database_url: str, tmp_path: Path) -> None:
    import processes

    url = with_password(database_url)
    (tmp_path / "app.py").write_text(APPLICATION, encoding="utf-8")
    processes.run("python", "-c", "from app import *; fail.delay(); wait.delay()", folder=tmp_path, database_url=url)
    command = ("greenjobs", "run", "--log-level", "DEBUG", "--processes", "2", "--until-empty")
    with processes.start(*command, folder=tmp_path, database_url=url) as process:
        eventually((tmp_path / "waiting").exists, "the job did not begin", seconds=processes.PATIENCE_SECONDS)
        process.send(signal.SIGQUIT)
        process.wait_for_line(r"app\.py.* in wait")
        (tmp_path / "go").touch()
        assert process.wait() == 0
        printed = process.output
    assert "as ever" in printed
    for arguments in (["status"], ["jobs", "list"], ["status", "--json"]):
        printed += processes.run("greenjobs", *arguments, folder=tmp_path, database_url=url)
    assert SECRET not in printed and quote(SECRET) not in printed


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://web:{quote(SECRET)}@127.0.0.1:1/shop",
        f"host=127.0.0.1 port=1 user=web password='{SECRET}' dbname=shop",
        f"postgresql://web:{quote(SECRET)}@127.0.0.1:1/shop?no_such_option=1",
        f"postgresql://web:{quote(SECRET)}@[::1/shop",
        f"mysql://web:{SECRET}@localhost/shop",
        # Not written as in a URL: libpq takes a part of it for a host or a port, and quotes that.
        f"postgresql://web:p@{SECRET}@127.0.0.1:1/shop",
        f"postgresql://web:{SECRET}/p@127.0.0.1:1/shop",
        f"postgresql://web:1{SECRET}/p@127.0.0.1:1/shop",
        f"postgresql://web:1/{SECRET}@127.0.0.1:1/shop",
        f"postgresql://web:{SECRET}%zz@127.0.0.1:1/shop",
        f"postgresql://web@127.0.0.1:1/shop?password={SECRET}%zz",
    ],
)
def test_password_is_in_no_error(url: str, caplog: pytest.LogCaptureFixture) -> None:
    @job(name="security_secret")
    def work() -> None: ...

    try:
        with pytest.raises((DatabaseUnavailable, ConfigError)) as raised:
            greenjobs.configure(database_url=url, enqueue_timeout=0.5)
            work.delay()
    finally:
        greenjobs.configure()
    # With all that it came from, as a log or somebody's page for errors shows it.
    trace = "".join(traceback.format_exception(raised.value))
    shown = f"{raised.value!s} {raised.value!r} {trace} {caplog.text}"
    assert SECRET not in shown and quote(SECRET) not in shown


@pytest.mark.parametrize("password", ["p@ss", "pa/ss", "12/34", "50%"])
def test_password_that_is_not_written_as_in_a_url_is_said_to_be_so(password: str) -> None:
    @job(name="security_special")
    def work() -> None: ...

    try:
        greenjobs.configure(database_url=f"postgresql://web:{password}@127.0.0.1:1/shop", enqueue_timeout=0.5)
        with pytest.raises(DatabaseUnavailable, match="@ is written %40"):
            work.delay()
    finally:
        greenjobs.configure()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://web:p%40s%2Fs@127.0.0.1:1/shop",
        "postgresql://web@127.0.0.1:1,[::1]:1/a%40b",
        "postgresql://web@/a@b?host=@greenjobs-nobody",
        "host=127.0.0.1 port=1 user=web password='p@s/s' dbname=a@b",
    ],
)
def test_address_with_special_characters_where_they_may_be_is_taken(url: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="cannot connect"):
        connect(url, application_name="test", timeout_seconds=2)
