"""Bringing tables up to date: on nothing, on what is there, on the table of the crate, and by many at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import gevent
import processes
import psycopg2
import psycopg2.errors
import pytest
import running
from psycopg2 import extensions
from waiting import eventually

from greenjobs import job, migrate
from greenjobs.errors import DatabaseUnavailable, SchemaError
from greenjobs.runner import Runner

_LABELS = [migration.label for migration in migrate.load()]

# As the crate's own migration makes it.
_CRATES_TABLE = """
CREATE TABLE background_jobs (
    id BIGSERIAL PRIMARY KEY,
    job_type TEXT NOT NULL,
    data JSONB NOT NULL,
    retries INTEGER NOT NULL DEFAULT 0,
    last_retry TIMESTAMP NOT NULL DEFAULT '1970-01-01',
    created_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    priority SMALLINT NOT NULL DEFAULT 0
)
"""


@pytest.fixture
def database(empty_database_url: str) -> Iterator[running.Database]:
    """Without any table."""
    with running.application(empty_database_url) as database:
        yield database


def _tables(database: running.Database) -> list[str]:
    return database.column(
        "SELECT schemaname || '.' || tablename FROM pg_tables WHERE tablename LIKE 'background%' ORDER BY 1"
    )


def in_schema(url: str, schema: str) -> str:
    """The same database with another schema in the search path; in libpq's other form, too."""
    return str(extensions.make_dsn(url, options=f"-csearch_path={schema}"))


# --- on an empty database ---------------------------------------------------------------------------------------------


def test_migrate_applies_every_file_in_order(database: running.Database) -> None:
    assert migrate.migrate(database.url) == _LABELS
    assert database.column("SELECT version FROM background_migrations ORDER BY applied_at, version") == list(
        range(1, len(_LABELS) + 1)
    )


def test_migrate_again_does_nothing(database: running.Database) -> None:
    migrate.migrate(database.url)

    assert migrate.migrate(database.url) == []


def test_pending_names_what_migrate_would_apply_and_changes_nothing(database: running.Database) -> None:
    assert [migration.label for migration in migrate.pending(database.url)] == _LABELS
    assert _tables(database) == []


def test_nothing_is_pending_after_migrate(database: running.Database) -> None:
    migrate.migrate(database.url)

    assert migrate.pending(database.url) == []


def test_eight_at_once_apply_every_file_once(database: running.Database) -> None:
    migrators = [gevent.spawn(migrate.migrate, database.url) for _ in range(8)]
    gevent.joinall(migrators, timeout=running.PATIENCE_SECONDS, raise_error=True)

    assert sorted(label for migrator in migrators for label in migrator.value) == _LABELS
    assert migrate.pending(database.url) == []


def test_two_processes_at_once_apply_every_file_once(tmp_path: Path, database: running.Database) -> None:
    with (
        processes.start("greenjobs", "migrate", folder=tmp_path, database_url=database.url) as one,
        processes.start("greenjobs", "migrate", folder=tmp_path, database_url=database.url) as two,
    ):
        assert (one.wait(), two.wait()) == (0, 0)
        said = one.output + two.output
    assert [said.count(f"applied {label}") for label in _LABELS] == [1] * len(_LABELS)


def test_migrator_that_is_killed_leaves_no_lock_behind(database: running.Database) -> None:
    """It dies while it waits for the table, in the middle of a file."""
    database.rows(_CRATES_TABLE)
    holder = psycopg2.connect(database.url)
    holder.cursor().execute("LOCK TABLE background_jobs")
    victim = gevent.spawn(migrate.migrate, database.url)
    eventually(lambda: "greenjobs migrate" in database.sessions(), "nobody migrates")
    waits = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    eventually(lambda: database.column(waits), "nobody waits")
    victim.kill()
    holder.close()

    assert migrate.migrate(database.url) == _LABELS


# --- what should not be -----------------------------------------------------------------------------------------------


def test_edited_file_is_noticed_and_named(database: running.Database) -> None:
    migrate.migrate(database.url)
    database.rows("UPDATE background_migrations SET checksum = 'another' WHERE version = 1")

    with pytest.raises(SchemaError, match=rf"{_LABELS[0]}\.sql was changed after it was applied"):
        migrate.migrate(database.url)


