"""`greenjobs doctor`: what it says of databases that were set up wrongly, and of jobs that nobody can run."""

from __future__ import annotations

import dataclasses
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import date

import databases
import poolers
import pytest
import running
from doctors import finding, findings
from faults.server import new_server, workshop
from gevent.event import Event
from psycopg2 import errors
from waiting import eventually

import greenjobs
from greenjobs import config, grants, job
from greenjobs.doctor import Limits, examine
from greenjobs.runner import Runner

PATIENCE_SECONDS = 30.0


@dataclasses.dataclass
class Person:
    name: str

    def __post_init__(self) -> None:
        raise RuntimeError(f"{self.name} is not welcome")


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        yield database


def set_for_database(database: running.Database, setting: str) -> None:
    """As sessions that begin from now on have it."""
    database.rows(f'ALTER DATABASE "{database.value("SELECT current_database()")}" SET {setting}')


def enqueue(database: running.Database, job_type: str, data: str = "{}", *, queue: str = "default") -> int:
    sql = "INSERT INTO background_jobs (job_type, data, queue) VALUES (%s, %s, %s) RETURNING id"
    return int(database.value(sql, job_type, data, queue))


# --- the way there ----------------------------------------------------------------------------------------------------


def test_host_that_nobody_knows_is_told_by_its_name() -> None:
    found = finding("connection", url="postgresql://somebody:secret@no-such-host.invalid/jobs")
    assert found.level == "fail"
    assert "cannot be looked up: no-such-host.invalid" in found.message
    assert "secret" not in found.message


def test_server_that_stays_silent_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = findings(
            "schema", url=f"postgresql://127.0.0.1:{silent.getsockname()[1]}/jobs", limits=Limits(connect_seconds=0.5)
        )
    assert found["connection"].level == "fail"
    assert "no answer within 0.5 s" in found["connection"].message
    assert found["schema"].message == "see 'connection'"


def test_server_that_goes_away_meanwhile_is_not_waited_for_by_every_check(database: running.Database) -> None:
    with poolers.in_front_of(database.url) as url:
        found = examine(config.load(database_url=url))
        assert any(each.name == "writes" and each.level == "ok" for each in found)
    rest = list(found)
    failed = [each.name for each in rest if each.level == "fail"]
    assert failed == ["isolation", "encoding"]
    assert rest[2].message == "the database does not answer any more"
    assert {each.level for each in rest[2:]} == {"skipped"}


def test_database_that_takes_no_writes_is_a_failure(database: running.Database) -> None:
    set_for_database(database, "default_transaction_read_only = on")
    assert finding("writes").level == "fail"


def test_other_isolation_is_a_warning(database: running.Database) -> None:
    set_for_database(database, "default_transaction_isolation = 'serializable'")
    assert "'serializable'" in finding("isolation").message
    assert finding("isolation").level == "warn"


