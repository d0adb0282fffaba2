"""Settings: where they come from, what is refused, and that no password is ever shown."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg2.extensions import make_dsn, parse_dsn

from greenjobs import config
from greenjobs.config import OPTIONS, Settings, load, project_folder
from greenjobs.durations import duration
from greenjobs.errors import ConfigError
from greenjobs.redaction import redact

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty project as the working directory, and an environment without settings of ours."""
    for name in [name for name in os.environ if name.startswith("GREENJOBS_") or name == "DATABASE_URL"]:
        monkeypatch.delenv(name)
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    config.configure()
    yield folder
    config.configure()


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


# Where a value comes from


def test_without_any_source_every_option_has_its_default() -> None:
    settings = load()
    assert {name: getattr(settings, name) for name in OPTIONS} == {
        "database_url": None,
        "session_url": None,
        "session": "auto",
        "app": None,
        "pool": 50,
        "share": None,
        "poll_interval": 1.0,
        "read_ahead": 4_000,
        "max_retries": 10,
        "max_crashes": 3,
        "keep_failed": 30 * 24 * 3600.0,
        "keep_counts": 7 * 24 * 3600.0,
        "grace": 30.0,
        "on_session_loss": "finish",
        "max_blocking": 0.5,
        "threads": None,
        "job_processes": None,
        "processes": 1,
        "max_jobs": None,
        "max_memory": None,
        "http": None,
        "max_payload_bytes": 1024 * 1024,
        "enqueue_timeout": 5.0,
        "enqueue_connections": 10,
        "job_connections": 10,
        "job_connection_timeout": 30.0,
        "default_queue": "default",
        "log_level": "INFO",
        "log_format": "plain",
        "schedules": (),
    }


def test_every_setting_but_the_folder_is_an_option() -> None:
    assert {each.name for each in fields(Settings)} - set(OPTIONS) == {"project_folder"}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=str)
def test_a_default_is_a_value_that_the_option_allows(option: config.Option) -> None:
    assert option.default is None or option.parse(option.default) == option.default


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENJOBS_POOL", "7")
    assert load(pool=3).pool == 3


def test_an_argument_of_none_counts_as_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENJOBS_POOL", "7")
    assert load(pool=None).pool == 7


def test_the_environment_wins_over_the_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, "setup.cfg", "[greenjobs]\npool = 5\n")
    monkeypatch.setenv("GREENJOBS_POOL", "7")
    assert load().pool == 7


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_environment_variable_counts_as_not_set(
    empty: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(project, "setup.cfg", "[greenjobs]\npool = 5\n")
    monkeypatch.setenv("GREENJOBS_POOL", empty)
    assert load().pool == 5


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)
def test_every_option_can_be_set_by_a_variable_of_its_name(
    option: config.Option, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "database_url": "embedded:",
        "session_url": "host=x",
        "session": "lease",
        "app": "myapp.jobs",
        "on_session_loss": "interrupt",
        "log_level": "debug",
        "log_format": "json",
    }
    value = words.get(option.name, "12")
    monkeypatch.setenv(f"GREENJOBS_{option.name.upper()}", value)
    assert getattr(load(), option.name) == option.parse(value) != option.default


def test_our_own_variable_for_the_database_wins_over_the_common_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://common/db")
    monkeypatch.setenv("GREENJOBS_DATABASE_URL", "postgresql://ours/db")
    assert load().database_url == "postgresql://ours/db"


def test_the_common_variable_for_the_database_is_used_where_ours_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://common/db")
    monkeypatch.setenv("GREENJOBS_DATABASE_URL", "")
    assert load().database_url == "postgresql://common/db"


def test_options_are_read_from_setup_cfg(project: Path) -> None:
    write(project, "setup.cfg", "[greenjobs]\nmax_retries = 3\npoll_interval = 2.5\nlog_level = debug\n")
    settings = load()
    assert (settings.max_retries, settings.poll_interval, settings.log_level) == (3, 2.5, "DEBUG")


def test_options_are_read_from_pyproject_toml(project: Path) -> None:
    write(project, "pyproject.toml", '[tool.greenjobs]\nmax_retries = 3\npoll_interval = 2\napp = "myapp.jobs"\n')
    settings = load()
    assert (settings.max_retries, settings.poll_interval, settings.app) == (3, 2.0, "myapp.jobs")