def test_check_notices_an_edited_file_too(database: running.Database) -> None:
    migrate.migrate(database.url)
    database.rows("UPDATE background_migrations SET checksum = 'another' WHERE version = 1")

    with pytest.raises(SchemaError, match="was changed"):
        migrate.pending(database.url)


def test_checksum_is_blind_to_the_line_ends_of_a_checkout() -> None:
    unix = migrate.Migration(1, "x", "SELECT 1;\nSELECT 2;\n")
    windows = migrate.Migration(1, "x", "SELECT 1;\r\nSELECT 2;\r\n")

    assert unix.checksum == windows.checksum


def test_runner_on_an_unmigrated_database_says_what_to_type(database: running.Database) -> None:
    @job
    def work() -> None: ...

    with pytest.raises(SchemaError, match=rf"{_LABELS[0]}.*`greenjobs migrate`.*`greenjobs run --migrate`"):
        Runner().register(work).start()


def test_file_that_fails_is_rolled_back_and_the_next_try_succeeds(database: running.Database) -> None:
    """Somebody's table is in the way of the second half of the first file."""
    database.rows("CREATE TABLE background_waiting (mine INTEGER)")

    with pytest.raises(psycopg2.errors.DuplicateTable, match="background_waiting"):
        migrate.migrate(database.url)
    left = _tables(database)
    database.rows("DROP TABLE background_waiting")

    assert "public.background_jobs" not in left
    assert migrate.migrate(database.url) == _LABELS


def test_foreign_table_of_the_same_name_is_left_as_it_is(database: running.Database) -> None:
    database.rows("CREATE TABLE background_jobs (name TEXT); INSERT INTO background_jobs VALUES ('mine')")

    with pytest.raises(psycopg2.Error):
        migrate.migrate(database.url)

    assert database.rows("SELECT * FROM background_jobs") == [("mine",)]


def test_migrate_says_that_the_server_is_not_there() -> None:
    with pytest.raises(DatabaseUnavailable, match="cannot connect"):
        migrate.migrate(f"postgresql://127.0.0.1:{processes.free_port()}/shop")


def test_register_of_a_state_before_the_first_release_says_what_to_do(database: running.Database) -> None:
    migrate.migrate(database.url)
    database.rows("ALTER TABLE background_migrations DROP COLUMN needs")

    for look in (migrate.migrate, migrate.pending):
        with pytest.raises(SchemaError, match=r"column \"needs\" does not exist.*: (ALTER TABLE .*)") as raised:
            look(database.url)
    database.rows(str(raised.value).rpartition("before its first release: ")[2])

    assert migrate.migrate(database.url) == []


# --- a later release has been here ------------------------------------------------------------------------------------


def _migrate_further(database: running.Database, *, needs: int = 1) -> None:
    """Leave what a later release leaves."""
    migrate.migrate(database.url)
    database.rows(
        "INSERT INTO background_migrations (version, name, checksum, needs) VALUES (9998, 'later', 'x', 1),"
        " (9999, 'last', 'x', %s)",
        needs,
    )


_NEXT = len(_LABELS) + 1


def test_there_is_nothing_to_migrate_where_a_later_release_has_been(database: running.Database) -> None:
    _migrate_further(database, needs=len(_LABELS))

    assert migrate.migrate(database.url) == []
    assert migrate.standing(database.url) == migrate.Standing([], ["9998_later", "9999_last"])


def test_later_release_that_needs_more_than_this_one_knows_is_an_error(database: running.Database) -> None:
    _migrate_further(database, needs=_NEXT)

    for look in (migrate.migrate, migrate.pending):
        with pytest.raises(SchemaError, match=rf"know migration {_NEXT:04}, and .* knows is {_NEXT - 1:04}; install"):
            look(database.url)


def test_runner_works_on_tables_that_a_later_release_has_migrated_and_warns_once(
    database: running.Database, caplog: pytest.LogCaptureFixture
) -> None:
    ran = []

    @job
    def work() -> None:
        ran.append(1)

    _migrate_further(database)
    work.delay()
    running.work_off(work)

    assert ran == [1]
    [warning] = [record.getMessage() for record in caplog.records if record.name == "greenjobs.runner"]
    assert warning == (
        "a later release has migrated the database (9998_later, 9999_last); this one works with that until it is "
        "replaced"
    )


def test_runner_refuses_tables_that_need_a_later_release(database: running.Database) -> None:
    _migrate_further(database, needs=_NEXT)

    @job
    def work() -> None: ...

    with pytest.raises(SchemaError, match="works only with those that know migration"):
        Runner().register(work).start()


