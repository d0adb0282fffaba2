"""Declaring jobs and enqueuing them: what is accepted, what is refused and how, and what is in the table then."""

from __future__ import annotations

import inspect
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import databases
import gevent
import processes
import psycopg2
import psycopg2.extras
import pytest
import running
from dataclasses_json import DataClassJsonMixin
from waiting import eventually

import greenjobs
from greenjobs import config, current_job, job, pool
from greenjobs.errors import (
    ConfigError,
    DatabaseUnavailable,
    GreenjobsError,
    JobDefinitionError,
    NoCurrentJob,
    OptionError,
    PayloadError,
    SchemaError,
    UnknownJob,
)
from greenjobs.job import find_job, registered_jobs

IN_AN_HOUR = datetime.now(timezone.utc) + timedelta(hours=1)


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing but rows behind: making one takes longer than most of them do."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    with running.application(shared_url) as database:
        yield database
        database.rows("TRUNCATE background_jobs")


@pytest.fixture
def own_database(database_url: str) -> Iterator[running.Database]:
    """For tests that change more than rows."""
    with running.application(database_url) as database:
        yield database


@pytest.fixture
def no_jobs() -> Iterator[None]:
    """For tests that declare jobs and never enqueue them."""
    module = sys.modules["greenjobs.job"]
    declared = dict(module._registry)  # type: ignore[attr-defined]
    module._registry.clear()  # type: ignore[attr-defined]
    yield
    module._registry.clear()  # type: ignore[attr-defined]
    module._registry.update(declared)  # type: ignore[attr-defined]


# --- declaring --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_jobs")
class TestDeclaring:
    def test_bare_decorator_leaves_an_ordinary_function(self) -> None:
        @job
        def add(a: int, b: int = 2) -> int:
            return a + b

        assert add(1) == 3
        assert add(a=1, b=1) == 2

    def test_decorated_function_keeps_its_name_docstring_and_signature(self) -> None:
        @job(queue="emails")
        def send(to: str) -> None:
            """Send it."""

        assert send.__name__ == "send"
        assert send.__doc__ == "Send it."
        assert list(inspect.signature(send).parameters) == ["to"]

    def test_decorator_with_empty_parentheses_is_the_bare_one(self) -> None:
        @job()
        def work() -> None: ...

        assert registered_jobs() == {"work": work}

    def test_job_is_named_after_its_function(self) -> None:
        @job
        def work() -> None: ...

        assert work.name == "work"

    def test_given_name_wins_over_the_name_of_the_function(self) -> None:
        @job(name="shop.tasks:work/v2")
        def work() -> None: ...

        assert find_job("shop.tasks:work/v2") is work

    def test_attributes_of_the_function_do_not_get_in_the_way(self) -> None:
        """Other decorators leave theirs, under names that are ours, too."""

        def work() -> None: ...

        work.__dict__.update(name="other", priority="high", unique="maybe", mine=5)
        declared = job(work)

        assert (declared.name, declared.priority, declared.unique) == ("work", 0, False)
        assert declared.__dict__["mine"] == 5

    def test_exception_of_a_direct_call_is_the_functions_own(self) -> None:
        @job
        def fail() -> None:
            raise LookupError("no such thing")

        with pytest.raises(LookupError, match="no such thing"):
            fail()

    def test_two_functions_of_one_name_are_refused_and_both_are_named(self) -> None:
        @job(name="work")
        def one() -> None: ...

        with pytest.raises(JobDefinitionError, match=r"(?s)named 'work'.*one.*two"):

            @job(name="work")
            def two() -> None: ...

    def test_refused_second_job_leaves_the_first_in_place(self) -> None:
        @job(name="work")
        def one() -> None: ...

        with pytest.raises(JobDefinitionError):

            @job(name="work")
            def two() -> None: ...

        assert find_job("work") is one

    def test_function_of_a_reloaded_module_takes_the_place_of_its_former_self(self) -> None:
        def declare() -> Any:
            @job
            def work() -> None: ...

            return work

        declare()
        second = declare()

        assert find_job("work") is second

    def test_unknown_job_is_reported_with_the_known_ones(self) -> None:
        @job
        def work() -> None: ...

        with pytest.raises(UnknownJob, match=r"'wrok'.*work"):
            find_job("wrok")

    @pytest.mark.parametrize("name", ["", "two words", "a" * 201, "new\nline", "a,b", 5, b"bytes", "nul\0"])
    def test_wrong_name_is_refused_at_import(self, name: Any) -> None:
        with pytest.raises(JobDefinitionError, match=re.escape(repr(name))):

            @job(name=name)
            def work() -> None: ...

    @pytest.mark.parametrize(
        "settings",
        [
            {"priority": 32_768},
            {"priority": -32_768},
            {"priority": True},
            {"priority": "high"},
            {"priority": 1.5},
            {"priority": None},
            {"queue": ""},
            {"queue": "two words"},
            {"queue": "a:b"},
            {"queue": "a,b"},
            {"queue": "a" * 101},
            {"queue": 5},
            {"queue": ["emails"]},
            {"max_retries": -1},
            {"max_retries": 1.5},
            {"max_retries": True},
            {"max_retries": "many"},
            {"max_retries": 10_001},
            {"unique": "yes"},
            {"unique": 1},
            {"unique": None},
        ],
        ids=repr,
    )
    def test_wrong_setting_is_refused_at_import_and_names_job_setting_and_value(self, settings: dict[str, Any]) -> None:
        ((option, value),) = settings.items()
        with pytest.raises(JobDefinitionError, match=rf"send_email.*{option} is {re.escape(repr(value))}"):

            @job(**settings)
            def send_email() -> None: ...

    def test_settings_given_as_text_are_what_they_say(self) -> None:
        """As they come from an environment variable, say."""

        @job(max_retries="5", queue=" emails ")  # type: ignore[call-overload]
        def work() -> None: ...

        assert (work.max_retries, work.queue) == (5, "emails")

    def test_unknown_setting_is_refused_and_named(self) -> None:
        with pytest.raises(TypeError, match="prioritty"):

            @job(prioritty=5)  # type: ignore[call-overload]
            def work() -> None: ...

    @pytest.mark.parametrize("given", ["emails", 5, ["emails"], b""], ids=repr)
    def test_decorator_applied_to_no_function_is_refused(self, given: Any) -> None:
        with pytest.raises(JobDefinitionError, match=re.escape(repr(given))):
            job(given)

    @pytest.mark.parametrize("given", ["emails", None], ids=repr)
    def test_decorator_with_settings_applied_to_no_function_is_refused(self, given: Any) -> None:
        with pytest.raises(JobDefinitionError, match=re.escape(repr(given))):
            job(queue="emails")(given)

    def test_partial_is_refused(self) -> None:
        with pytest.raises(JobDefinitionError):
            job(partial(print, "x"))

    def test_lambda_is_refused(self) -> None:
        with pytest.raises(JobDefinitionError, match="lambda"):
            job(lambda: None)

    def test_class_is_refused(self) -> None:
        with pytest.raises(JobDefinitionError, match="Work"):

            @job
            class Work: ...

    def test_async_function_is_refused(self) -> None:
        with pytest.raises(JobDefinitionError, match=r"fetch.*async"):

            @job
            async def fetch() -> None: ...

    def test_generator_function_is_refused(self) -> None:
        with pytest.raises(JobDefinitionError, match=r"numbers.*generator"):

            @job
            def numbers() -> Iterator[int]:
                yield 1

    def test_method_is_refused(self) -> None:
        with pytest.raises(JobDefinitionError, match="method"):
            job(_WithMethod.work)

    def test_job_of_a_job_is_refused(self) -> None:
        @job
        def work() -> None: ...

        with pytest.raises(JobDefinitionError):
            job(name="again")(work)

    def test_refused_job_is_not_registered(self) -> None:
        with pytest.raises(JobDefinitionError):

            @job(priority=99_999)
            def work() -> None: ...

        assert registered_jobs() == {}


