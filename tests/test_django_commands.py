"""A Django project on disk: `manage.py greenjobs …`, `greenjobs run`, and Django's own test runner."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import databases
import processes
import pytest
import running

SETTINGS = """
from greenjobs.contrib.django import django_database

DATABASES = {"default": django_database(URL)}
INSTALLED_APPS = ["greenjobs.contrib.django", "shop"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
SECRET_KEY = "of tests"
USE_TZ = True
LANGUAGE_CODE = "fr"
GREENJOBS = {"POOL": 7}
"""

MANAGE = """
import os
import sys
from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site_of_tests.settings")
execute_from_command_line(sys.argv)
"""

MODELS = """
from django.db import models

class Order(models.Model):
    customer = models.TextField()
    confirmed = models.BooleanField(default=False)
"""

JOBS = """
from django.db import connection, transaction
from django.utils import translation
from greenjobs import green, job
from shop.models import Order

@job(queue="mail")
def confirm(order_id: int):
    with transaction.atomic():
        order = Order.objects.select_for_update().get(pk=order_id)
        order.confirmed = True
        order.save()
    print(f"{translation.get_language()} {order.customer} {green.missing_patches()}", flush=True)
"""

ORDER = """
from django.core.management.base import BaseCommand
from django.db import transaction
from shop.jobs import confirm
from shop.models import Order

class Command(BaseCommand):
    def handle(self, **options):
        for name in ("Ann", "Mallory"):
            with transaction.atomic():
                confirm.delay(Order.objects.create(customer=name).pk)
                transaction.set_rollback(name == "Mallory")
"""

TESTS = """
from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase, override_settings
from greenjobs import jobs, testing
from shop.jobs import confirm
from shop.models import Order

def place(name):
    with transaction.atomic():
        order = Order.objects.create(customer=name)
        confirm.delay(order.pk)
    return order

class InTheTransactionOfTheTest(TestCase):
    def run(self, result=None):
        with testing.using(connection):
            return super().run(result)

    def test_order_is_confirmed(self):
        order = place("Ann")
        testing.assert_enqueued(confirm, order.pk)
        self.assertEqual([ran.outcome for ran in testing.drain()], ["done"])
        order.refresh_from_db()
        self.assertTrue(order.confirmed)

    def test_nothing_is_left_of_other_tests(self):
        self.assertEqual((testing.enqueued_jobs(), Order.objects.count()), ([], 0))

class WithoutAMode(TestCase):
    def rows(self):
        with connection.cursor() as cursor:
            cursor.execute("SELECT job_type FROM background_jobs")
            return cursor.fetchall()

    def test_job_joins_the_transaction_of_the_test(self):
        place("Ann")
        self.assertEqual(self.rows(), [("confirm",)])

    def test_nothing_is_left_of_other_tests(self):
        self.assertEqual(self.rows(), [])

    @override_settings(GREENJOBS={"TRANSACTION": "on_commit"})
    def test_job_waits_for_a_commit(self):
        with self.captureOnCommitCallbacks() as callbacks:
            place("Ann")
        self.assertEqual((len(callbacks), self.rows()), (1, []))

class Inline(TestCase):
    def test_order_is_confirmed(self):
        with testing.inline():
            order = place("Ann")
        order.refresh_from_db()
        self.assertTrue(order.confirmed)

class Committed(TransactionTestCase):
    def test_job_is_committed_to_the_database_of_the_tests(self):
        order = place("Ann")
        confirm.delay(order.pk)
        self.assertEqual(len(jobs.find()), 2)
        self.assertEqual(len(testing.drain()), 2)
        order.refresh_from_db()
        self.assertTrue(order.confirmed)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, server_url: str) -> Iterator[tuple[Path, str]]:
    """The folder of a project, and its database, which `manage.py migrate` has made the tables of."""
    folder = tmp_path_factory.mktemp("site")
    with databases.fresh(server_url) as url:
        files = {
            "manage.py": MANAGE,
            "site_of_tests/__init__.py": "",
            "site_of_tests/settings.py": f"URL = {url!r}\n{SETTINGS}",
            "shop/__init__.py": "",
            "shop/models.py": MODELS,
            "shop/jobs.py": JOBS,
            "shop/tests.py": TESTS,
            "shop/migrations/__init__.py": "",
            "shop/management/commands/order.py": ORDER,
            "elsewhere/nothing.txt": "",
        }
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(textwrap.dedent(text), encoding="utf-8")
        processes.run("python", "manage.py", "makemigrations", "shop", folder=folder)
        output = processes.run("python", "manage.py", "migrate", folder=folder)
        assert "Applying shop.0001_initial... OK" in output
        assert "Applying greenjobs.0001_background_jobs... OK\n  Applying greenjobs.0002" in output
        assert "greenjobs.W002" not in output
        yield folder, url