def test_edited_file_is_noticed_where_a_later_release_has_been_too(database: running.Database) -> None:
    _migrate_further(database)
    database.rows("UPDATE background_migrations SET checksum = 'another' WHERE version = 1")

    with pytest.raises(SchemaError, match="was changed"):
        migrate.migrate(database.url)


def test_gap_before_what_a_later_release_has_applied_is_left_to_that_one(database: running.Database) -> None:
    _migrate_further(database)
    database.rows("DELETE FROM background_migrations WHERE version = %s", len(_LABELS))

    with pytest.raises(SchemaError, match=rf"lacks {_LABELS[-1]}, but .* \(9998_later, 9999_last\); migrate with that"):
        migrate.migrate(database.url)


def test_runner_of_the_former_release_is_started_while_the_next_one_is_rolled_out(
    tmp_path: Path, database: running.Database
) -> None:
    """The next release is this one with one more migration; then with one that this release cannot work with."""
    later = tmp_path / "later"
    for name in ("greenjobs", "migrations"):
        shutil.copytree(processes.ROOT / name, later / name, ignore=shutil.ignore_patterns("__pycache__"))
    project = tmp_path / "project"
    project.mkdir()
    processes.write_application(project, "from greenjobs import job\n\n@job\ndef work(): ...\n")

    def migrate_further(version: int, opening: str) -> str:
        sql = f"{opening}\nALTER TABLE background_jobs ADD COLUMN added_{version} TEXT;\n"
        (later / "migrations" / f"{version:04}_more.sql").write_text(sql, "utf-8")
        return processes.run("python", "-m", "greenjobs", "migrate", folder=later, database_url=database.url)

    def run(*, status: int = 0) -> str:
        options = ("--migrate", "--until-empty")
        return processes.run("greenjobs", "run", *options, folder=project, database_url=database.url, status=status)

    assert migrate_further(_NEXT, "-- Why: more.").splitlines()[-1] == f"applied {_NEXT:04}_more"
    database.rows("INSERT INTO background_jobs (job_type, queue, data) VALUES ('work', 'default', '{}')")
    said = run()
    assert f"a later release has migrated the database ({_NEXT:04}_more)" in said
    assert database.count() == 0

    migrate_further(_NEXT + 1, f"-- greenjobs: needs {_NEXT:04}")
    assert f"those that know migration {_NEXT:04}, and the last one that this one knows is {_NEXT - 1:04}" in run(
        status=2
    )


def test_every_migration_says_whether_the_former_release_runs_on() -> None:
    """In words, or in the line that keeps it from starting."""
    for migration in migrate.load()[1:]:
        says_so = "previous release runs on" in " ".join(migration.sql.replace("--", "").split())
        assert says_so == (migration.needs == 1), migration.label
        assert 1 <= migration.needs <= migration.version


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_file_that_needs_a_later_release_says_so_in_a_line_of_its_own(end: str) -> None:
    assert migrate.Migration(9, "x", f"-- Why{end}-- greenjobs: needs 0008{end}SELECT 1;{end}").needs == 8
    assert migrate.Migration(9, "x", f"-- It is not so that -- greenjobs: needs 0008{end}SELECT 1;{end}").needs == 1


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_printed_sql_leaves_a_database_that_is_up_to_date(tmp_path: Path, database: running.Database) -> None:
    script = processes.run("greenjobs", "migrate", "--sql", folder=tmp_path)

    database.rows(script)

    assert migrate.pending(database.url) == []


def test_printed_sql_makes_the_same_tables_as_migrate(database: running.Database) -> None:
    database.rows("CREATE SCHEMA one; CREATE SCHEMA two")
    migrate.migrate(in_schema(database.url, "one"))
    database.rows(f"SET search_path = two; {migrate.as_sql()}; SET search_path = public")

    def columns(schema: str) -> list[tuple[str, ...]]:
        return database.rows(
            "SELECT table_name, column_name, data_type, is_nullable, replace(column_default, %s, '')"
            " FROM information_schema.columns WHERE table_schema = %s ORDER BY 1, ordinal_position",
            f"{schema}.",
            schema,
        )

    def indexes(schema: str) -> list[str]:
        return database.column(
            "SELECT replace(indexdef, %s, '') FROM pg_indexes WHERE schemaname = %s ORDER BY 1", f"{schema}.", schema
        )

    assert columns("one") == columns("two") != []
    assert indexes("one") == indexes("two") != []
    record = "SELECT version, name, checksum, needs FROM {}.background_migrations ORDER BY version"
    assert database.rows(record.format("one")) == database.rows(record.format("two")) != []


