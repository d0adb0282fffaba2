"""A Django project with the app: its settings, its transactions, and what is around its jobs.

The commands, and Django's own test runner, are in tests/test_django_commands.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import databases
import django_projects
import gevent
import psycopg2
import pytest
import running
from django.conf import settings
from django.db import connection, connections, transaction
from django.test.utils import override_settings
from django.urls import get_script_prefix, get_urlconf, set_script_prefix, set_urlconf
from django.utils import timezone, translation
from django.utils.functional import SimpleLazyObject
from django.utils.translation import gettext_lazy
from django_projects import Order, point
from gevent.event import Event
from psycopg2 import extensions
from waiting import eventually

import greenjobs
from greenjobs import config, current_job, job, testing
from greenjobs.contrib import addresses
from greenjobs.contrib.django import checks, django_database, equipment, options
from greenjobs.errors import ConfigError, JobFailed, JobHeld, OptionError, PayloadError
from greenjobs.runner import Runner


@pytest.fixture
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[running.Database]:
    for variable in ("DATABASE_URL", "GREENJOBS_DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    with django_projects.project(database_url) as database:
        yield database


@pytest.fixture
def work(database: running.Database) -> Any:
    @job
    def work(number: int = 0) -> None: ...

    return work


def installed() -> equipment.Equipment:
    found = equipment.installed()
    assert found is not None
    return found


# --- settings ---------------------------------------------------------------------------------------------------------


def test_database_is_that_of_django(database: running.Database) -> None:
    url = config.current().require_database_url()
    with psycopg2.connect(url) as opened, opened.cursor() as cursor:
        cursor.execute("SELECT current_database()")
        assert cursor.fetchone() == (connection.settings_dict["NAME"],)
    opened.close()


def test_database_that_django_is_pointed_to_in_its_tests_is_followed(
    database: running.Database, work: Any, server_url: str, migrated_template: str
) -> None:
    with databases.fresh(server_url, template=migrated_template) as other_url, running.application(other_url) as other:
        greenjobs.configure()
        work.delay()
        point("default", other_url)
        job(name="work")(work.function).delay()
        assert (database.count(), other.count()) == (1, 1)
        point("default", database.url)


def test_database_that_greenjobs_is_told_of_is_followed_too(
    database: running.Database, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the tests of a project would enqueue in production."""
    monkeypatch.setenv("GREENJOBS_DATABASE_URL", database.url)
    project = equipment.Equipment()
    assert project.settings.database_url == database.url
    point("default", empty_database_url)
    assert project.alias_of(project.settings.require_database_url()) == "default"
    assert addresses.of_url(project.settings.require_database_url()) == addresses.of_url(empty_database_url)
    point("default", database.url)
    assert project.settings.database_url == database.url


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ({"NAME": "shop"}, "dbname=shop"),
        ({"NAME": "shop", "USER": "ann", "PASSWORD": "it's"}, r"dbname=shop user=ann password=it\'s"),
        ({"NAME": "shop", "HOST": "db", "PORT": 5433}, "dbname=shop host=db port=5433"),
        ({"NAME": "", "OPTIONS": {"service": "shop"}}, "service=shop"),
        ({"NAME": "shop", "OPTIONS": {"sslmode": "require", "isolation_level": 3}}, "dbname=shop sslmode=require"),
        ({"NAME": "shop", "OPTIONS": {"pool": True, "server_side_binding": True}}, "dbname=shop"),
        ({"NAME": "shop", "OPTIONS": {"options": "-c search_path=a"}}, "dbname=shop options='-c search_path=a'"),
        ({"NAME": "shop", "OPTIONS": {"assume_role": "the boss"}}, r"dbname=shop options='-c role=the\\ boss'"),
    ],
    ids=str,
)
def test_entry_of_databases_as_libpq_takes_it(database: running.Database, entry: dict[str, Any], url: str) -> None:
    bare = {"NAME": "", "USER": "", "PASSWORD": "", "HOST": "", "PORT": "", "OPTIONS": {}}
    connections.settings["other"].update({**bare, **entry})
    with override_settings(GREENJOBS={"DATABASE": "other"}):
        assert config.current().database_url == url