class _WithMethod:
    def work(self) -> None: ...


# --- types ------------------------------------------------------------------------------------------------------------

_RIGHT_CALLS = """
    from datetime import datetime, timedelta, timezone
    from dataclasses import dataclass
    from greenjobs import JobHandle, job

    @dataclass
    class Email:
        to: str

    @job
    def bare(to: str, *, copies: int = 1) -> int:
        return copies

    @job(queue="emails", name="x", priority=5, max_retries=3, unique=True)
    def full(email: Email) -> None: ...

    number: int = bare("a", copies=2)
    handle: JobHandle = bare.delay("a", copies=2)
    identity: int = full.delay(Email("a")).id
    later: JobHandle = bare.options(priority=1, queue="q", delay=1.5).delay(to="a")
    much_later: JobHandle = bare.options(delay=timedelta(hours=1)).delay("a", copies=1)
    at: JobHandle = bare.options(run_at=datetime.now(timezone.utc)).delay("a")
    many: list[JobHandle] = bare.delay_many([("a",), {"to": "b", "copies": 2}])
    emails: list[JobHandle] = full.options(delay=1).delay_many(Email(to) for to in "ab")

    async def view() -> tuple[JobHandle, list[JobHandle]]:
        return await bare.adelay("a", copies=2), await full.options(delay=1).adelay_many([Email("a")])
"""

_DECLARATION = """
    from greenjobs import job

    @job(queue="emails")
    def send(to: str, *, copies: int = 1) -> None: ...

"""