@pytest.fixture
def folder(site: tuple[Path, str]) -> Iterator[Path]:
    """The project, without orders and jobs."""
    folder, url = site
    yield folder
    with databases.administration(url) as cursor:
        cursor.execute("TRUNCATE background_jobs, shop_order")


@pytest.fixture
def database(site: tuple[Path, str]) -> Iterator[running.Database]:
    database = running.Database(site[1])
    yield database
    database.connection.close()


def manage(folder: Path, *arguments: str, status: int = 0, script: str = "manage.py") -> str:
    return processes.run("python", script, *arguments, folder=folder, status=status)


def assert_ann_is_confirmed(output: str, database: running.Database) -> None:
    assert "fr Ann ()" in output and "Mallory" not in output
    assert "queues: mail (7 at a time)" in output
    assert database.rows("SELECT customer, confirmed FROM shop_order") == [("Ann", True)]
    assert database.count() == 0


def test_manage_py_greenjobs_run_works_off_what_was_committed(folder: Path, database: running.Database) -> None:
    """In a fresh interpreter, which was patched before anything was imported, as its job says."""
    manage(folder, "order")
    assert database.column("SELECT job_type FROM background_jobs") == ["confirm"]
    assert_ann_is_confirmed(manage(folder, "greenjobs", "run", "--until-empty"), database)


def test_manage_py_greenjobs_doctor_judges_a_fresh_process(folder: Path) -> None:
    chosen = ("--only", "early imports", "--only", "schema", "--only", "application")
    output = manage(folder, "greenjobs", "doctor", *chosen)
    assert "ok       application: site_of_tests.settings declares confirm" in output
    assert "ok       early imports: " in output
    assert "ok       schema: " in output


def test_manage_py_can_be_anywhere(folder: Path, database: running.Database) -> None:
    manage(folder, "order")
    arguments = ("greenjobs", "run", "--until-empty", "--settings=site_of_tests.settings", "--pool=7")
    assert_ann_is_confirmed(manage(folder / "elsewhere", *arguments, script="../manage.py"), database)


def test_greenjobs_run_finds_the_project_by_the_variable_of_django(folder: Path, database: running.Database) -> None:
    manage(folder, "order")
    variable = {"DJANGO_SETTINGS_MODULE": "site_of_tests.settings"}
    output = processes.run("greenjobs", "run", "--until-empty", folder=folder, environment=variable)
    assert_ann_is_confirmed(output, database)


def test_greenjobs_run_finds_the_project_by_its_application(folder: Path, database: running.Database) -> None:
    code = """
    import os
    from django.core.wsgi import get_wsgi_application

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site_of_tests.settings")
    application = get_wsgi_application()
    """
    processes.write_application(folder, code, name="site_of_tests/wsgi.py")
    manage(folder, "order")
    output = processes.run("greenjobs", "run", "--app", "site_of_tests.wsgi", "--until-empty", folder=folder)
    assert_ann_is_confirmed(output, database)


def test_runner_of_a_project_is_stopped_by_a_signal_and_keeps_no_session_of_jobs(
    folder: Path, database: running.Database
) -> None:
    manage(folder, "order")
    with processes.start("python", "manage.py", "greenjobs", "run", "--processes", "2", folder=folder) as process:
        process.wait_for_line(r"^fr Ann \(\)$")
        database.wait_for("true", count=0)
        assert all(name.startswith("greenjobs") for name in database.sessions())
        process.terminate()
        assert process.wait() == 0