def test_role_that_django_assumes_is_that_of_jobs(database: running.Database, work: Any) -> None:
    name = f"role of {connection.settings_dict['NAME']}"
    database.rows(f'CREATE ROLE "{name}"')
    try:
        connections.settings["default"]["OPTIONS"] = {"assume_role": name}
        with greenjobs.connection() as lent, lent.cursor() as cursor:
            cursor.execute("SELECT current_user")
            assert cursor.fetchone() == (name,)
    finally:
        database.rows(f'DROP ROLE "{name}"')


def test_precedence_of_database_urls(database: running.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to greenjobs wins over what is said to Django, and that over what is said to nobody."""
    of_django = config.current().database_url
    monkeypatch.setenv("DATABASE_URL", "postgresql:///by-anybody")
    installed().reread()
    assert config.current().database_url == of_django
    monkeypatch.setenv("GREENJOBS_DATABASE_URL", "postgresql:///by-environment")
    installed().reread()
    assert config.current().database_url == "postgresql:///by-environment"
    with override_settings(GREENJOBS={"DATABASE_URL": "postgresql:///by-settings"}):
        assert config.current().database_url == "postgresql:///by-settings"
        greenjobs.configure(database_url="postgresql:///by-argument")
        assert config.current().database_url == "postgresql:///by-argument"


def test_options_are_spelled_as_in_the_environment(database: running.Database) -> None:
    with override_settings(GREENJOBS={"POOL": 7, "KEEP_FAILED": "1 day", "DEFAULT_QUEUE": "web", "GRACE": None}):
        found = config.current()
    assert (found.pool, found.keep_failed, found.default_queue, found.grace) == (7, 86_400.0, "web", 30.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"POOLS": 5}, "GREENJOBS has the key 'POOLS', which is no option; did you mean 'POOL'?"),
        ({"pool": 5}, "GREENJOBS has the key 'pool', which is no option; did you mean 'POOL'?"),
        ({5: 5}, "GREENJOBS has the key 5, which is no option"),
        ({"POOL": 0}, r"pool is 0 \('POOL' in GREENJOBS\); the value must be a whole number"),
        ({"HTTP": "9600"}, "'HTTP', which counts before the project is loaded"),
        ({"LOG_FORMAT": "json"}, "'LOG_FORMAT', which counts before the project is loaded"),
        ({"PROCESSES": 2}, "'PROCESSES', which counts before the project is loaded; .*GREENJOBS_PROCESSES"),
        ({"DATABASE": "jobs"}, r"DATABASE is 'jobs' \(GREENJOBS\); the value must be 'default' or 'other' or"),
        ({"TRANSACTION": "atomic"}, "TRANSACTION is 'atomic' .*must be 'join' or 'on_commit'"),
        ({"MIGRATE": 1}, "MIGRATE is 1 .*must be True or False"),
        ({"JOBS_MODULE": "a.b"}, "JOBS_MODULE is 'a.b' .*name of a module"),
        (["POOL"], "GREENJOBS is .*must be a dict"),
    ],
    ids=str,
)
def test_wrong_setting_is_refused(given: Any, message: str) -> None:
    settings.GREENJOBS = given
    try:
        with pytest.raises(ConfigError, match=message):
            options.read()
    finally:
        del settings.GREENJOBS


def test_project_without_postgresql_and_without_a_url_has_no_database(database: running.Database) -> None:
    with override_settings(GREENJOBS={"DATABASE": "lite"}):
        assert config.current().database_url is None
        (warning,) = checks.check_database()
    assert "DATABASES['lite'] is not PostgreSQL" in warning.msg and warning.id == "greenjobs.W001"
    assert checks.check_database() == []


def test_check_names_the_tables_that_are_missing(database: running.Database, empty_database_url: str) -> None:
    assert checks.check_tables(databases=["default"]) == []
    point("default", empty_database_url)
    (warning,) = checks.check_tables(databases=["default"])
    assert "0001_background_jobs" in warning.msg and warning.id == "greenjobs.W002"
    assert checks.check_tables() == checks.check_tables(databases=["other"]) == []


def test_check_of_a_database_that_does_not_answer_is_a_warning(database: running.Database) -> None:
    point("default", "host=127.0.0.1 port=1 dbname=shop password=secret")
    (warning,) = checks.check_tables(databases=["default"])
    assert "cannot be looked at" in warning.msg and "secret" not in warning.msg


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        (
            "postgresql://ann:pw@db:5433/shop",
            {"NAME": "shop", "USER": "ann", "PASSWORD": "pw", "HOST": "db", "PORT": "5433"},
        ),
        ("dbname=shop sslmode=require", {"NAME": "shop", "OPTIONS": {"sslmode": "require"}}),
    ],
)
def test_url_as_an_entry_of_databases(url: str, entry: dict[str, Any]) -> None:
    assert django_database(url) == {"ENGINE": "django.db.backends.postgresql", **entry}


# --- transactions -----------------------------------------------------------------------------------------------------


def test_job_is_committed_at_once_outside_of_a_transaction(database: running.Database, work: Any) -> None:
    work.delay()
    assert database.count() == 1


def test_job_is_committed_with_the_transaction(database: running.Database, work: Any) -> None:
    with transaction.atomic():
        Order.objects.create(customer="Ann")
        handle = work.delay()
        assert database.count() == 0
    assert database.state(handle.id) == "available" and Order.objects.count() == 1


def test_job_is_rolled_back_with_the_transaction(database: running.Database, work: Any) -> None:
    with pytest.raises(LookupError), transaction.atomic():
        work.delay()
        raise LookupError
    assert database.count() == 0


def test_savepoint_that_is_rolled_back_takes_its_jobs_along(database: running.Database, work: Any) -> None:
    with transaction.atomic():
        work.delay(1)
        with contextlib.suppress(LookupError), transaction.atomic():
            work.delay(2)
            raise LookupError
        with transaction.atomic():
            work.delay(3)
    assert database.column("SELECT data ->> 'number' FROM background_jobs ORDER BY id") == ["1", "3"]


def test_jobs_of_a_transaction_are_of_one_session(database: running.Database, work: Any) -> None:
    """No second connection is opened for them."""
    connection.ensure_connection()
    before = len(database.sessions())
    with transaction.atomic():
        work.delay_many([(1,), (2,)])
        assert len(database.sessions()) == before


def test_transaction_that_is_committed_by_hand_is_joined(database: running.Database, work: Any) -> None:
    transaction.set_autocommit(False)
    try:
        work.delay()
        assert database.count() == 0
        transaction.rollback()
        work.delay()
        transaction.commit()
        assert database.count() == 1
    finally:
        transaction.set_autocommit(True)


def test_database_without_autocommit_is_joined_before_it_is_opened(database: running.Database, work: Any) -> None:
    connections.settings["default"]["AUTOCOMMIT"] = False
    try:
        connection.close()
        work.delay()
        assert database.count() == 0
        transaction.commit()
        assert database.count() == 1
    finally:
        connections.settings["default"]["AUTOCOMMIT"] = True
        connection.close()


def test_transaction_that_has_failed_takes_no_more_jobs(database: running.Database, work: Any) -> None:
    """As it takes no other statement."""
    with transaction.atomic():
        transaction.set_rollback(True)
        with pytest.raises(transaction.TransactionManagementError, match="can't execute queries until the end"):
            work.delay()
    assert database.count() == 0


def test_independent_job_joins_nothing(database: running.Database, work: Any) -> None:
    with transaction.atomic():
        work.options(independent=True).delay()
        assert database.count() == 1


def test_transaction_of_another_database_is_not_joined(
    database: running.Database, work: Any, empty_database_url: str
) -> None:
    point("other", empty_database_url)
    with transaction.atomic(using="other"):
        work.delay()
        assert database.count() == 1
    connections["other"].close()


def test_jobs_may_be_in_another_database_of_django(
    database: running.Database, work: Any, server_url: str, migrated_template: str
) -> None:
    with databases.fresh(server_url, template=migrated_template) as other_url, running.application(other_url) as other:
        greenjobs.configure()
        point("other", other_url)
        again = job(name="work")(work.function)
        with override_settings(GREENJOBS={"DATABASE": "other"}):
            with transaction.atomic():
                again.delay(1)
                assert other.count() == 1
            with pytest.raises(LookupError), transaction.atomic(using="other"):
                again.delay(2)
                raise LookupError
        assert (database.count(), other.count()) == (0, 1)
        connections["other"].close()


def test_database_that_is_named_by_a_url_is_found_among_those_of_django(database: running.Database, work: Any) -> None:
    with (
        override_settings(GREENJOBS={"DATABASE": "other", "DATABASE_URL": f"{database.url}"}),
        transaction.atomic(),
    ):
        work.delay()
        assert database.count() == 0
    assert database.count() == 1


def test_database_whose_address_only_libpq_knows_is_joined(
    database: running.Database, work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = "\n".join(f"{name}={value}" for name, value in extensions.parse_dsn(database.url).items())
    (tmp_path / "services").write_text(f"[shop]\n{service}\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    connection.close()
    entry = connections.settings["default"]
    entry.update(NAME="", HOST="", PORT="", USER="", PASSWORD="", OPTIONS={"service": "shop"})
    with pytest.raises(LookupError), transaction.atomic():
        work.delay()
        raise LookupError
    assert database.count() == 0
    work.delay()
    assert database.count() == 1


def test_database_of_django_that_cannot_be_loaded_is_none_for_jobs(database: running.Database, work: Any) -> None:
    connections.settings["other"]["ENGINE"] = "no_such.backend"
    try:
        assert equipment.Equipment().alias_of("postgresql://nowhere/shop") is None
    finally:
        connections.settings["other"]["ENGINE"] = "django.db.backends.postgresql"


@pytest.mark.parametrize("of", [lambda: connection, lambda: connections["default"]], ids=["proxy", "wrapper"])
def test_connection_of_django_can_be_named(database: running.Database, work: Any, of: Any) -> None:
    connection.close()
    with transaction.atomic():
        work.options(connection=of()).delay()
        assert database.count() == 0
    work.options(connection=of()).delay()
    assert database.count() == 2


def test_connection_to_what_is_not_postgresql_is_refused(database: running.Database, work: Any) -> None:
    with pytest.raises(OptionError, match="connection is Django's 'lite', which is sqlite; allowed: PostgreSQL"):
        work.options(connection=connections["lite"]).delay()


def test_job_completes_in_a_transaction_of_django(database: running.Database) -> None:
    called = list[int]()

    @job(max_retries=0)
    def work(number: int) -> None:
        with current_job.transaction(connection):
            Order.objects.create(customer=f"customer {number}")
            transaction.on_commit(lambda: called.append(number))
            child.delay(number)
            if number == 2:
                raise LookupError
        assert not connection.in_atomic_block

    @job(queue="later")
    def child(number: int) -> None: ...

    work.delay_many([(1,), (2,)])
    work_off(work)
    assert database.column("SELECT customer FROM django_shop_order") == ["customer 1"]
    assert database.rows("SELECT job_type, data ->> 'number' FROM background_jobs ORDER BY 1") == [
        ("child", "1"),
        ("work", "2"),
    ]
    assert called == [1]


def test_job_cannot_complete_in_a_part_of_a_transaction_of_django(database: running.Database) -> None:
    @job(max_retries=0)
    def work() -> None:
        with transaction.atomic():
            Order.objects.create(customer="Ann")
            with current_job.transaction(connection):
                pass

    work.delay()
    work_off(work)
    assert database.value("SELECT errors -> 0 ->> 'message' FROM background_jobs") == (
        "A durable atomic block cannot be nested within another atomic block."
    )
    assert Order.objects.count() == 0


# --- on_commit --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_commit(database: running.Database) -> Iterator[None]:
    with override_settings(GREENJOBS={"TRANSACTION": "on_commit"}):
        yield


def test_job_is_enqueued_on_commit(database: running.Database, work: Any, on_commit: None) -> None:
    with transaction.atomic():
        handle = work.options(priority=3).delay()
        with pytest.raises(JobHeld):
            assert handle.id
    assert database.rows("SELECT id, priority FROM background_jobs") == [(handle.id, 3)]


def test_job_is_not_enqueued_on_rollback(database: running.Database, work: Any, on_commit: None) -> None:
    with pytest.raises(LookupError), transaction.atomic():
        work.delay()
        raise LookupError
    with transaction.atomic():
        work.delay(1)
        with contextlib.suppress(LookupError), transaction.atomic():
            work.delay(2)
            raise LookupError
    assert database.column("SELECT data ->> 'number' FROM background_jobs") == ["1"]


def test_job_outside_of_a_transaction_is_enqueued_at_once(
    database: running.Database, work: Any, on_commit: None
) -> None:
    assert database.state(work.delay().id) == "available"


def test_job_that_cannot_be_enqueued_on_commit_is_told_of_and_keeps_no_other_from_it(
    database: running.Database, work: Any, on_commit: None, caplog: pytest.LogCaptureFixture
) -> None:
    database.rows("ALTER TABLE background_jobs ADD CHECK (data <> '{\"number\": 13}')")
    called = list[int]()
    with transaction.atomic():
        work.delay(13)
        transaction.on_commit(lambda: called.append(database.count()))
        work.delay(14)
    assert called == [0] and database.column("SELECT data ->> 'number' FROM background_jobs") == ["14"]
    assert "its jobs could not be enqueued, and are lost: work (1)" in caplog.text


def test_connections_that_are_not_of_psycopg2_have_jobs_enqueued_on_commit_and_that_is_said_once(
    database: running.Database, work: Any, caplog: pytest.LogCaptureFixture
) -> None:
    point("wrapped", database.url)
    with override_settings(GREENJOBS={"DATABASE": "wrapped"}):
        for _ in range(2):
            with transaction.atomic(using="wrapped"):
                work.delay()
                assert database.count() == 0
            with pytest.raises(LookupError), transaction.atomic(using="wrapped"):
                work.delay()
                raise LookupError
            database.rows("DELETE FROM background_jobs")
        with pytest.raises(OptionError, match="connection is Django's 'wrapped', whose driver is django_shop"):
            work.options(connection=connections["wrapped"]).delay()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "jobs cannot join the transactions of the database 'wrapped'" in said[0]
    connections["wrapped"].close()


# --- in a test --------------------------------------------------------------------------------------------------------


def test_jobs_of_a_test_are_worked_off_in_its_transaction(database: running.Database) -> None:
    @job
    def confirm(order_id: int) -> None:
        Order.objects.filter(pk=order_id).update(customer="confirmed")

    with transaction.atomic():
        with testing.using(connection):
            with transaction.atomic():
                confirm.delay(Order.objects.create(customer="Ann").pk)
            testing.assert_enqueued(confirm)
            (ran,) = testing.drain()
            assert ran.outcome == "done" and Order.objects.get().customer == "confirmed"
        transaction.set_rollback(True)
    assert (database.count(), Order.objects.count()) == (0, 0)


def test_job_of_a_test_is_lent_a_part_of_its_transaction(database: running.Database) -> None:
    table = Order._meta.db_table

    @job
    def confirm(order_id: int) -> None:
        with greenjobs.connection() as lent, lent.cursor() as cursor:
            cursor.execute(f"UPDATE {table} SET customer = 'seen' WHERE id = %s", (order_id,))
        with contextlib.suppress(ValueError), current_job.transaction() as own, own.cursor() as cursor:
            cursor.execute(f"UPDATE {table} SET customer = 'never' WHERE id = %s", (order_id,))
            raise ValueError
        assert Order.objects.get(pk=order_id).customer == "seen"
        with current_job.transaction() as own, own.cursor() as cursor:
            cursor.execute(f"UPDATE {table} SET customer = 'confirmed' WHERE id = %s", (order_id,))

    with transaction.atomic(), testing.using(connection):
        confirm.delay(Order.objects.create(customer="Ann").pk)
        testing.drain()
        assert (Order.objects.get().customer, testing.enqueued_jobs()) == ("confirmed", [])
        transaction.set_rollback(True)
    assert (database.count(), Order.objects.count()) == (0, 0)


def test_handle_of_a_job_that_failed_in_a_test_tells_so(database: running.Database) -> None:
    """Django has its connections leave jsonb as text."""

    @job(max_retries=0)
    def work() -> None:
        raise LookupError("no such order")

    with transaction.atomic(), testing.using(connection):
        failed = work.delay()
        testing.drain(raise_errors=False)
        with pytest.raises(JobFailed, match="LookupError: no such order"):
            failed.result(0)
        transaction.set_rollback(True)


def test_unique_jobs_are_merged_in_a_transaction_of_django(database: running.Database) -> None:
    @job(unique_key="report", on_conflict="merge", merge=lambda waiting, new: {"ids": waiting["ids"] + new["ids"]})
    def report(ids: list[int]) -> None: ...

    with transaction.atomic():
        assert [report.delay([number]).action for number in (1, 2)] == ["enqueued", "merged"]
    assert database.column("SELECT data FROM background_jobs") == [{"ids": [1, 2]}]


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "way_out"),
    [
        (lambda: Order(pk=5), "is of type Order, which JSON does not have: pass its primary key, .pk, and load it"),
        (lambda: Order.objects.all(), "is of type QuerySet.*values_list"),
        (lambda: SimpleLazyObject(lambda: Order(pk=5)), "is of type SimpleLazyObject.* pass the .pk of what it stands"),
        (lambda: gettext_lazy("Hello"), "pass str"),
    ],
    ids=["model", "query", "lazy", "text"],
)
def test_objects_of_django_are_refused_as_arguments(database: running.Database, argument: Any, way_out: str) -> None:
    @job
    def work(order: Any) -> None: ...

    with pytest.raises(PayloadError, match=f"work: order{way_out if way_out[0] == '[' else '.*' + way_out}"):
        work.delay(argument())
    with pytest.raises(PayloadError, match=r"order\[0\]"):
        work.delay([argument()])
    assert database.count() == 0


# --- around a job -----------------------------------------------------------------------------------------------------


def work_off(*jobs: Any, pool: int = 10) -> None:
    runner = Runner().register(*jobs).configure_queue("default", pool=pool).shutdown_when_queue_empty()
    installed().equip(runner)
    assert runner.start().wait_for_shutdown(running.PATIENCE_SECONDS)


def state() -> tuple[Any, ...]:
    return (translation.get_language(), timezone.get_current_timezone_name(), get_urlconf(), get_script_prefix())


def change_state(number: int) -> None:
    translation.activate(("de", "fr", "es")[number % 3])
    timezone.activate(("Asia/Tokyo", "Europe/Paris")[number % 2])
    set_urlconf(f"urls{number}")
    set_script_prefix(f"/{number}/")


AT_FIRST = ("en", "UTC", None, "/")


def test_fifty_jobs_at_once_share_nothing(database: running.Database) -> None:
    """Connection, transaction, language, time zone, URLs."""
    all_are_here, here = Event(), set[int]()
    backends, failures = set[int](), list[Any]()

    def backend() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return int(cursor.fetchone()[0])

    @job(max_retries=0)
    def work(number: int) -> None:
        if state() != AT_FIRST or connection.connection is not None:
            failures.append((number, state(), connection.connection))
        change_state(number)
        mine = state()
        with transaction.atomic():
            Order.objects.create(customer=f"customer {number}")
            here.add(number)
            if len(here) == 50:
                all_are_here.set()
            assert all_are_here.wait(running.PATIENCE_SECONDS)
            gevent.sleep(0)
            backends.add(backend())
            if state() != mine or Order.objects.count() != 1:
                failures.append((number, state(), Order.objects.count()))
            gevent.sleep(0)
            if number % 2:
                raise LookupError(number)
            work_off_later.delay(number)

    @job(queue="later")
    def work_off_later(number: int) -> None: ...

    work.delay_many([(number,) for number in range(50)])
    connections.close_all()
    before = len(database.sessions())
    work_off(work, pool=50)
    assert failures == []
    assert len(backends) == 50
    assert Order.objects.count() == 25
    assert database.count("state = 'failed'") == database.count("queue = 'later'") == 25
    connections.close_all()
    assert len([each for each in database.sessions() if not each.startswith("greenjobs")]) <= before


def test_jobs_one_after_the_other_share_nothing(database: running.Database) -> None:
    """A carrier runs them in one greenlet, where it may."""
    found = list[Any]()

    @job
    def work(number: int) -> None:
        found.append((state(), connection.connection, connection.in_atomic_block))
        change_state(number)
        Order.objects.create(customer=f"customer {number}")
        if number % 10 == 0:
            transaction.set_autocommit(False)
            Order.objects.create(customer="never committed")

    work.delay_many([(number,) for number in range(30)])
    work_off(work, pool=1)
    assert found == [(AT_FIRST, None, False)] * 30
    assert Order.objects.count() == 30


def test_surroundings_leave_a_thread_as_they_found_it_for_the_next_job(database: running.Database) -> None:
    """As where jobs run in threads, which live on."""
    for number in range(2):
        with installed().context():
            assert (state(), connection.connection) == (AT_FIRST, None) or number == 0
            change_state(number)
            Order.objects.count()
        assert connection.connection is None
        assert state() == AT_FIRST


def test_script_name_of_the_project_is_that_of_its_jobs(database: running.Database) -> None:
    found = list[str]()

    @job
    def work() -> None:
        found.append(get_script_prefix())

    work.delay()
    with override_settings(FORCE_SCRIPT_NAME="/shop/"):
        work_off(work)
    assert found == ["/shop/"]


def test_job_that_is_cut_off_in_the_database_leaves_no_session(database: running.Database) -> None:
    @job(max_retries=0)
    def work() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(600)")

    handle = work.options(hard_timeout=0.2).delay()
    work_off(work)
    assert database.state(handle.id) == "failed"
    going_on = (
        "SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND query LIKE '%%pg_sleep%%' AND state = 'active' AND pid <> pg_backend_pid()"
    )
    eventually(lambda: not database.rows(going_on), "the statement goes on")


def test_connection_is_closed_where_the_others_cannot_be(database: running.Database) -> None:
    seen = list[Any]()

    @job
    def work() -> None:
        Order.objects.count()
        lite = connections["lite"]
        lite.close = fail
        seen.append(connections["default"])

    def fail() -> None:
        raise OSError("cannot be closed")

    work.delay()
    work_off(work)
    assert seen[0].connection is None and database.count() == 0


def test_app_needs_no_gevent(tmp_path: Path) -> None:
    import processes

    code = """
import sys, django
from django.conf import settings
settings.configure(INSTALLED_APPS=["greenjobs.contrib.django"])
django.setup()
print({"gevent", "sqlalchemy", "flask"} & set(sys.modules))
"""
    assert processes.run("python", "-c", code, folder=tmp_path) == "set()\n"
