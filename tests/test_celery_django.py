"""greenjobs.contrib.celery in a Django project, as Celery's documentation has it: other imports, and one app more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import databases
import processes
import pytest

PROJECT = {
    "proj/__init__.py": """
from .celery import app as celery_app

__all__ = ("celery_app",)
""",
    "proj/celery.py": """
import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")
app = Celery("proj")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
""",
    "proj/settings.py": """
from celery.schedules import crontab
from greenjobs.contrib.django import django_database

DATABASES = {"default": django_database(URL)}
INSTALLED_APPS = ["greenjobs.contrib.django", "django.contrib.contenttypes", "shop", "empty"]
SECRET_KEY = "of tests"
USE_TZ = True
CELERY_BROKER_URL = "redis://localhost:6379/0"
CELERY_TASK_ROUTES = {"shop.tasks.*": {"queue": "mail"}}
CELERY_BEAT_SCHEDULE = {"nightly": {"task": "shop.tasks.note", "schedule": crontab(hour=3), "args": ("night",)}}
""",
    "bare.py": """
from proj.settings import *

INSTALLED_APPS.remove("greenjobs.contrib.django")
""",
    "empty/__init__.py": "",
    "shop/__init__.py": "",
    # Models cannot be imported before Django is set up.
    "shop/tasks.py": """
from celery import shared_task
from django.contrib.contenttypes.models import ContentType
from django.db import connection
from greenjobs import events

opened = []


@shared_task
def note(name):
    found = ContentType.objects.filter(model=name).exists()
    opened.append(connection.connection)
    print(f"{name}: {found}", flush=True)


def tell(event):
    if opened:
        print("open at the end:", sum(not each.closed for each in opened), flush=True)


events.subscribe(tell, kind=events.AttemptEnded)
""",
    "order.py": """
import proj
import django
from django.db import transaction

django.setup()
from django.contrib.contenttypes.models import ContentType
from shop.tasks import note


def order(name, enqueue, *, fails=False):
    with transaction.atomic():
        ContentType.objects.create(app_label="shop", model=name)
        enqueue(name)
        transaction.set_rollback(fails)


order("joined", note.delay)
order("gone", note.delay, fails=True)
order("by hand", lambda name: transaction.on_commit(lambda: note.delay(name)))
order("on commit", note.delay_on_commit)
order("dropped", note.delay_on_commit, fails=True)
order("later", lambda name: note.apply_async_on_commit((name,), priority=3))
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, server_url: str, migrated_template: str) -> Iterator[Path]:
    """The project, of which the imports are changed, with the tables of Django."""
    folder = tmp_path_factory.mktemp("celery")
    with databases.fresh(server_url, template=migrated_template) as url:
        for name, text in PROJECT.items():
            moved = text.replace("from celery", "from greenjobs.contrib.celery").replace("(URL)", f"({url!r})")
            (folder / name).parent.mkdir(exist_ok=True)
            processes.write_application(folder, moved, name=name)
        django(folder, "migrate")
        yield folder


def django(folder: Path, *arguments: str) -> str:
    return processes.run("django-admin", *arguments, "--settings=proj.settings", "--pythonpath=.", folder=folder)


def test_runner_without_the_app_among_those_of_the_project_is_told_so(folder: Path) -> None:
    """Without it no connection of a task would be closed."""
    bare = {"DJANGO_SETTINGS_MODULE": "bare"}
    output = processes.run("greenjobs", "run", "--app", "proj", folder=folder, environment=bare, status=2)
    assert '"greenjobs.contrib.django" is not in INSTALLED_APPS of bare; add it there' in output


def test_tasks_of_a_project_are_found_and_join_its_transactions(folder: Path) -> None:
    processes.run("python", "order.py", folder=folder)
    output = processes.run("greenjobs", "run", "--app", "proj", "--until-empty", folder=folder)
    ran = sorted(re.findall(r"^(.*): (True|False)$", output, re.MULTILINE))
    assert ran == [(name, "True") for name in ("by hand", "joined", "later", "on commit")]
    # As the project is around every task, which takes that it is set up before the runner is made.
    assert re.findall(r"^open at the end: (.*)$", output, re.MULTILINE)[-1] == "0"
    assert "shop.tasks.note" in django(folder, "greenjobs", "schedules")