_WRONG_CALLS = {
    "a_missing_argument": "send.delay()",
    "an_argument_of_another_type": "send.delay(5)",
    "one_argument_too_many": "send.delay('a', 'b')",
    "an_unknown_argument": "send.delay('a', copy=1)",
    "a_keyword_of_another_type": "send.options(priority=1).delay('a', copies='two')",
    "an_unknown_option": "send.options(prioritty=1)",
    "an_option_of_another_type": "send.options(priority='high')",
    "a_run_at_of_another_type": "send.options(run_at='tomorrow')",
    "an_unknown_setting": "job(prioritty=1)",
    "a_wrong_direct_call": "send(5)",
    "an_awaited_argument_of_another_type": "send.adelay(5)",
    "a_keyword_of_another_type_awaited": "send.options(priority=1).adelay('a', copies='two')",
    "a_handle_used_as_a_result": "x: int = send.delay('a')",
}


@pytest.fixture(scope="module")
def type_errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What mypy --strict says of each snippet, by its name; one run for all, because starting it is what takes time."""
    folder = tmp_path_factory.mktemp("types")
    snippets = {"right": _RIGHT_CALLS, **{name: f"{_DECLARATION}    {call}\n" for name, call in _WRONG_CALLS.items()}}
    for name, code in snippets.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(code))
    source = Path(greenjobs.__file__).parent.parent
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "--no-error-summary"]
        + [f"--cache-dir={folder / 'cache'}", *(f"{name}.py" for name in snippets)],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(source)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode in (0, 1) and not checked.stderr, checked.stderr
    errors = dict.fromkeys(snippets, "")
    for line in checked.stdout.splitlines():
        errors[line.partition(".py:")[0]] += line + "\n"
    return errors


def test_right_calls_pass_the_type_checker(type_errors: dict[str, str]) -> None:
    assert type_errors["right"] == ""


@pytest.mark.parametrize("mistake", _WRONG_CALLS)
def test_type_checker_refuses(mistake: str, type_errors: dict[str, str]) -> None:
    assert "error:" in type_errors[mistake]


# --- one call ---------------------------------------------------------------------------------------------------------


def test_delay_returns_the_id_of_the_row(database: running.Database) -> None:
    @job(queue="emails", priority=7)
    def send(to: str, copies: int = 1) -> None: ...

    handle = send.delay("ann", copies=2)

    assert (handle.job_type, handle.duplicate) == ("send", False)
    assert database.rows("SELECT id, job_type, data, queue, priority, state, retries FROM background_jobs") == [
        (handle.id, "send", {"to": "ann", "copies": 2}, "emails", 7, "available", 0)
    ]


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "to"),
        (("a", 1, 2), {}, "too many positional"),
        (("a",), {"copy": 1}, "copy"),
        (("a",), {"to": "b"}, "to"),
    ],
    ids=["missing", "too many", "unknown", "twice"],
)
def test_wrong_call_raises_type_error_where_it_is_made(
    database: running.Database, args: tuple[Any, ...], kwargs: dict[str, Any], said: str
) -> None:
    @job
    def send(to: str, copies: int = 1) -> None: ...

    with pytest.raises(TypeError, match=rf"send\(\).*{said}"):
        send.delay(*args, **kwargs)
    assert database.count() == 0


def test_argument_that_json_cannot_carry_is_refused_and_nothing_is_enqueued(database: running.Database) -> None:
    @job
    def send(to: Any) -> None: ...

    with pytest.raises(PayloadError, match=r"send: to\[1\]") as caught:
        send.delay(["x", b"bytes"])
    assert caught.value.path == "to[1]"
    assert database.count() == 0


def test_delay_does_not_need_the_runner_to_know_the_default_queue(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url, default_queue="other")

    @job
    def work() -> None: ...

    work.delay()

    assert database.column("SELECT queue FROM background_jobs") == ["other"]


def test_current_job_is_false_outside_a_job() -> None:
    assert not current_job


@pytest.mark.parametrize(
    "attribute",
    ["id", "name", "queue", "attempt", "retries", "max_retries", "is_last_attempt", "context", "row"],
)
def test_current_job_has_nothing_to_say_outside_a_job(attribute: str) -> None:
    with pytest.raises(NoCurrentJob, match="only there while a job runs"):
        getattr(current_job, attribute)


# --- options of one call ----------------------------------------------------------------------------------------------


def test_options_win_over_the_job(database: running.Database) -> None:
    @job(queue="emails", priority=7)
    def work() -> None: ...

    work.options(queue="slow", priority=-32_767).delay()

    assert database.rows("SELECT queue, priority FROM background_jobs") == [("slow", -32_767)]


def test_queue_of_one_call_is_the_queue_without_the_spaces_around_it(database: running.Database) -> None:
    @job
    def work() -> None: ...

    work.options(queue=" emails ").delay()

    assert database.column("SELECT queue FROM background_jobs") == ["emails"]


def test_options_of_one_call_leave_the_next_alone(database: running.Database) -> None:
    @job(queue="emails")
    def work() -> None: ...

    work.options(queue="slow", priority=5, delay=60).delay()
    work.delay()

    assert database.rows("SELECT queue, priority, state FROM background_jobs ORDER BY id") == [
        ("slow", 5, "scheduled"),
        ("emails", 0, "available"),
    ]


@pytest.mark.parametrize("delay", [90, 90.0, timedelta(minutes=1.5)], ids=repr)
def test_delay_is_counted_by_the_database(database: running.Database, delay: float | timedelta) -> None:
    @job
    def work() -> None: ...

    work.options(delay=delay).delay()

    assert database.rows("SELECT state, run_at - created_at FROM background_jobs") == [
        ("scheduled", timedelta(seconds=90))
    ]


@pytest.mark.parametrize("delay", [0, 0.0, -0.0, timedelta(0)], ids=repr)
def test_delay_of_nothing_is_due_at_once(database: running.Database, delay: float | timedelta) -> None:
    @job
    def work() -> None: ...

    work.options(delay=delay).delay()

    assert database.column("SELECT state FROM background_jobs") == ["available"]


def test_run_at_is_kept_to_the_microsecond_whatever_its_zone(database: running.Database) -> None:
    @job
    def work() -> None: ...

    at = IN_AN_HOUR.replace(microsecond=123_456).astimezone(timezone(timedelta(hours=5, minutes=45)))
    work.options(run_at=at).delay()

    assert database.rows("SELECT state, run_at FROM background_jobs") == [("scheduled", at)]


def test_run_at_in_the_past_is_due_at_once(database: running.Database) -> None:
    @job
    def work() -> None: ...

    work.options(run_at=datetime(1999, 12, 31, tzinfo=timezone.utc)).delay()

    assert database.column("SELECT state FROM background_jobs") == ["available"]


@pytest.mark.parametrize(
    "options",
    [
        {"delay": -1},
        {"delay": -0.001},
        {"delay": timedelta(seconds=-1)},
        {"delay": float("nan")},
        {"delay": float("inf")},
        {"delay": float("-inf")},
        {"delay": 1e300},
        {"delay": 10**400},
        {"delay": timedelta.max},
        {"delay": "60"},
        {"delay": True},
        {"delay": Decimal(60)},
        {"run_at": datetime(2030, 1, 1)},
        {"run_at": date(2030, 1, 1)},
        {"run_at": "2030-01-01T00:00:00Z"},
        {"run_at": 1_900_000_000},
        {"priority": 32_768},
        {"priority": -32_768},
        {"priority": True},
        {"priority": "1"},
        {"priority": 1.0},
        {"queue": ""},
        {"queue": "two words"},
        {"queue": "emails:20"},
        {"queue": "a" * 101},
        {"queue": 5},
        {"queue": "nul\0"},
        {"delay": 5, "run_at": IN_AN_HOUR},
        {"delay": 0, "run_at": IN_AN_HOUR},
    ],
    ids=lambda options: " ".join(f"{name}={value!r:.30}" for name, value in options.items()),
)
@pytest.mark.usefixtures("no_jobs")
def test_wrong_option_is_refused_and_names_job_and_option(options: dict[str, Any]) -> None:
    @job
    def send_email() -> None: ...

    with pytest.raises(OptionError, match=rf"send_email.*{next(iter(options))}"):
        send_email.options(**options)


@pytest.mark.usefixtures("no_jobs")
def test_naive_run_at_is_refused_with_the_way_to_an_aware_one() -> None:
    with pytest.raises(OptionError, match=re.escape("datetime.now(timezone.utc)")):
        _declare().options(run_at=datetime(2030, 1, 1))


def test_option_error_is_a_value_error() -> None:
    assert issubclass(OptionError, ValueError) and issubclass(OptionError, GreenjobsError)


@pytest.mark.parametrize("connection", [object(), "postgresql://localhost/x", 5, psycopg2], ids=repr)
def test_wrong_connection_is_refused_and_its_type_named(database: running.Database, connection: Any) -> None:
    @job
    def work() -> None: ...

    with pytest.raises(OptionError, match=type(connection).__name__):
        work.options(connection=connection).delay()
    assert database.count() == 0


# --- in the caller's transaction --------------------------------------------------------------------------------------


@pytest.fixture
def transaction(database: running.Database) -> Iterator[psycopg2.extensions.connection]:
    """A connection of the caller's own, in a transaction of its own."""
    connection = psycopg2.connect(database.url)
    yield connection
    connection.close()