def test_manage_py_greenjobs_has_the_commands_of_greenjobs(folder: Path) -> None:
    manage(folder, "order")
    assert "up to date" in manage(folder, "greenjobs", "migrate", "--check")
    assert "no live runners" in manage(folder, "greenjobs", "status")
    assert " confirm " in manage(folder, "greenjobs", "jobs", "list", "--settings", "site_of_tests.settings")
    assert "--until-empty" in manage(folder, "greenjobs", "run", "--help")
    assert "No such command 'runn'" in manage(folder, "greenjobs", "runn", status=2)


def test_greenjobs_can_be_called_as_a_command(folder: Path) -> None:
    code = """
    import io, contextlib, django
    from django.core.management import CommandError, call_command
    django.setup()
    call_command("greenjobs", "migrate", "--check")
    for words in (["runn"], ["run"], ["jobs", "retry", "5"]):
        try:
            call_command("greenjobs", *words)
        except CommandError as error:
            print(error)
    """
    script = folder / "elsewhere" / "calls.py"
    script.write_text(textwrap.dedent(code))
    variables = {"DJANGO_SETTINGS_MODULE": "site_of_tests.settings", "PYTHONPATH": str(folder)}
    output = processes.run("python", script, folder=folder, environment=variables)
    assert "up to date" in output and "No such command 'runn'" in output
    assert "`greenjobs run` needs a process of its own" in output
    assert "greenjobs jobs ended with 1" in output


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DJANGO_SETTINGS_MODULE": "site_of_tests.setings"}, "there is no module 'site_of_tests.setings'"),
        ({"DJANGO_SETTINGS_MODULE": "bare"}, '"greenjobs.contrib.django" is not in INSTALLED_APPS of bare'),
        ({"DJANGO_SETTINGS_MODULE": "idle"}, "no app in INSTALLED_APPS of idle declares jobs"),
        ({"DJANGO_SETTINGS_MODULE": "wrong"}, "GREENJOBS has the key 'POLL'"),
    ],
    ids=lambda value: value["DJANGO_SETTINGS_MODULE"] if isinstance(value, dict) else "",
)
def test_project_that_cannot_be_run_is_told_why(folder: Path, variables: dict[str, str], message: str) -> None:
    (folder / "bare.py").write_text("SECRET_KEY = 'x'")
    (folder / "idle.py").write_text("SECRET_KEY = 'x'\nINSTALLED_APPS = ['greenjobs.contrib.django']")
    (folder / "wrong.py").write_text("INSTALLED_APPS = ['greenjobs.contrib.django']\nGREENJOBS = {'POLL': 5}")
    output = processes.run("greenjobs", "run", folder=folder, environment=variables, status=2)
    assert message in output and "Traceback" not in output


def test_migrate_leaves_the_tables_alone_where_it_is_told_to(folder: Path, server_url: str) -> None:
    with databases.fresh(server_url) as url:
        settings = f'URL = {url!r}\n{SETTINGS}\nGREENJOBS["MIGRATE"] = False\n'
        (folder / "apart.py").write_text(settings, encoding="utf-8")
        output = manage(folder, "migrate", "--settings=apart")
        assert "Applying shop.0001_initial" in output and "greenjobs.0001" not in output
        assert "greenjobs.W002" in manage(folder, "check", "--database", "default", "--settings=apart")
        assert "applied 0001_background_jobs" in manage(folder, "greenjobs", "migrate", "--settings=apart")
        assert "no issues" in manage(folder, "check", "--database", "default", "--settings=apart")


def test_tests_of_a_project_have_the_tables_and_leave_nothing(folder: Path, database: running.Database) -> None:
    """Django makes a database for them, and drops it, which takes that nobody is connected to it."""
    output = manage(folder, "test", "shop", "--noinput")
    assert "Ran 7 tests" in output and "OK" in output
    name = f"test_{database.value('SELECT current_database()')}"
    assert database.value("SELECT count(*) FROM pg_database WHERE datname = %s", name) == 0
    assert database.count() == 0
