"""Roles of the database that may do the least: enqueue, replace what waits, run, or read, and nothing else."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import databases
import psycopg2
import pytest
import running
from click.testing import CliRunner, Result
from psycopg2 import errors, extensions, sql

import greenjobs
from greenjobs import cli, counts, current_job, grants, inspection, job, jobs, queues, schedules
from greenjobs.errors import AccessDenied, ConfigError, SchemaError
from greenjobs.migrate import migrate
from greenjobs.runner import Runner

TABLES = tuple(grants.RIGHTS["read"])


@pytest.fixture
def role(server_url: str) -> Iterator[str]:
    """A role without any right, whose name has to be quoted."""
    name = f'greenjobs "test" {uuid.uuid4().hex[:8]}'
    quoted = sql.Identifier(name)
    with databases.administration(server_url) as cursor:
        cursor.execute(sql.SQL("CREATE ROLE {}").format(quoted))
    yield name
    with databases.administration(server_url) as cursor:
        cursor.execute(sql.SQL("DROP ROLE {}").format(quoted))


@pytest.fixture
def as_role(database_url: str, role: str) -> Iterator[Callable[..., str]]:
    """Gives the role these rights, and returns the URL of the database as it uses it."""

    def url(*rights: str) -> str:
        migrate(database_url, grants=[grants.Grant(right, role) for right in rights])
        option = f"-c role={role}".replace(" ", "\\ ").replace("-c\\ ", "-c ")
        if "://" not in database_url:
            return str(extensions.make_dsn(database_url, options=option))
        separator = "&" if "?" in database_url else "?"
        return f"{database_url}{separator}options={quote(option)}"

    yield url
    with databases.administration(database_url) as cursor:
        cursor.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))


@contextlib.contextmanager
def working_as(url: str) -> Iterator[running.Database]:
    """An application that uses this role."""
    with running.application(url, max_retries=0) as database:
        assert "greenjobs" in database.value("SELECT current_user")
        yield database


def refused(database: running.Database, statement: str) -> bool:
    try:
        database.rows(statement)
    except errors.InsufficientPrivilege:
        return True
    return False


def test_enqueue_is_all_that_the_role_of_a_web_server_may_do(as_role: Callable[..., str]) -> None:
    with working_as(as_role("enqueue")) as database:

        @job(queue="mail")
        def send(to: str, number: int = 0) -> None: ...

        @job(unique=True)
        def sync(customer: int) -> None: ...

        @job(unique_key="{customer}", until=3600)
        def welcome(customer: int) -> None: ...

        @job(overlap=False, expires=60, keep="1 day")
        def report() -> None: ...

        handles = [
            send.delay("Ann"),
            send.options(delay=60, priority=3, max_retries=1).delay("Bob"),
            *send.delay_many([("Carol", 1), ("Dan", 2)]),
            sync.delay(1),
            *sync.delay_many([(2,), (3,)]),
            welcome.delay(1),
            report.delay(),
        ]
        with contextlib.closing(psycopg2.connect(database.url)) as connection, connection:
            handles.append(send.options(connection=connection).delay("Eve"))
        assert len({handle.id for handle in handles}) == 10
        assert sync.delay(1).duplicate and welcome.delay(1).duplicate
        for statement in (
            "SELECT data FROM background_jobs",
            "SELECT * FROM background_jobs",
            "SELECT errors, log, progress FROM background_jobs",
            "DELETE FROM background_jobs",
            "UPDATE background_jobs SET data = '{}'",
            "UPDATE background_jobs SET state = 'available', run_at = now()",
            "SELECT * FROM background_history",
            "SELECT * FROM background_runners",
            "INSERT INTO background_schedules (name) VALUES ('nightly')",
            "TRUNCATE background_jobs",
            "DROP TABLE background_jobs",
            "ALTER TABLE background_jobs DROP COLUMN data",
        ):
            assert refused(database, statement), statement


@pytest.mark.parametrize("on_conflict", ["replace", "extend", "merge"])
def test_what_waits_is_changed_with_the_right_to_replace_only(as_role: Callable[..., str], on_conflict: Any) -> None:
    merge = {"merge": lambda first, second: {"customer": 1, "items": first["items"] + second["items"]}}

    def declared() -> Any:
        @job(unique=["customer"], on_conflict=on_conflict, **(merge if on_conflict == "merge" else {}))
        def sync(customer: int, items: list) -> None: ...

        return sync

    with working_as(as_role("enqueue")):
        sync = declared()
        first = sync.delay(1, [1])
        with pytest.raises(AccessDenied, match="replace=ROLE"):
            sync.delay(1, [2])
    with working_as(as_role("enqueue", "replace")):
        again = declared().options(delay=60).delay(1, [3])
        assert again.duplicate and again.id == first.id
        assert again.action != "kept"


def test_runner_needs_no_more_than_the_right_to_run(as_role: Callable[..., str]) -> None:
    with working_as(as_role("run")) as database:
        seen = []

        @job(keep="1 day", keep_result=True, max_retries=1, backoff=0.01, cron="0 0 1 1 *", keep_log=True)
        def work(number: int = 0) -> int:
            current_job.progress(number)
            current_job.log.info("here")
            seen.append(number)
            if len(seen) == 1:
                raise ValueError("once")
            return number

        @job(overlap=False)
        def alone() -> None:
            with current_job.transaction():
                seen.append("alone")

        handle = work.delay(7)
        alone.delay()
        with running.started(Runner().register(work, alone)):
            assert handle.result(timeout=running.PATIENCE_SECONDS) == 7
            running.eventually(lambda: "alone" in seen, "it did not run", seconds=running.PATIENCE_SECONDS)
            greenjobs.queues.pause("default")
            greenjobs.queues.resume("default")
        assert jobs.find(state="done") and inspection.live_runners(database.connection) == []
        for statement in (
            "TRUNCATE background_jobs",
            "DROP TABLE background_jobs",
            "DELETE FROM background_migrations",
        ):
            assert refused(database, statement), statement


def test_reader_sees_everything_and_changes_nothing(as_role: Callable[..., str], database_url: str) -> None:
    with running.application(database_url):

        @job
        def work(number: int) -> None: ...

        work.delay(1)
    url = as_role("read")
    for arguments in (["status"], ["jobs", "list"], ["queues"], ["counts"], ["schedules"]):
        shown = typed(*arguments, url=url)
        assert shown.exit_code == 0, shown.output
    changed = typed("jobs", "discard", "--state", "available", "--yes", url=url)
    assert changed.exit_code == 2
    assert "permission denied" in changed.output
    with working_as(url) as database:

        @job(name="work")
        def more(number: int) -> None: ...

        with pytest.raises(AccessDenied, match="more.* was not enqueued|work was not enqueued"):
            more.delay(2)
        for table in TABLES:
            assert not refused(database, f"SELECT * FROM {table}")
            assert refused(database, f"DELETE FROM {table}")


def test_rights_are_given_anew_as_a_whole(as_role: Callable[..., str]) -> None:
    as_role("run")
    with working_as(as_role("enqueue")) as database:
        assert refused(database, "DELETE FROM background_jobs")
        assert refused(database, "SELECT nextval('background_runners_id_seq')")


def test_role_without_rights_is_told_which_it_lacks(as_role: Callable[..., str], database_url: str) -> None:
    with working_as(as_role("enqueue")) as database:

        @job
        def work() -> None: ...

        with databases.administration(database_url) as cursor:
            cursor.execute(
                sql.SQL("REVOKE ALL ON background_jobs FROM {}").format(
                    sql.Identifier(database.value("SELECT current_user"))
                )
            )
        with pytest.raises(AccessDenied, match=r"permission denied.*enqueue=ROLE"):
            work.delay()


def test_what_is_more_than_to_enqueue_ends_in_an_error_that_says_what_is_missing(as_role: Callable[..., str]) -> None:
    with working_as(as_role("enqueue")):

        @job(keep="1 day")
        def work() -> None: ...

        handle = work.delay()
        for refused_call in (
            handle.status,
            lambda: handle.wait(timeout=1),
            lambda: handle.result(timeout=1),
            handle.cancel,
            jobs.find,
            jobs.count,
            lambda: jobs.get(handle.id),
            lambda: jobs.cancel(handle.id),
            lambda: jobs.retry(handle.id),
            lambda: jobs.discard(state="available"),
            queues.find,
            lambda: queues.pause("default", force=True),
            lambda: counts.totals(since="1 hour"),
            schedules.find,
            lambda: schedules.add(work, name="nightly", cron="0 0 * * *"),
        ):
            with pytest.raises(AccessDenied, match=r"permission denied for .*\n?.*--grant run=ROLE"):
                refused_call()


def test_reader_that_wants_to_wait_is_told_which_right_it_lacks(as_role: Callable[..., str], database_url: str) -> None:
    with running.application(database_url):

        @job
        def work() -> None: ...

        handle = work.delay()
    with working_as(as_role("read")):
        assert handle.status() == "available"
        with pytest.raises(AccessDenied, match="run=ROLE"):
            handle.wait(timeout=running.PATIENCE_SECONDS)


@pytest.mark.parametrize("command", [("jobs", "list"), ("status",)])
def test_command_that_lacks_a_right_says_how_to_get_it(as_role: Callable[..., str], command: tuple[str, ...]) -> None:
    shown = typed(*command, url=as_role("enqueue"))
    assert shown.exit_code == 2
    assert "permission denied" in shown.output and "greenjobs migrate --grant run=ROLE" in shown.output


def test_command_gives_rights_and_says_so(role: str, database_url: str, as_role: Callable[..., str]) -> None:
    shown = typed("migrate", "--grant", f"enqueue={role}", "--grant", f"read={role}", url=database_url)
    assert shown.exit_code == 0, shown.output
    assert f"{role} may enqueue\n{role} may read\n" in shown.output


@pytest.mark.parametrize("text", ["enqueue", "own=web", "enqueue=", "=web", "enqueue= ", "enqueue=a\0b"])
def test_grant_that_is_none_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="RIGHT=ROLE"):
        grants.parse([text])


def test_role_that_is_not_there_is_named_and_nothing_is_given(
    role: str, database_url: str, as_role: Callable[..., str]
) -> None:
    shown = typed("migrate", "--grant", f"read={role}", "--grant", "read=nobody'; DROP ROLE x", url=database_url)
    assert shown.exit_code == 2
    assert "there is no role" in shown.output and "CREATE ROLE" in shown.output
    with databases.administration(database_url) as cursor:
        cursor.execute("SELECT has_table_privilege(%s, 'background_jobs', 'SELECT')", (role,))
        assert cursor.fetchone() == (False,)


def test_runner_may_ask_whether_the_tables_are_up_to_date(as_role: Callable[..., str]) -> None:
    """As `greenjobs run --migrate` does."""
    assert migrate(as_role("run")) == []


def test_only_the_owner_can_give_rights(as_role: Callable[..., str], role: str) -> None:
    url = as_role("run")
    with pytest.raises(SchemaError):
        migrate(url, grants=[grants.Grant("read", role)])


def test_owner_of_the_tables_keeps_its_rights(database_url: str) -> None:
    with databases.administration(database_url) as cursor:
        cursor.execute("SELECT tableowner FROM pg_tables WHERE tablename = 'background_jobs'")
        (owner,) = cursor.fetchone() or (None,)
        with pytest.raises(SchemaError, match=r"owns the tables"):
            migrate(database_url, grants=[grants.Grant("enqueue", owner)])
        cursor.execute(
            "SELECT relacl IS NULL OR has_table_privilege(relowner, oid, 'DELETE') FROM pg_class"
            " WHERE relname = 'background_jobs'"
        )
        assert cursor.fetchone() == (True,)


@pytest.mark.parametrize("flag", ["--check", "--sql"])
def test_grant_goes_with_nothing_that_changes_nothing(flag: str, database_url: str) -> None:
    shown = typed("migrate", flag, "--grant", "read=web", url=database_url)
    assert shown.exit_code == 2
    assert "leave one out" in shown.output


def test_every_table_of_the_migrations_is_somebodys_to_read(database_url: str) -> None:
    with databases.administration(database_url) as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE tablename LIKE 'background%'")
        assert {name for (name,) in cursor.fetchall()} == set(TABLES)


def typed(*arguments: str, url: str) -> Result:
    try:
        return CliRunner().invoke(cli.main, [arguments[0], *arguments[1:], "--database-url", url])
    finally:
        greenjobs.configure()
