"""Jobs that were renamed, and payloads that no longer fit, as a rolling deploy has them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Any

import databases
import pytest
import running

from greenjobs import inspection, job, jobs
from greenjobs.errors import ConfigError, JobDefinitionError
from greenjobs.job import Job, find_job, registered_jobs
from greenjobs.runner import Runner


@pytest.fixture(scope="module")
def shared_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """One database for all tests here: making one takes longer than most of them do."""
    with databases.fresh(server_url, template=migrated_template) as url:
        yield url


@pytest.fixture
def database(shared_url: str) -> Iterator[running.Database]:
    with running.application(shared_url) as database:
        yield database
        database.rows("TRUNCATE background_jobs")


# --- aliases ----------------------------------------------------------------------------------------------------------


def test_rows_of_the_old_name_are_run(database: running.Database) -> None:
    ran = []

    @job(name="send_mail")
    def old(to: str) -> None: ...

    @job(name="send_email", aliases=["mail", "send_mail_v2"])
    def new(to: str) -> None:
        ran.append(to)

    old.delay("ann")
    new.delay("bob")
    database.rows("UPDATE background_jobs SET job_type = 'send_mail_v2' WHERE job_type = 'send_mail'")
    running.work_off(new)
    assert sorted(ran) == ["ann", "bob"]


def test_rows_of_the_old_name_without_a_queue_go_where_the_job_is_at_home(database: running.Database) -> None:
    """As the crate, or plain SQL, inserts them."""
    ran = []

    @job(queue="emails", aliases=["send_mail"])
    def send_email(to: str) -> None:
        ran.append(to)

    database.rows("""INSERT INTO background_jobs (job_type, data) VALUES ('send_mail', '{"to": "ann"}')""")
    running.work_off(send_email)
    assert ran == ["ann"]


def test_new_jobs_have_the_new_name(database: running.Database) -> None:
    @job(aliases=["send_mail"])
    def send_email() -> None: ...

    send_email.delay()
    assert database.column("SELECT job_type FROM background_jobs") == ["send_email"]


def test_runner_registers_the_old_names_too(database: running.Database) -> None:
    @job(aliases=["send_mail"])
    def send_email() -> None: ...

    with running.started(Runner().register(send_email)):
        (runner,) = inspection.live_runners(database.connection)
        assert runner.job_types == ["send_email", "send_mail"]


def test_job_is_found_by_its_old_name_and_listed_once(database: running.Database) -> None:
    @job(aliases=["send_mail"])
    def send_email() -> None: ...

    assert find_job("send_mail") is send_email
    assert registered_jobs() == {"send_email": send_email}


def test_alias_that_is_the_name_of_another_job_is_refused(database: running.Database) -> None:
    @job
    def send_mail() -> None: ...

    with pytest.raises(JobDefinitionError, match=r"two jobs are named 'send_mail': .*send_mail.* and .*send_email"):

        @job(aliases=["send_mail"])
        def send_email() -> None: ...

    assert registered_jobs() == {"send_mail": send_mail}


def test_name_that_is_an_alias_of_another_job_is_refused(database: running.Database) -> None:
    @job(aliases=["send_mail"])
    def send_email() -> None: ...

    with pytest.raises(JobDefinitionError, match="two jobs are named 'send_mail'"):

        @job
        def send_mail() -> None: ...

    assert find_job("send_mail") is send_email


def test_two_jobs_that_have_the_same_alias_are_refused(database: running.Database) -> None:
    @job(aliases=["send"])
    def send_email() -> None: ...

    with pytest.raises(JobDefinitionError, match="two jobs are named 'send'"):

        @job(aliases=["send"])
        def send_letter() -> None: ...


def test_runner_refuses_two_jobs_with_one_name_between_them(database: running.Database) -> None:
    """Jobs that were made without the decorator are in no registry."""

    def send_email() -> None: ...

    def send_mail() -> None: ...

    with pytest.raises(ConfigError, match="two jobs are named 'send_mail'"):
        Runner().register(Job(send_email, aliases=["send_mail"]), Job(send_mail))


def test_job_that_is_declared_again_has_the_aliases_of_the_last_time(database: running.Database) -> None:
    """As when its module is reloaded."""

    def declare(*aliases: str) -> Job[Any, Any]:
        @job(aliases=aliases)
        def send_email() -> None: ...

        return send_email

    declare("one", "two")
    last = declare("two", "three")
    assert (find_job("two"), find_job("three")) == (last, last)

    @job
    def one() -> None: ...

    assert find_job("one") is one


@pytest.mark.parametrize(
    ("aliases", "message"),
    [
        ("send_mail", "send_email: aliases is 'send_mail'; allowed: a list of names"),
        (5, "send_email: aliases is 5"),
        (None, "send_email: aliases is None"),
        (["two words"], "send_email: the alias 'two words' is no job name"),
        ([""], "the alias '' is no job name"),
        ([["nested"]], r"the alias \['nested'\] is no job name"),
        (["x" * 201], "is no job name: 1 to 200 letters"),
        (["send_email"], "send_email: the alias 'send_email' is its name; leave it out"),
    ],
)
def test_wrong_aliases_are_refused_where_they_are_declared(
    database: running.Database, aliases: Any, message: str
) -> None:
    with pytest.raises(JobDefinitionError, match=message):

        @job(aliases=aliases)
        def send_email() -> None: ...


# --- payloads that no longer fit --------------------------------------------------------------------------------------


@pytest.fixture
def enqueued_before(database: running.Database) -> int:
    """A job that a former release enqueued: send_email(to, subject)."""
    sql = """
        INSERT INTO background_jobs (job_type, data, queue)
        VALUES ('send_email', '{"to": "ann", "subject": "Hi"}', 'default')
        RETURNING id
    """
    return int(database.value(sql))


def test_payload_that_lacks_an_argument_is_failed_after_one_look(enqueued_before: int) -> None:
    @job(max_retries=10)
    def send_email(to: str, subject: str, body: str) -> None: ...

    running.work_off(send_email)
    found = jobs.get(enqueued_before)
    assert found is not None
    assert (found.state, found.attempt, len(found.errors)) == ("failed", 1, 1)
    assert found.error == "PayloadMismatch: send_email: the stored payload lacks the argument 'body'"


def test_payload_with_an_argument_too_many_is_failed_after_one_look(enqueued_before: int) -> None:
    @job(max_retries=10)
    def send_email(to: str) -> None: ...

    running.work_off(send_email)
    (found,) = jobs.find(state="failed", error="PayloadMismatch")
    assert (found.id, found.attempt) == (enqueued_before, 1)
    assert "has the argument 'subject', which send_email() does not take" in str(found.error)


def test_payload_of_another_type_is_failed_after_one_look(enqueued_before: int) -> None:
    @job(max_retries=10)
    def send_email(to: str, subject: date) -> None: ...

    running.work_off(send_email)
    found = jobs.get(enqueued_before)
    assert found is not None
    assert (found.state, found.attempt) == ("failed", 1)
    assert "PayloadMismatch: send_email: subject" in str(found.error)


def test_job_whose_signature_is_mended_runs_when_it_is_retried(enqueued_before: int) -> None:
    ran = []

    def declare(required: bool) -> Job[Any, Any]:
        if required:

            @job
            def send_email(to: str, subject: str, body: str) -> None: ...

        else:

            @job
            def send_email(to: str, subject: str, body: str = "") -> None:
                ran.append((to, subject, body))

        return send_email

    running.work_off(declare(required=True))
    jobs.retry(error="lacks the argument 'body'")
    running.work_off(declare(required=False))
    assert ran == [("ann", "Hi", "")]