@pytest.mark.parametrize(
    ("name", "text"),
    [("setup.cfg", "[greenjobs]\nmax-retries = 3\n"), ("pyproject.toml", "[tool.greenjobs]\nmax-retries = 3\n")],
)
def test_a_file_may_spell_an_option_as_the_command_line_does(name: str, text: str, project: Path) -> None:
    write(project, name, text)
    assert load().max_retries == 3


def test_a_percent_sign_in_setup_cfg_is_kept(project: Path) -> None:
    """Passwords in URLs are percent-encoded; configparser would take that for its interpolation."""
    write(project, "setup.cfg", "[greenjobs]\ndatabase_url = postgresql://u:p%40s%25s@h/db\n")
    assert load().database_url == "postgresql://u:p%40s%25s@h/db"


def test_other_sections_and_defaults_of_setup_cfg_are_not_ours(project: Path) -> None:
    write(project, "setup.cfg", "[DEFAULT]\npool = 1\n[greenjobs]\nmax_retries = 3\n[metadata]\npool = 2\n")
    assert load().pool == 50


def test_the_nearest_folder_with_a_section_counts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, "setup.cfg", "[greenjobs]\npool = 5\n")
    inner = project / "a" / "b"
    inner.mkdir(parents=True)
    write(inner.parent, "pyproject.toml", "[tool.greenjobs]\npool = 6\n")
    write(inner, "setup.cfg", "[metadata]\nname = greenjobs-of-mine\n")
    monkeypatch.chdir(inner)
    assert load().pool == 6


def test_a_folder_with_two_sections_is_refused(project: Path) -> None:
    write(project, "setup.cfg", "[greenjobs]\npool = 5\n")
    write(project, "pyproject.toml", "[tool.greenjobs]\npool = 5\n")
    with pytest.raises(
        ConfigError, match=r"\[greenjobs\] in .*setup\.cfg and \[tool\.greenjobs\] in .*pyproject\.toml"
    ):
        load()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("setup.cfg", "no section here\n"),
        ("setup.cfg", "[a]\nx = 1\nx = 2\n"),
        ("pyproject.toml", "= = ="),
        ("pyproject.toml", 'tool = "of somebody else"'),
    ],
)
def test_a_strange_file_that_does_not_mention_us_is_left_alone(name: str, text: str, project: Path) -> None:
    write(project, name, text)
    assert load().pool == 50


def test_a_folder_of_the_name_of_a_file_is_left_alone(project: Path) -> None:
    (project / "setup.cfg").mkdir()
    assert load().pool == 50


# What is refused


def test_an_unknown_argument_is_a_type_error_that_names_the_near_match() -> None:
    with pytest.raises(TypeError, match="'max_retrys'; did you mean max_retries"):
        load(max_retrys=3)


@pytest.mark.parametrize(
    ("name", "text"),
    [("setup.cfg", "[greenjobs]\nmax-retrys = 3\n"), ("pyproject.toml", "[tool.greenjobs]\nmax-retrys = 3\n")],
)
def test_an_unknown_key_in_a_file_is_refused_with_file_key_and_near_match(name: str, text: str, project: Path) -> None:
    file = write(project, name, text)
    with pytest.raises(ConfigError) as caught:
        load()
    assert str(file) in str(caught.value)
    assert "'max-retrys'" in str(caught.value)
    assert "did you mean max_retries?" in str(caught.value)


def test_an_unknown_key_that_resembles_nothing_is_answered_with_all_options(project: Path) -> None:
    write(project, "setup.cfg", "[greenjobs]\nqqq = 3\n")
    with pytest.raises(ConfigError, match=", ".join(OPTIONS)):
        load()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("setup.cfg", "[greenjobs]\nmax_retries = 3\nmax-retries = 3\n"),
        ("pyproject.toml", "[tool.greenjobs]\nmax_retries = 3\nmax-retries = 3\n"),
    ],
)
def test_an_option_that_is_spelled_in_two_ways_is_refused(name: str, text: str, project: Path) -> None:
    write(project, name, text)
    with pytest.raises(ConfigError, match="sets max_retries twice"):
        load()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("setup.cfg", b"[greenjobs]\npool = 1\npool = 2\n"),
        ("setup.cfg", b"greenjobs"),
        ("setup.cfg", b"[greenjobs]\napp = \xff\n"),
        ("pyproject.toml", b"[tool.greenjobs"),
        ("pyproject.toml", b"[tool]\ngreenjobs = 3\n"),
    ],
)
def test_a_broken_file_of_ours_is_refused_by_name(name: str, content: bytes, project: Path) -> None:
    file = project / name
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load()
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("value", ["host=h password=hunter2", "postgresql://u:hunter2@h/db"])
def test_a_broken_file_is_refused_without_showing_its_password(value: str, project: Path) -> None:
    write(project, "setup.cfg", f"[greenjobs]\ndatabase_url = {value}\n{value.replace('=', ' ').replace(':', ' ')}\n")
    with pytest.raises(ConfigError) as caught:
        load()
    assert "hunter2" not in str(caught.value)