def _declare() -> Any:
    @job
    def work(number: int = 0) -> None: ...

    return work


def test_job_in_a_transaction_is_there_when_it_commits(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    work = _declare()

    handle = work.options(connection=transaction).delay()
    before = database.count()
    transaction.commit()

    assert (before, database.state(handle.id)) == (0, "available")


def test_job_in_a_transaction_is_gone_when_it_rolls_back(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    _declare().options(connection=transaction).delay()
    transaction.rollback()

    assert database.count() == 0


def test_cursor_will_do_as_connection(database: running.Database, transaction: psycopg2.extensions.connection) -> None:
    with transaction, transaction.cursor() as cursor:
        _declare().options(connection=cursor).delay()

    assert database.count() == 1


def test_job_in_a_savepoint_is_gone_when_that_rolls_back(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    work = _declare()
    with transaction, transaction.cursor() as cursor:
        work.options(connection=transaction).delay(1)
        cursor.execute("SAVEPOINT here")
        work.options(connection=transaction).delay(2)
        cursor.execute("ROLLBACK TO SAVEPOINT here")
        work.options(connection=transaction).delay(3)

    assert database.column("SELECT data FROM background_jobs ORDER BY id") == [{"number": 1}, {"number": 3}]


def test_explicit_transaction_on_an_autocommit_connection_is_joined(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    transaction.autocommit = True
    with transaction.cursor() as cursor:
        cursor.execute("BEGIN")
        _declare().options(connection=transaction).delay()
        cursor.execute("ROLLBACK")

    assert database.count() == 0


def test_autocommit_connection_of_the_caller_commits_at_once(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    transaction.autocommit = True
    _declare().options(connection=transaction).delay()

    assert database.count() == 1
    assert transaction.autocommit


def test_enqueue_leaves_the_callers_transaction_open(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    _declare().options(connection=transaction).delay_many([(1,), (2,)])

    assert transaction.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_INTRANS
    assert database.count() == 0


def test_enqueue_in_an_aborted_transaction_raises_what_the_database_says(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    with transaction.cursor() as cursor, pytest.raises(psycopg2.errors.UndefinedTable):
        cursor.execute("SELECT * FROM nothing_of_this_name")

    with pytest.raises(psycopg2.errors.InFailedSqlTransaction):
        _declare().options(connection=transaction).delay()


def test_enqueue_on_a_closed_connection_raises_what_psycopg2_says(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    transaction.close()

    with pytest.raises(psycopg2.InterfaceError, match="closed"):
        _declare().options(connection=transaction).delay()


@pytest.mark.parametrize("is_unique", [False, True], ids=["plain", "unique"])
@pytest.mark.parametrize(
    "factory",
    [psycopg2.extras.RealDictCursor, psycopg2.extras.DictCursor, psycopg2.extras.NamedTupleCursor],
    ids=lambda factory: factory.__name__,
)
def test_connection_may_have_a_cursor_of_its_own_kind(
    database: running.Database, factory: type[psycopg2.extensions.cursor], is_unique: bool
) -> None:
    """Flask applications like rows to be dicts."""

    @job(unique=is_unique)
    def work(number: int) -> None: ...

    connection = psycopg2.connect(database.url, cursor_factory=factory)
    try:
        with connection:
            handles = work.options(connection=connection).delay_many([(1,), (1,), (2,)])
        assert {handle.id for handle in handles} == set(database.column("SELECT id FROM background_jobs"))
    finally:
        connection.close()


def _refuse_number(database: running.Database, number: int) -> None:
    database.rows(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.data->>'number' = '{number}' THEN RAISE EXCEPTION 'refused'; END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON background_jobs FOR EACH ROW EXECUTE FUNCTION refuse()
        """
    )


# --- many calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 5000])
def test_delay_many_enqueues_all_and_returns_handles_in_order(database: running.Database, count: int) -> None:
    work = _declare()

    handles = work.delay_many([(number,) for number in range(count)])

    ids = [handle.id for handle in handles]
    assert database.rows("SELECT id, (data->'number')::int FROM background_jobs ORDER BY id") == list(
        zip(ids, range(count), strict=True)
    )


def test_delay_many_takes_a_generator(database: running.Database) -> None:
    assert len(_declare().delay_many((number,) for number in range(3))) == 3


def test_delay_many_takes_tuples_dicts_and_the_dataclass(database: running.Database) -> None:
    @job
    def send(email: Email) -> None: ...

    send.delay_many([(Email("a"),), {"email": Email("b")}, Email("c")])

    assert database.column("SELECT data->>'to' FROM background_jobs ORDER BY id") == ["a", "b", "c"]


def test_delay_many_honours_options(database: running.Database) -> None:
    _declare().options(queue="bulk", priority=3, delay=60).delay_many([(1,), (2,)])

    assert database.rows("SELECT queue, priority, state FROM background_jobs") == [("bulk", 3, "scheduled")] * 2


@pytest.mark.parametrize(
    ("item", "error", "said"),
    [
        ((1, 2), TypeError, "call 2 of work"),
        ({"numbr": 1}, TypeError, "call 2 of work.*numbr"),
        ({1: 2}, TypeError, "call 2 of work"),
        ("text", TypeError, "call 2 of work.*not str"),
        ([1], TypeError, "call 2 of work.*not list"),
        (None, TypeError, "call 2 of work.*not NoneType"),
        (({1, 2},), PayloadError, "call 2 of work.*number"),
        ((float("nan"),), PayloadError, "call 2 of work.*number"),
    ],
    ids=lambda each: repr(each)[:20],
)
def test_bad_item_in_the_middle_is_named_by_its_place_and_nothing_is_enqueued(
    database: running.Database, item: Any, error: type[Exception], said: str
) -> None:
    work = _declare()

    with pytest.raises(error, match=said):
        work.delay_many([(0,), (1,), item, (3,)])

    assert database.count() == 0


def test_error_of_a_generator_of_calls_is_its_own_and_nothing_is_enqueued(database: running.Database) -> None:
    def calls() -> Iterator[tuple[int]]:
        yield (1,)
        raise LookupError("the source went away")

    with pytest.raises(LookupError, match="the source went away"):
        _declare().delay_many(calls())

    assert database.count() == 0


def test_statement_that_fails_after_the_first_thousand_leaves_nothing(own_database: running.Database) -> None:
    work = _declare()
    _refuse_number(own_database, 1500)

    with pytest.raises(psycopg2.errors.RaiseException):
        work.delay_many((number,) for number in range(2000))

    assert own_database.count() == 0


def test_connection_works_on_after_a_bulk_that_failed(own_database: running.Database) -> None:
    work = _declare()
    _refuse_number(own_database, 1500)
    with pytest.raises(psycopg2.errors.RaiseException):
        work.delay_many((number,) for number in range(2000))

    work.delay_many((number,) for number in range(1100))

    assert own_database.count() == 1100


@dataclass
class Email(DataClassJsonMixin):
    to: str


# --- unique jobs ------------------------------------------------------------------------------------------------------


def _declare_unique() -> Any:
    @job(unique=True)
    def train(monster: Any, level: int = 1) -> None: ...

    return train


def test_second_of_a_unique_job_is_the_first_marked_duplicate(database: running.Database) -> None:
    train = _declare_unique()

    first = train.delay("m", level=2)
    second = train.delay(monster="m", level=2)

    assert (first.duplicate, second.duplicate) == (False, True)
    assert second.id == first.id
    assert database.count() == 1


def test_unique_jobs_of_other_arguments_are_others(database: running.Database) -> None:
    train = _declare_unique()

    handles = [train.delay(1), train.delay("1"), train.delay(1.5), train.delay(None), train.delay(True)]

    assert not any(handle.duplicate for handle in handles)


def test_unique_job_is_blind_to_the_order_of_keys(database: running.Database) -> None:
    train = _declare_unique()

    train.delay({"a": 1, "b": {"c": 2, "d": 3}})

    assert train.delay({"b": {"d": 3, "c": 2}, "a": 1}).duplicate


def test_unique_jobs_of_different_types_do_not_meet(database: running.Database) -> None:
    @job(unique=True)
    def other(monster: Any) -> None: ...

    _declare_unique().delay("m")

    assert not other.delay("m").duplicate


def test_unique_job_is_one_whatever_its_queue_and_time(database: running.Database) -> None:
    train = _declare_unique()

    first = train.options(delay=60).delay("m")
    second = train.options(queue="other", priority=9).delay("m")

    assert second.duplicate and second.id == first.id
    assert database.rows("SELECT queue, priority, state FROM background_jobs") == [("default", 0, "scheduled")]


def test_unique_bulk_with_repeats_makes_one_row_each_and_marks_the_later_ones(database: running.Database) -> None:
    train = _declare_unique()

    handles = train.delay_many([("a",), ("b",), ("a",), {"monster": "a"}])

    assert [handle.duplicate for handle in handles] == [False, False, True, True]
    assert handles[0].id == handles[2].id == handles[3].id != handles[1].id
    assert database.count() == 2


def test_unique_bulk_finds_the_unstarted_ones(database: running.Database) -> None:
    train = _declare_unique()
    first = train.delay("b")

    handles = train.delay_many([("a",), ("b",)])

    assert [handle.duplicate for handle in handles] == [False, True]
    assert handles[1].id == first.id


def test_unique_bulk_finds_repeats_beyond_a_thousand(database: running.Database) -> None:
    train = _declare_unique()

    handles = train.delay_many([(number % 1200,) for number in range(2400)])

    assert [handle.duplicate for handle in handles] == [False] * 1200 + [True] * 1200
    assert [handle.id for handle in handles[:1200]] == [handle.id for handle in handles[1200:]]
    assert database.count() == 1200


def test_fifty_greenlets_make_one_row_of_a_unique_job(database: running.Database) -> None:
    train = _declare_unique()

    callers = [gevent.spawn(train.delay, "m") for _ in range(50)]
    gevent.joinall(callers, timeout=running.PATIENCE_SECONDS, raise_error=True)

    assert database.count() == 1
    assert [caller.value.duplicate for caller in callers].count(False) == 1


def test_unique_job_of_an_uncommitted_transaction_is_waited_for(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    train = _declare_unique()
    first = train.options(connection=transaction).delay("m")
    second = gevent.spawn(train.delay, "m")
    _wait_for_blocked_session(database)

    transaction.commit()

    assert second.get(timeout=running.PATIENCE_SECONDS) == type(first)(first.id, "train", duplicate=True)


def test_unique_job_of_a_transaction_that_rolls_back_makes_room(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    train = _declare_unique()
    train.options(connection=transaction).delay("m")
    second = gevent.spawn(train.delay, "m")
    _wait_for_blocked_session(database)

    transaction.rollback()

    assert not second.get(timeout=running.PATIENCE_SECONDS).duplicate
    assert database.count() == 1


def test_unique_job_twice_in_one_transaction_is_one(
    database: running.Database, transaction: psycopg2.extensions.connection
) -> None:
    train = _declare_unique()
    with transaction:
        train.options(connection=transaction).delay("m")
        second = train.options(connection=transaction).delay("m")

    assert second.duplicate
    assert database.count() == 1


def _wait_for_blocked_session(database: running.Database, count: int = 1) -> None:
    eventually(
        lambda: (
            database.value(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            == count
        ),
        "no enqueue waits for a lock",
    )


# --- from everywhere --------------------------------------------------------------------------------------------------

_PREAMBLE = """
    import sys
    from greenjobs import job

    @job
    def work(number: int) -> None: ...

    @job(unique=True)
    def train(monster: str) -> None: ...
"""


def _run_unpatched(tmp_path: Path, database: running.Database, code: str) -> str:
    """Run a script as any server would that has never heard of gevent."""
    program = textwrap.dedent(_PREAMBLE) + textwrap.dedent(code) + "\nassert 'gevent' not in sys.modules\n"
    processes.write_application(tmp_path, program, name="script.py")
    return processes.run("python", "script.py", folder=tmp_path, database_url=database.url)


def test_fifty_threads_enqueue_without_gevent(tmp_path: Path, database: running.Database) -> None:
    _run_unpatched(
        tmp_path,
        database,
        """
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(50) as threads:
            ids = [handle.id for handle in threads.map(work.delay, range(500))]
        assert len(set(ids)) == 500
        """,
    )
    assert database.column("SELECT (data->'number')::int FROM background_jobs ORDER BY 1") == list(range(500))


def test_fifty_threads_make_one_row_of_a_unique_job(tmp_path: Path, database: running.Database) -> None:
    _run_unpatched(
        tmp_path,
        database,
        """
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(50) as threads:
            handles = list(threads.map(train.delay, ["m"] * 50))
        assert [handle.duplicate for handle in handles].count(False) == 1, handles
        assert len({handle.id for handle in handles}) == 1, handles
        """,
    )
    assert database.count() == 1


def test_forked_child_and_its_parent_both_enqueue(tmp_path: Path, database: running.Database) -> None:
    """Web servers load the application, and enqueue perhaps, before they fork their workers."""
    _run_unpatched(
        tmp_path,
        database,
        """
        import os

        work.delay(1)
        child = os.fork()
        if child == 0:
            work.delay(2)
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        work.delay(3)
        """,
    )
    assert database.column("SELECT (data->'number')::int FROM background_jobs ORDER BY id") == [1, 2, 3]


def test_child_forked_before_the_first_enqueue_enqueues(tmp_path: Path, database: running.Database) -> None:
    _run_unpatched(
        tmp_path,
        database,
        """
        import os

        children = []
        for number in range(3):
            child = os.fork()
            if child == 0:
                work.delay(number)
                sys.exit(0)
            children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        """,
    )
    assert database.count() == 3


def test_parents_connection_is_the_same_after_a_child_has_come_and_gone(
    tmp_path: Path, database: running.Database
) -> None:
    _run_unpatched(
        tmp_path,
        database,
        """
        import os
        from greenjobs import config, pool

        def server_process():
            with pool.shared_pool(config.current()).connection() as connection:
                return connection.info.backend_pid

        before = server_process()
        child = os.fork()
        if child == 0:
            assert server_process() != before
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert server_process() == before
        """,
    )


def test_child_forked_while_a_connection_is_lent_enqueues(tmp_path: Path, database: running.Database) -> None:
    _run_unpatched(
        tmp_path,
        database,
        """
        import os
        from greenjobs import config, pool

        with pool.shared_pool(config.current()).connection() as connection:
            child = os.fork()
            if child == 0:
                work.delay(1)
        if child == 0:
            work.delay(2)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        work.delay(3)
        """,
    )
    assert database.column("SELECT (data->'number')::int FROM background_jobs ORDER BY id") == [1, 2, 3]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_multiprocessing_enqueue(tmp_path: Path, database: running.Database, method: str) -> None:
    _run_unpatched(
        tmp_path,
        database,
        f"""
        import multiprocessing

        def enqueue(number):
            return work.delay(number).id

        if __name__ == "__main__":
            work.delay(-1)
            with multiprocessing.get_context("{method}").Pool(2) as pool:
                assert len(set(pool.map(enqueue, range(10)))) == 10
        """,
    )
    assert database.count() == 11


def test_connection_that_died_in_the_pool_is_replaced_silently(database: running.Database) -> None:
    work = _declare()
    work.delay(1)
    assert database.terminate_sessions("greenjobs") == 1
    eventually(lambda: "greenjobs" not in database.sessions(), "the session did not end")

    work.delay(2)

    assert database.column("SELECT (data->'number')::int FROM background_jobs ORDER BY id") == [1, 2]


def test_all_connections_that_died_in_the_pool_are_replaced_silently(database: running.Database) -> None:
    work = _declare()
    gevent.joinall([gevent.spawn(work.delay, number) for number in range(10)], raise_error=True)
    assert database.terminate_sessions("greenjobs") > 1
    eventually(lambda: "greenjobs" not in database.sessions(), "the sessions did not end")

    gevent.joinall([gevent.spawn(work.delay, number) for number in range(10, 20)], raise_error=True)

    assert database.column("SELECT (data->'number')::int FROM background_jobs ORDER BY 1") == list(range(20))


# --- when the database is not there -----------------------------------------------------------------------------------


def _configured(url: str) -> Any:
    greenjobs.configure(database_url=url, enqueue_timeout=0.5, enqueue_connections=1)
    return _declare()


@pytest.fixture
def restored_settings(no_jobs: None) -> Iterator[None]:
    yield
    greenjobs.configure()


@pytest.mark.usefixtures("restored_settings")
def test_database_that_is_down_is_named_without_its_password() -> None:
    work = _configured(f"postgresql://ann:hunter2@127.0.0.1:{processes.free_port()}/shop")

    with pytest.raises(DatabaseUnavailable, match="127.0.0.1") as caught:
        work.delay()
    assert "hunter2" not in str(caught.value) and "hunter2" not in repr(caught.value.__cause__)


@pytest.mark.usefixtures("restored_settings")
def test_server_that_accepts_and_never_answers_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        work = _configured(f"postgresql://ann@127.0.0.1:{mute.getsockname()[1]}/shop")
        with gevent.Timeout(60), pytest.raises(DatabaseUnavailable, match=r"no answer within 0\.5 s"):
            work.delay()


def test_server_that_never_answers_is_given_up_in_time_without_gevent(
    tmp_path: Path, database: running.Database
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        _run_unpatched(
            tmp_path,
            database,
            f"""
            import greenjobs
            from greenjobs.errors import DatabaseUnavailable

            url = "postgresql://ann@127.0.0.1:{mute.getsockname()[1]}/shop"
            greenjobs.configure(database_url=url, enqueue_timeout=0.5)
            try:
                work.delay(1)
            except DatabaseUnavailable as error:
                assert "timeout" in str(error), error
            else:
                raise AssertionError("it answered")
            """,
        )


@pytest.mark.usefixtures("restored_settings")
def test_url_that_libpq_cannot_read_is_refused_without_its_password() -> None:
    work = _configured("postgresql://ann:hunter2@host:notaport/shop")

    with pytest.raises(DatabaseUnavailable) as caught:
        work.delay()
    assert "hunter2" not in str(caught.value)


@pytest.mark.usefixtures("restored_settings")
def test_pool_recovers_from_a_database_that_was_down(database_url: str) -> None:
    work = _configured(f"postgresql://127.0.0.1:{processes.free_port()}/shop")
    for _ in range(3):  # one connection is all there is: each failure must give its place back
        with pytest.raises(DatabaseUnavailable, match="cannot connect"):
            work.delay()


def test_enqueue_with_all_connections_busy_says_so(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url, enqueue_connections=1)
    work = _declare()
    shared = pool.shared_pool(config.current())
    with (
        shared.connection(),
        pytest.raises(DatabaseUnavailable, match="all 1 connections .* stayed busy for 0.2 s"),
    ):
        shared.wait_seconds = 0.2  # from here on, as to open one may take longer
        work.delay()


def test_enqueue_waits_for_a_connection_to_become_free(database: running.Database) -> None:
    greenjobs.configure(database_url=database.url, enqueue_connections=1)
    work = _declare()

    gevent.joinall([gevent.spawn(work.delay, number) for number in range(100)], raise_error=True)

    assert database.count() == 100


def test_unmigrated_database_is_refused_by_delay_with_what_to_type(empty_database_url: str) -> None:
    with running.application(empty_database_url), pytest.raises(SchemaError, match="work was not.*`greenjobs migrate`"):
        _declare().delay()


@pytest.mark.usefixtures("restored_settings")
def test_no_database_configured_says_the_three_ways_to_name_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("GREENJOBS_DATABASE_URL", "DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    greenjobs.configure()

    with pytest.raises(ConfigError, match=r"(?s)database_url.*GREENJOBS_DATABASE_URL.*setup\.cfg"):
        _declare().delay()


def test_text_outside_the_clients_encoding_is_stored(
    monkeypatch: pytest.MonkeyPatch, database: running.Database
) -> None:
    """PGCLIENTENCODING and servers' defaults are for terminals; JSON is UTF-8."""
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")

    @job
    def send(to: str) -> None: ...

    send.delay("日本 – 🦊")

    assert database.column("SELECT data->>'to' FROM background_jobs") == ["日本 – 🦊"]