def test_printed_sql_applied_twice_changes_nothing_the_second_time(database: running.Database) -> None:
    database.rows(migrate.as_sql())
    database.rows("INSERT INTO background_jobs (job_type, data) VALUES ('work', '{}')")

    with pytest.raises(psycopg2.Error):
        database.rows(migrate.as_sql())
    database.rows("ROLLBACK")

    assert database.count() == 1
    assert migrate.pending(database.url) == []


# --- the crate's table ------------------------------------------------------------------------------------------------


def _adopt(database: running.Database, *rows: str) -> None:
    """The crate's table with these values of (job_type, data, retries, last_retry, created_at, priority), adopted."""
    database.rows(_CRATES_TABLE)
    if rows:
        database.rows(
            "INSERT INTO background_jobs (job_type, data, retries, last_retry, created_at, priority) VALUES "
            + ", ".join(rows)
        )
    migrate.migrate(database.url)


def test_adoption_keeps_every_row_with_its_id_and_its_values(database: running.Database) -> None:
    _adopt(
        database,
        """('index', '{"name": "serde"}', 0, '1970-01-01', '2024-02-29 12:30:00.123456', 5)""",
        """('squash', 'null', 7, '2024-03-01 00:00:00', '2024-02-29 12:30:00', -100)""",
        """('typosquat', '{}', 2147483647, '2024-03-01', '2024-02-29', 32767)""",
    )

    columns = "id, job_type, data, retries, last_retry, created_at, priority, queue, state, crashes, errors"
    utc = timezone.utc
    assert database.rows(f"SELECT {columns} FROM background_jobs ORDER BY id") == [
        (1, "index", {"name": "serde"}, 0, datetime(1970, 1, 1, tzinfo=utc))
        + (datetime(2024, 2, 29, 12, 30, 0, 123_456, tzinfo=utc), 5, None, "available", 0, None),
        (2, "squash", None, 7, datetime(2024, 3, 1, tzinfo=utc))
        + (datetime(2024, 2, 29, 12, 30, tzinfo=utc), -100, None, "available", 0, None),
        (3, "typosquat", {}, 2_147_483_647, datetime(2024, 3, 1, tzinfo=utc))
        + (datetime(2024, 2, 29, tzinfo=utc), 32_767, None, "available", 0, None),
    ]


def test_adopted_row_of_the_lowest_priority_is_the_lowest_that_is_allowed(database: running.Database) -> None:
    _adopt(database, "('a', '{}', 0, '1970-01-01', now(), -32768)", "('b', '{}', 0, '1970-01-01', now(), -32767)")

    assert database.column("SELECT priority FROM background_jobs") == [-32_767] * 2


def test_adoption_goes_on_where_the_ids_were(database: running.Database) -> None:
    _adopt(database, "('a', '{}', 0, '1970-01-01', now(), 0)", "('b', '{}', 0, '1970-01-01', now(), 0)")

    assert database.value("INSERT INTO background_jobs (job_type, data) VALUES ('c', '{}') RETURNING id") == 3


def test_adopted_empty_table_is_up_to_date(database: running.Database) -> None:
    _adopt(database)

    assert migrate.pending(database.url) == []


def test_adoption_of_ten_thousand_rows_loses_none(database: running.Database) -> None:
    database.rows(_CRATES_TABLE)
    database.rows(
        "INSERT INTO background_jobs (job_type, data, priority)"
        " SELECT 'work', jsonb_build_object('number', n), n %% 7 FROM generate_series(1, 10000) AS n".replace("%%", "%")
    )
    migrate.migrate(database.url)

    assert (
        database.value("SELECT count(DISTINCT data->'number') FROM background_jobs WHERE id = (data->>'number')::int")
        == 10_000
    )


def test_adopted_rows_are_run(database: running.Database) -> None:
    ran = []

    @job
    def index(name: str) -> None:
        ran.append(name)

    @job
    def squash() -> None:
        """As of a unit struct, which serde writes as null."""
        ran.append("squash")

    _adopt(
        database,
        """('squash', 'null', 0, '1970-01-01', '2024-02-29', -32768)""",
        """('index', '{"name": "a"}', 0, '1970-01-01', '2024-02-29', 0)""",
        """('index', '{"name": "b"}', 3, '2024-03-01', '2024-02-29', 7)""",
    )
    running.work_off(index, squash, pool=1)

    assert ran == ["b", "a", "squash"]
    assert database.count() == 0