WRONG = [
    ("pool", 0),
    ("pool", 10_001),
    ("pool", -1),
    ("pool", True),
    ("pool", 2.0),
    ("pool", "many"),
    ("pool", "5.5"),
    ("pool", ""),
    ("pool", [5]),
    ("pool", "9" * 5000),
    ("share", 0),
    ("share", 10_001),
    ("share", "all"),
    ("poll_interval", 0),
    ("poll_interval", "nan"),
    ("poll_interval", float("inf")),
    ("poll_interval", "1s"),
    ("poll_interval", 10**400),
    ("max_retries", -1),
    ("keep_failed", -1),
    ("keep_failed", "never"),
    ("keep_failed", float("nan")),
    ("keep_failed", "40000 days"),
    ("keep_counts", -1),
    ("keep_counts", "a week"),
    ("max_payload_bytes", 0),
    ("max_payload_bytes", 2**28),
    ("enqueue_timeout", -1),
    ("enqueue_timeout", False),
    ("enqueue_connections", 0),
    ("default_queue", " "),
    ("default_queue", "a:b"),
    ("default_queue", "two words"),
    ("default_queue", "x" * 101),
    ("default_queue", "bell\a"),
    ("log_level", "LOUD"),
    ("log_level", 10),
    ("log_format", "xml"),
    ("app", ""),
    ("app", 3),
    ("session_url", "embedded:"),
    ("database_url", ""),
    ("database_url", 5432),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_argument_is_refused_with_what_is_allowed(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**{name: value})
    assert str(caught.value).startswith(f"{name} is ")
    assert "(an argument)" in str(caught.value)
    assert OPTIONS[name].allowed in str(caught.value)


def test_a_wrong_variable_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENJOBS_MAX_RETRIES", "many")
    with pytest.raises(ConfigError) as caught:
        load()
    assert str(caught.value) == (
        "max_retries is 'many' (the environment variable GREENJOBS_MAX_RETRIES); "
        "the value must be a whole number from 0 to 10,000."
    )


def test_a_wrong_value_in_a_file_is_refused_with_the_file(project: Path) -> None:
    file = write(project, "pyproject.toml", "[tool.greenjobs]\npool = true\n")
    with pytest.raises(ConfigError) as caught:
        load()
    assert f"pool is True ([tool.greenjobs] in {file})" in str(caught.value)


def test_a_wrong_value_that_is_very_long_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        load(log_level="x" * 100_000)
    assert len(str(caught.value)) < 500


# Durations


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (90, 90.0),
        (0.5, 0.5),
        ("90", 90.0),
        (" 1.5 ", 1.5),
        ("90s", 90.0),
        ("1.5 hours", 5400.0),
        ("12h", 43_200.0),
        ("1 minute", 60.0),
        ("2 Days", 172_800.0),
        ("1w 3d", 864_000.0),
        ("1m30s", 90.0),
        (timedelta(days=2), 172_800.0),
        (0, 0.0),
    ],
)
def test_a_duration_is_a_number_of_seconds_or_text_for_people(value: object, seconds: float) -> None:
    assert duration(value) == seconds


@pytest.mark.parametrize(
    "value",
    ["", "d", "7 7", "7 x", "7 ms", "-3 d", "1e5", "7 days ago", "٣ d", "1,5 h", "9" * 400 + "d", "40000 d", b"7d"]
    + [-1, True, None, float("nan"), float("inf"), timedelta(-1)],
)
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises((ValueError, OverflowError)):
        duration(value)


@pytest.mark.parametrize("forever", ["forever", " Forever ", "0", 0])
def test_failed_jobs_can_be_kept_for_ever(forever: object) -> None:
    assert load(keep_failed=forever).keep_failed == 0


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        load().pool = 3  # type: ignore[misc]  # the mistake that is tested


def test_a_removed_working_directory_is_named_as_the_cause(project: Path) -> None:
    project.rmdir()
    with pytest.raises(ConfigError, match="working directory has been removed"):
        load()