def test_other_encoding_is_a_warning(server_url: str) -> None:
    name = f"greenjobs_test_{uuid.uuid4().hex}"
    with databases.administration(server_url) as cursor:
        cursor.execute(f"CREATE DATABASE \"{name}\" TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
        try:
            assert finding("encoding", url=databases.with_database(server_url, name)).level == "warn"
        finally:
            cursor.execute(f'DROP DATABASE "{name}"')


def test_commit_that_does_not_wait_for_the_disk_is_a_warning(database: running.Database) -> None:
    set_for_database(database, "synchronous_commit = off")
    assert finding("durability").level == "warn"
    assert "synchronous_commit" in finding("durability").message


def test_examination_changes_nothing(database: running.Database) -> None:
    """Its sessions may not even write, where no pooler is in between."""
    from greenjobs.doctor.case import Application, Case

    case = Case(config.current(), Application(), Limits())
    with pytest.raises(errors.ReadOnlySqlTransaction), case.connection().cursor() as cursor:
        cursor.execute("DELETE FROM background_jobs")
    case.close()


def test_examination_leaves_no_connection_behind(database: running.Database) -> None:
    findings()
    eventually(lambda: "greenjobs doctor" not in database.sessions(), "its connections are closed")


# --- the tables -------------------------------------------------------------------------------------------------------


def test_tables_of_an_older_release_are_a_failure_and_what_reads_them_is_skipped(database: running.Database) -> None:
    database.rows("DELETE FROM background_migrations WHERE version = (SELECT max(version) FROM background_migrations)")
    database.rows("DROP TABLE background_queues")
    found = findings()
    assert found["schema"].level == "fail"
    assert "the database lacks 00" in found["schema"].message
    assert "type `greenjobs migrate`" in str(found["schema"].remedy)
    assert (found["queues"].level, found["queues"].message) == ("skipped", "see 'schema'")
    assert found["autovacuum"].level == "ok"


def test_empty_database_has_one_failure(empty_database_url: str) -> None:
    found = findings(url=empty_database_url)
    failed = [name for name, each in found.items() if each.level == "fail" and each.area == "database"]
    assert failed == ["schema"]


def test_tables_of_a_later_release_are_a_warning_and_a_failure_if_this_one_does_not_work_with_them(
    database: running.Database,
) -> None:
    database.rows("INSERT INTO background_migrations (version, name, checksum) VALUES (9999, 'later', 'x')")
    found = findings()
    assert found["schema"].level == "warn"
    assert found["schema"].message == "a later release has applied 9999_later; this one works with that"
    assert found["queues"].level == "ok"
    database.rows("UPDATE background_migrations SET needs = 9999 WHERE version = 9999")
    assert finding("schema").level == "fail"
    assert str(finding("schema").remedy) == "install that release, or a later one"


def test_migration_that_was_edited_is_a_failure(database: running.Database) -> None:
    database.rows("UPDATE background_migrations SET checksum = 'another' WHERE version = 1")
    assert "was changed after it was applied" in finding("schema").message


def test_check_that_raises_is_a_failure_and_the_others_go_on(database: running.Database) -> None:
    database.rows("DROP TABLE background_queues")
    found = findings(jobs=True)
    assert found["schema"].level == "ok"
    assert (found["queues"].level, found["failed jobs"].level) == ("fail", "ok")
    assert 'relation "background_queues" does not exist' in found["queues"].message


def test_table_that_somebody_locks_is_not_waited_for(database: running.Database) -> None:
    with databases.administration(database.url) as cursor:
        cursor.execute("BEGIN; LOCK TABLE background_jobs IN ACCESS EXCLUSIVE MODE")
        found = finding("failed jobs")
    assert (found.level, "lock timeout" in found.message) == ("fail", True)


def test_index_that_is_missing_is_a_failure(database: running.Database) -> None:
    database.rows("DROP INDEX background_jobs_available")
    assert "missing: background_jobs_available" in finding("indexes").message


def test_index_that_is_invalid_is_a_failure(database: running.Database) -> None:
    database.rows("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'background_jobs_unique'::regclass")
    assert "REINDEX INDEX CONCURRENTLY background_jobs_unique" in str(finding("indexes").remedy)


def test_table_that_is_not_logged_is_a_failure(database: running.Database) -> None:
    database.rows("ALTER TABLE background_history SET UNLOGGED")
    assert "ALTER TABLE background_history SET LOGGED" in str(finding("tables").remedy)


def test_list_of_who_waits_need_not_be_logged(database: running.Database) -> None:
    database.rows("ALTER TABLE background_waiting SET LOGGED")
    assert finding("tables").level == "warn"


def test_autovacuum_that_was_turned_off_for_a_table_is_a_failure(database: running.Database) -> None:
    database.rows("ALTER TABLE background_jobs SET (autovacuum_enabled = false)")
    assert "ALTER TABLE background_jobs RESET (autovacuum_enabled)" in str(finding("autovacuum").remedy)


def test_options_that_a_copy_has_lost_are_a_warning(database: running.Database) -> None:
    database.rows("ALTER TABLE background_jobs RESET (autovacuum_vacuum_scale_factor)")
    assert finding("autovacuum").level == "warn"


def test_rows_that_vacuum_leaves_lying_are_a_warning(database: running.Database) -> None:
    database.rows("ALTER TABLE background_jobs SET (autovacuum_enabled = false)")
    with databases.administration(database.url) as cursor:  # whose end lets the server count what it did
        cursor.execute("INSERT INTO background_jobs (job_type, data) SELECT 'gone', '{}' FROM generate_series(1, 3)")
        cursor.execute("DELETE FROM background_jobs")
    limits = Limits(dead_rows=0.0)
    found = eventually(
        lambda: each if (each := finding("dead rows", limits=limits)).level == "warn" else None,
        "the server counts dead rows a moment later",
        seconds=PATIENCE_SECONDS,
    )
    assert "background_jobs has 3 dead rows beside 0; vacuum came last never" in found.message


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_transaction_that_holds_vacuum_up_is_told_without_its_query(database: running.Database) -> None:
    with databases.administration(database.url) as cursor:
        cursor.execute("SET application_name = 'forgotten'")
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 'confidential'")
        pid = cursor.connection.info.backend_pid
        found = finding("snapshots", limits=Limits(snapshot_seconds=0))
        calm = finding("snapshots")
    assert found.level == "warn"
    assert f"session pid {pid} of " in found.message
    assert "(forgotten)" in found.message
    assert "confidential" not in found.message
    assert (calm.level, str(pid) in calm.message) == ("ok", True)


def test_role_that_may_not_see_the_age_of_a_transaction_is_told_by_transactions(
    database: running.Database, limited_role: str
) -> None:
    with databases.administration(database.url) as cursor:
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        pid = cursor.connection.info.backend_pid
        database.rows("SELECT txid_current()")
        database.rows("SELECT txid_current()")
        url = as_role(database.url, limited_role)
        calm = finding("snapshots", url=url, limits=Limits(snapshot_seconds=0))
        found = finding("snapshots", url=url, limits=Limits(snapshot_transactions=1))
    assert (calm.level, found.level) == ("ok", "warn")
    assert f"pid {pid}" in found.message


@pytest.fixture(scope="module")
def busy_server() -> Iterator[str]:
    """A server that is reached by TCP, at a port of its own, and lets transactions be prepared."""
    with workshop() as folder:
        server = new_server(folder / "server", listen_addresses="127.0.0.1", max_prepared_transactions="2")
        try:
            server.start()
            yield server.url
        finally:
            server.end()


def test_prepared_transaction_that_was_forgotten_is_told(busy_server: str) -> None:
    with databases.administration(busy_server) as cursor:
        cursor.execute("BEGIN; CREATE TEMPORARY TABLE x (); DROP TABLE x; SELECT txid_current()")
        cursor.execute("ROLLBACK")
        cursor.execute("CREATE TABLE IF NOT EXISTS notes (note text)")
        cursor.execute("BEGIN; INSERT INTO notes VALUES ('x'); PREPARE TRANSACTION 'half done'")
        try:
            found = finding("snapshots", url=busy_server, limits=Limits(snapshot_seconds=0))
        finally:
            cursor.execute("ROLLBACK PREPARED 'half done'")
    assert (found.level, "prepared transaction half done" in found.message) == ("warn", True)


# --- rights -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def limited_role(database: running.Database) -> Iterator[str]:
    """The name of a role that may do nothing yet."""
    role = f"greenjobs_test_{uuid.uuid4().hex}"
    database.rows(f"CREATE ROLE {role}")
    try:
        yield role
    finally:
        database.rows(f"DROP OWNED BY {role}")
        database.rows(f"DROP ROLE {role}")


def as_role(url: str, role: str) -> str:
    from psycopg2 import extensions

    return str(extensions.make_dsn(url, options=f"-c role={role}"))


def grant_all(database: running.Database, role: str) -> None:
    with database.connection.cursor() as cursor:
        grants.give(cursor, [grants.Grant("run", role)])


def test_rights_that_are_missing_are_named(database: running.Database, limited_role: str) -> None:
    grant_all(database, limited_role)
    database.rows(f"REVOKE DELETE ON background_jobs FROM {limited_role}")
    database.rows(f"REVOKE USAGE ON SEQUENCE background_runners_id_seq FROM {limited_role}")
    found = finding("rights", url=as_role(database.url, limited_role))
    assert found.level == "fail"
    assert f"{limited_role} lacks DELETE on background_jobs; USAGE on public.background_runners_id_seq" in found.message


def test_role_with_the_rights_that_are_asked_for_can_run_jobs(database: running.Database, limited_role: str) -> None:
    grant_all(database, limited_role)
    url = as_role(database.url, limited_role)
    assert finding("rights", url=url).level == "ok"
    ran = []

    @job(unique=True, until=60, keep="1h", cron="0 0 1 1 *", max_retries=0)
    def greet(name: str = "Ann") -> None:
        ran.append(name)

    greenjobs.configure(database_url=url)
    greet.delay()
    greenjobs.queues.pause("default")
    greenjobs.queues.resume("default")
    running.work_off(greet)
    assert ran == ["Ann"]
    assert database.value("SELECT count(*) FROM background_history") == 1


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_pooler_in_transaction_mode_is_found_out(database: running.Database) -> None:
    with poolers.in_front_of(database.url) as url:
        found = findings("session", "notify", "connections", url=url)
    assert found["session"].level == "warn"
    assert "a pooler is in between, in transaction mode: " in found["session"].message
    assert "session_url" in str(found["session"].remedy)
    assert (found["notify"].level, found["connections"].level) == ("skipped", "skipped")


def test_pooler_that_keeps_sessions_is_found_out(database: running.Database) -> None:
    with poolers.in_front_of(database.url, keeps_sessions=True) as url:
        found = finding("session", url=url)
    assert (found.level, "a pooler is in between, which keeps sessions" in found.message) == ("warn", True)


def test_pooler_that_keeps_sessions_is_no_matter_where_a_lock_is_asked_for(database: running.Database) -> None:
    with poolers.in_front_of(database.url, keeps_sessions=True) as url:
        found = findings("session", "notify", url=url, session="lock")
    assert (found["session"].level, found["notify"].level) == ("ok", "ok")


def test_lock_behind_a_pooler_in_transaction_mode_is_a_failure(database: running.Database) -> None:
    with poolers.in_front_of(database.url) as url:
        assert finding("session", url=url, session="lock").level == "fail"


def test_direct_way_beside_a_pooler_is_well(database: running.Database) -> None:
    with poolers.in_front_of(database.url) as url:
        found = findings("session", "notify", url=url, session_url=database.url)
    assert (found["session"].level, found["notify"].level) == ("ok", "ok")


def test_direct_way_to_another_database_is_a_failure(database: running.Database, server_url: str) -> None:
    found = findings("session", "notify", session_url=server_url)
    assert (found["session"].level, found["notify"].message) == ("fail", "see 'session'")
    assert "take each other for dead" in found["session"].message


def test_direct_way_that_leads_nowhere_is_a_failure(database: running.Database) -> None:
    found = finding("session", session_url="postgresql://127.0.0.1:1/nowhere")
    assert (found.level, "127.0.0.1:1/nowhere" in found.message) == ("fail", True)


def test_keepalives_are_looked_at_where_a_network_is_between(busy_server: str) -> None:
    from psycopg2 import extensions

    url = str(extensions.make_dsn(busy_server, host="127.0.0.1"))
    assert finding("keepalives", url=url).message == "the server asks for a sign of life after 10 s of silence"


# --- clock and connections --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "level"), [(0.0, "ok"), (-5.0, "warn"), (5.0, "warn"), (3600.0, "fail")])
def test_clock_of_this_machine_is_compared(
    database: running.Database, monkeypatch: pytest.MonkeyPatch, seconds: float, level: str
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + seconds)
    found = finding("clock", limits=Limits(clock_seconds=3.0))
    assert found.level == level
    assert seconds <= 0 or "behind that of this machine" in found.message


@pytest.mark.parametrize(("processes", "level"), [(1, "ok"), (1_000, "fail")], ids=["that-fit", "that-do-not"])
def test_connections_of_all_runners_are_counted(database: running.Database, processes: int, level: str) -> None:
    assert finding("connections", processes=processes).level == level


def test_connections_of_jobs_that_may_not_fit_are_a_warning(database: running.Database) -> None:
    found = finding("connections", job_connections=9_000)
    assert (found.level, "raise max_connections" in str(found.remedy)) == ("warn", True)


def test_connections_of_processes_for_jobs_are_counted_where_there_are_such_jobs(database: running.Database) -> None:
    assert finding("connections", job_processes=1_000).level == "ok"

    @job(executor="process")
    def compute() -> None: ...

    assert finding("connections", jobs=True, job_processes=1_000).level == "warn"


def test_limit_of_a_role_counts(database: running.Database, limited_role: str) -> None:
    grant_all(database, limited_role)
    database.rows(f"ALTER ROLE {limited_role} CONNECTION LIMIT 3")
    found = finding("connections", url=as_role(database.url, limited_role))
    assert (found.level, "there are 3 (the limit of the role" in found.message) == ("fail", True)


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_job_type_that_nobody_knows_is_a_warning(database: running.Database) -> None:
    @job(aliases=["welcome"])
    def greet(name: str) -> None: ...

    for job_type in ("greet", "welcome", "lost", "lost"):
        enqueue(database, job_type)
    found = finding("job types", jobs=True)
    assert found.level == "warn"
    assert found.message.endswith(": lost (2)")


def test_job_type_that_a_live_runner_knows_is_well(database: running.Database) -> None:
    @job
    def greet(name: str) -> None: ...

    with running.started(Runner().register(greet).configure_queue("other")):
        enqueue(database, "greet")
        assert finding("job types").level == "ok"


def test_payload_that_no_longer_fits_is_told_by_id_and_field_and_not_by_value(database: running.Database) -> None:
    @job
    def greet(name: str, marks: dict[str, date]) -> None: ...

    enqueue(database, "greet", '{"name": "fits", "marks": {}}')
    no_name = enqueue(database, "greet", '{"marks": {}}')
    no_object = enqueue(database, "greet", "[]")
    mark = enqueue(database, "greet", '{"name": "Ann", "marks": {"confidential": "private"}}')
    found = finding("payloads", jobs=True)
    assert found.level == "fail"
    assert found.message == (
        f"3 of 4 no longer fit their job: greet {no_name} (at name), greet {no_object} (as a whole), "
        f"greet {mark} (at marks[…])"
    )


def test_only_so_many_payloads_of_a_type_are_looked_at(database: running.Database) -> None:
    @job
    def greet(name: str) -> None: ...

    greet.delay_many([("Ann",)] * 5)
    found = finding("payloads", jobs=True, limits=Limits(sampled_payloads=3))
    assert found.message == "all 3 that were looked at fit their jobs"


def test_payload_of_a_dataclass_whose_code_raises_is_told(database: running.Database) -> None:
    @job
    def greet(person: Person) -> None: ...

    id = enqueue(database, "greet", '{"name": "confidential"}')
    found = finding("payloads", jobs=True)
    assert (found.level, f"greet {id}" in found.message, "confidential" in found.message) == ("fail", True, False)


def test_queue_that_nobody_serves_is_a_warning(database: running.Database) -> None:
    enqueue(database, "greet", queue="forgotten")
    found = finding("queues")
    assert (found.level, found.message.endswith(": forgotten (1)")) == ("warn", True)


def test_paused_queue_in_which_jobs_wait_is_a_warning(database: running.Database) -> None:
    @job
    def greet(name: str) -> None: ...

    greet.delay("Ann")
    greenjobs.queues.pause("default")
    found = finding("queues", jobs=True)
    assert (found.level, found.message) == ("warn", "paused while jobs wait: default (1)")


def test_jobs_that_wait_without_any_runner_are_a_warning(database: running.Database) -> None:
    assert finding("runners").level == "ok"
    enqueue(database, "greet")
    assert finding("runners").message == "none lives, and 1 jobs wait that could run now"


def test_live_runners_are_counted(database: running.Database) -> None:
    @job
    def greet(name: str) -> None: ...

    with running.started(Runner().register(greet)):
        assert finding("runners").message.startswith("1 live: 1 of release ")


def test_job_that_waits_long_in_a_served_queue_is_a_warning(database: running.Database) -> None:
    begun, may_end = Event(), Event()

    @job
    def slow(number: int) -> None:
        begun.set()
        may_end.wait(PATIENCE_SECONDS)

    slow.delay_many([(1,), (2,)])
    with running.started(Runner().register(slow).configure_queue("default", pool=1)):
        assert begun.wait(PATIENCE_SECONDS)
        found = finding("waiting", limits=Limits(waiting_seconds=0))
        may_end.set()
    assert (found.level, "default (1, the oldest for" in found.message) == ("warn", True)


SCHEDULE = """
INSERT INTO background_schedules (name, job_type, cron, timezone, source, next_tick_at)
VALUES ('nightly', 'greet', '0 3 * * *', 'UTC', 'api', now() - interval '2 minutes')
"""


def test_schedule_for_a_job_that_nobody_knows_is_a_warning(database: running.Database) -> None:
    database.rows(SCHEDULE)
    assert "knows: nightly (greet)" in finding("schedules").message


def test_schedule_that_is_overdue_is_a_warning(database: running.Database) -> None:
    @job
    def greet(name: str = "Ann") -> None: ...

    database.rows(SCHEDULE)
    found = finding("schedules", jobs=True)
    assert (found.level, found.message) == ("warn", "overdue by more than a minute: nightly")


def test_examination_that_takes_too_long_skips_the_rest(database: running.Database) -> None:
    found = findings("failed jobs", limits=Limits(total_seconds=0))
    assert {each.level for each in found.values()} == {"skipped"}