def test_the_crate_goes_on_inserting_into_an_adopted_table(database: running.Database) -> None:
    ran = []

    @job(queue="indexing")
    def index(name: str) -> None:
        ran.append(name)

    _adopt(database)
    database.rows("""INSERT INTO background_jobs (job_type, data, priority) VALUES ('index', '{"name": "new"}', 1)""")
    running.work_off(index)

    assert ran == ["new"]


def test_row_of_the_lowest_smallint_is_refused_by_the_table(database: running.Database) -> None:
    _adopt(database)

    with pytest.raises(psycopg2.errors.CheckViolation, match="background_jobs_priority"):
        database.rows("INSERT INTO background_jobs (job_type, data, priority) VALUES ('a', '{}', -32768)")


# --- schemas ----------------------------------------------------------------------------------------------------------


def test_search_path_decides_the_schema(database: running.Database) -> None:
    database.rows("CREATE SCHEMA jobs")
    migrate.migrate(in_schema(database.url, "jobs"))

    assert {table.partition(".")[0] for table in _tables(database)} == {"jobs"}
    assert migrate.pending(in_schema(database.url, "jobs")) == []
    assert migrate.pending(database.url) != []


def test_search_path_without_an_existing_schema_is_an_error(database: running.Database) -> None:
    with gevent.Timeout(10), pytest.raises(SchemaError, match="search_path"):
        migrate.migrate(in_schema(database.url, "nowhere"))


def test_adoption_takes_the_table_of_its_own_schema_only(database: running.Database) -> None:
    database.rows(f"CREATE SCHEMA jobs; {_CRATES_TABLE}")
    migrate.migrate(in_schema(database.url, "jobs"))

    columns = "SELECT count(*) FROM information_schema.columns WHERE table_schema = %s AND table_name = %s"
    assert database.value(columns, "public", "background_jobs") == 7


def test_jobs_of_two_schemas_in_one_database_are_run_apart(database: running.Database) -> None:
    """Each has a runner 1 of its own; the one at work must not be taken for the dead one of the other."""
    database.rows("CREATE SCHEMA one; CREATE SCHEMA two")
    urls = [in_schema(database.url, schema) for schema in ("one", "two")]
    ran: dict[str, list[int]] = {"one": [], "two": []}

    @job
    def work(number: int) -> None:
        from greenjobs import current_job

        ran[current_job.context].append(number)

    for url in urls:
        migrate.migrate(url)
    runners = [Runner(url, context=schema).register(work) for url, schema in zip(urls, ran, strict=True)]
    with running.started(runners[0]) as one, running.started(runners[1]) as two:
        assert (one.runner_id, two.runner_id) == (1, 1)
        for schema, number in (("one", 1), ("two", 2)):
            database.rows(
                f"INSERT INTO {schema}.background_jobs (job_type, queue, data)"
                f""" VALUES ('work', 'default', '{{"number": {number}}}')"""
            )
        eventually(lambda: ran["one"] and ran["two"], "the jobs did not run")

    assert ran == {"one": [1], "two": [2]}


def test_dead_runner_is_found_dead_while_one_of_the_same_id_lives_in_another_schema(
    database: running.Database,
) -> None:
    database.rows("CREATE SCHEMA one; CREATE SCHEMA two")
    urls = [in_schema(database.url, schema) for schema in ("one", "two")]
    ran = []

    @job
    def work() -> None:
        ran.append(1)

    for url in urls:
        migrate.migrate(url)
    with running.started(Runner(urls[0]).register(work)) as alive:
        database.rows(
            "INSERT INTO two.background_runners (hostname, pid, version, queues, job_types)"
            " VALUES ('gone', 1, '0', '{}', '{}')"
        )
        assert alive.runner_id == database.value("SELECT id FROM two.background_runners") == 1
        database.rows(
            "INSERT INTO two.background_jobs (job_type, queue, data, state, attempt, claimed_by, claimed_at)"
            " VALUES ('work', 'default', '{}', 'running', 1, 1, now())"
        )
        running.work_off(work, database_url=urls[1])

    assert ran == [1]