# Database URLs


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:pw@host:5432/db",
        "postgres://host/db",
        "postgresql:///db?host=%2Fvar%2Frun%2Fpostgresql",
        "postgresql://",
        "postgresql://[::1]:5432/db",
        "postgresql://a:5432,b:5433/db?target_session_attrs=read-write",
        "host=/tmp dbname=db",
        "host = h password = 'it\\'s' dbname=db",
        "service=jobs",
        "embedded:",
        "embedded:///var/lib/my jobs",
        "embedded:var/pg",
        "embedded:/var/pg",
    ],
)
def test_a_database_url_of_an_allowed_form_is_passed_on_untouched(url: str) -> None:
    assert load(database_url=url).require_database_url() == url


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgresql+psycopg2://u:p%40@h/db?sslmode=require", "postgresql://u:p%40@h/db?sslmode=require"),
        ("postgresql+psycopg://u@h/db", "postgresql://u@h/db"),
        ("PostgreSQL://H/Db", "postgresql://H/Db"),
        (" postgresql://h/db\n", "postgresql://h/db"),
    ],
)
def test_what_libpq_would_not_understand_of_a_url_is_taken_away(given: str, used: str) -> None:
    assert load(database_url=given).database_url == used


@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:hunter2@host/db",
        "sqlite:///file.db?password=hunter2",
        "http://user:hunter2@host/",
        "postgresql+asyncpg://user:hunter2@host/db",
        "postgresql:/user:hunter2@host/db",
        "postgresql//user:hunter2@host/db",
        "user:hunter2@host/db",
        "password=hunter2 and more",
        "password='hunter2",
        "embedded://folder",
        "embedded",
        "garbage",
        "postgresql://host/db\0",
        "host=h\0",
        "postgresql://host/\ndb",
        "=",
    ],
)
def test_any_other_database_url_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(database_url=url)
    assert OPTIONS["database_url"].allowed in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_no_database_is_no_error_until_one_is_needed() -> None:
    assert load().database_url is None


@pytest.mark.parametrize(
    "way",
    [
        "--database-url",
        "GREENJOBS_DATABASE_URL",
        "DATABASE_URL",
        "[greenjobs] in setup.cfg",
        "[tool.greenjobs] in pyproject.toml",
        "embedded:",
    ],
)
def test_the_error_for_no_database_says_how_to_name_one(way: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load().require_database_url()
    assert way in str(caught.value)


# Passwords


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:hunter2@h:5432/db", "postgresql://u:***@h:5432/db"),
        ("postgresql://:hunter2@h/db", "postgresql://:***@h/db"),
        (
            "postgresql://u:hunter2%40@a:1,b:2/db?target_session_attrs=any",
            "postgresql://u:***@a:1,b:2/db?target_session_attrs=any",
        ),
        (
            "postgresql://h/db?user=u&password=hunter2&sslmode=require",
            "postgresql://h/db?user=u&password=***&sslmode=require",
        ),
        ("postgresql://h/db?sslpassword=hunter2", "postgresql://h/db?sslpassword=***"),
        ("postgresql://h/db?pass%77ord=hunter2&a=b", "postgresql://h/db?pass%77ord=***&a=b"),
        ("postgresql://u:hunter2@h/db?password=hunter2", "postgresql://u:***@h/db?password=***"),
        ("postgresql://u:hunter2?#@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:hunter2/x@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:x@hunter2@h/db", "postgresql://u:***@h/db"),
        ("postgresql+psycopg2://u:hunter2@/db", "postgresql+psycopg2://u:***@/db"),
        ("postgresql://h:5432/db?application_name=a@b", "postgresql://h:5432/db?application_name=a@b"),
        ("postgresql://u@[::1]:5432/db", "postgresql://u@[::1]:5432/db"),
        ("host=h password=hunter2 dbname=d", "host=h password=*** dbname=d"),
        ("host=h password = 'a \\'hunter2' dbname=d", "host=h password = *** dbname=d"),
        ("password=a\\ hunter2 host=h", "password=*** host=h"),
        ("password=''host=h", "password=***host=h"),
        ("host=h PassWord=hunter2", "host=h PassWord=***"),
        ("sslpassword=hunter2 passfile=/etc/p", "sslpassword=*** passfile=/etc/p"),
        ("dbname=postgresql://u:hunter2@h/db host=x", "dbname=postgresql://u:***@h/db host=x"),
        ("password='hunter2 host=h", "password=***"),
        ("host=h password=a'hunter2\\", "host=h password=***"),
        ("Server=x;User Id=y;Password=hunter2;", "Server=x;User Id=y;Password=***"),
        ("u:hunter2@h/db", "u:***@h/db"),
        ("u:hunter2@h/db?next=http://x", "u:***@h/db?next=http://x"),
        ("embedded:///srv/a:b@c", "embedded:///srv/a:b@c"),
        ("", ""),
    ],
)
def test_redact_hides_the_password_and_nothing_else(url: str, shown: str) -> None:
    assert redact(url) == shown


# A marker that no other part of a URL contains, with all that URLs and keyword strings treat specially around it.
passwords = st.text(st.sampled_from("aZ0 %:@/?#&=;'\\+[],é€"), max_size=12).map(lambda text: f"{text}HUNTER2{text}")


@settings(deadline=None)
@given(passwords)
def test_no_encoded_password_is_shown(password: str) -> None:
    url = f"postgresql://u:{quote(password, safe='')}@h/db?password={quote(password, safe='')}&sslmode=disable"
    assert parse_dsn(url)["password"] == password
    assert parse_dsn(redact(url)) == {**parse_dsn(url), "password": "***"}


@settings(deadline=None)
@given(passwords)
def test_no_quoted_password_is_shown(password: str) -> None:
    dsn = make_dsn(host="h", password=password, dbname="d")
    assert parse_dsn(redact(dsn)) == {**parse_dsn(dsn), "password": "***"}


@settings(deadline=None)
@given(passwords.filter(lambda text: not set(text) & set("@/")))
def test_no_password_that_somebody_forgot_to_encode_is_shown(password: str) -> None:
    assert "HUNTER2" not in redact(f"postgresql://u:{password}@h/db")


@settings(deadline=None)
@given(st.text(st.sampled_from("abp=:/@?&;' \\%\0\n[]") | st.characters()))
@example("password=" * 1000)
@example("a=" * 100_000)
@example("\ud800")
def test_redact_takes_any_text(text: str) -> None:
    assert isinstance(redact(text), str)


def test_redact_takes_what_is_no_text_at_all() -> None:
    assert redact(None) == "None"  # type: ignore[arg-type]  # loggers hand over whatever they have


def test_the_repr_of_settings_shows_no_password() -> None:
    shown = repr(load(database_url="postgresql://u:hunter2@h/db", session_url="host=h password=hunter2"))
    assert "hunter2" not in shown
    assert "postgresql://u:***@h/db" in shown


# The project's folder


def test_the_project_is_where_the_section_is(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, "setup.cfg", "[greenjobs]\n")
    inner = project / "package"
    inner.mkdir()
    write(inner, "setup.py", "")
    monkeypatch.chdir(inner)
    assert project_folder() == load().project_folder == project


@pytest.mark.parametrize("mark", ["setup.cfg", "pyproject.toml", "setup.py", ".git"])
def test_without_a_section_the_project_is_the_nearest_folder_that_looks_like_one(
    mark: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(project, mark, "")
    inner = project / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert project_folder() == load().project_folder == project


def test_a_folder_that_looks_like_no_project_is_one_itself(project: Path) -> None:
    assert project_folder() == project


# Settings of the process


def test_the_settings_of_the_process_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = config.current()
    monkeypatch.setenv("GREENJOBS_POOL", "7")
    assert config.current() is first


def test_configure_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENJOBS_POOL", "7")
    config.configure(pool=3)
    assert config.current().pool == 3


def test_configure_replaces_what_was_configured_and_loaded_before() -> None:
    config.configure(pool=3)
    config.current()
    config.configure(max_retries=1)
    assert (config.current().pool, config.current().max_retries) == (50, 1)


@pytest.mark.parametrize(("arguments", "error"), [({"pool": 0}, ConfigError), ({"poool": 1}, TypeError)])
def test_configure_refuses_wrong_arguments_at_once_and_keeps_the_former(
    arguments: dict[str, object], error: type[Exception]
) -> None:
    config.configure(pool=3)
    with pytest.raises(error):
        config.configure(**arguments)
    assert config.current().pool == 3


IN_THREADS = """
import threading
from greenjobs import config

start = threading.Barrier(16)
seen = []

def ask():
    start.wait(timeout=30)
    seen.append(config.current())

threads = [threading.Thread(target=ask) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(timeout=30)
print(len(seen), len({id(each) for each in seen}))
"""


def test_threads_that_ask_at_the_same_time_get_the_same_settings() -> None:
    """In a process of its own: in this one gevent may have made greenlets of the threads."""
    command = [sys.executable, "-c", IN_THREADS]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "16 1\n"
