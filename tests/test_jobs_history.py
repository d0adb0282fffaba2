"""Finished jobs that are kept, in greenjobs.jobs and in `greenjobs jobs`: found, shown and pruned beside the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import running
from click.testing import CliRunner, Result

from greenjobs import Discard, job, jobs
from greenjobs.cli import main
from greenjobs.errors import OptionError
from greenjobs.jobs import FinishedJob, StoredJob


@pytest.fixture
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[running.Database]:
    monkeypatch.setenv("GREENJOBS_DATABASE_URL", database_url)
    with running.application(database_url) as database:
        yield database


class Ids:
    """One job of each kind, by how it is doing."""

    def __init__(self, **ids: int) -> None:
        self.done = ids["done"]
        self.discarded = ids["discarded"]
        self.failed = ids["failed"]
        self.scheduled = ids["scheduled"]


@pytest.fixture
def ids(database: running.Database) -> Ids:
    @job(queue="emails", keep="7 days", keep_result=True, max_retries=0)
    def send(how: str) -> dict[str, Any]:
        if how == "discarded":
            raise Discard("no such address")
        if how == "failed":
            raise ValueError("mail server is down")
        return {"sent": [how, None]}

    ids = Ids(
        done=send.delay("done").id,
        discarded=send.delay("discarded").id,
        failed=send.delay("failed").id,
        scheduled=send.options(delay=3600).delay("scheduled").id,
    )
    running.work_off(send)
    return ids


def greenjobs(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["jobs", *(str(argument) for argument in arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def found_ids(*ids: int, **filters: Any) -> list[int]:
    return [found.id for found in jobs.find(*ids, **filters)]


def test_finished_jobs_are_found_by_id_or_by_how_they_ended(ids: Ids) -> None:
    assert found_ids() == [ids.scheduled, ids.failed]
    assert found_ids(ids.done, ids.failed) == [ids.failed, ids.done]
    assert found_ids(state="done") == [ids.done]
    assert found_ids(state=["done", "discarded", "failed"]) == [ids.failed, ids.discarded, ids.done]
    assert found_ids(state=["done", "discarded", "failed"], limit=2) == [ids.failed, ids.discarded]
    assert found_ids(state="discarded", error="NO SUCH address") == [ids.discarded]
    assert found_ids(state="done", queue="other") == []
    assert found_ids(state="done", job_type="send", queue="emails", newer_than="1 h") == [ids.done]
    assert found_ids(state="done", older_than="1 h") == []
    assert found_ids(ids.done, state="failed") == []
    assert (jobs.count(), jobs.count(state=["done", "failed"]), jobs.count(ids.done)) == (2, 2, 1)


def test_job_of_an_id_tells_by_its_state_where_it_was_found(ids: Ids, database: running.Database) -> None:
    done, failed = jobs.get(ids.done), jobs.get(ids.failed)
    assert isinstance(done, FinishedJob)
    assert isinstance(failed, StoredJob)
    assert (done.state, failed.state) == ("done", "failed")
    assert (done.has_result, done.result) == (True, {"sent": ["done", None]})
    assert jobs.get(99_999) is None


def test_what_has_ended_is_left_alone_and_said_to_have(ids: Ids) -> None:
    outcome = jobs.retry(ids.done, ids.discarded, ids.failed, 99_999)
    assert outcome.ids == (ids.failed,)
    assert outcome.left_alone == {ids.done: "is done", ids.discarded: "is discarded", 99_999: "is gone"}
    with pytest.raises(OptionError, match="retry does not take done jobs; it takes those that are failed or scheduled"):
        jobs.retry(state="done")


def test_list_has_finished_jobs_where_their_state_is_named(ids: Ids) -> None:
    assert " done " not in greenjobs("list").stdout
    table = greenjobs("list", "--state", "done", "--state", "discarded").stdout.splitlines()
    assert [line.split()[:4] for line in table[1:]] == [
        [str(ids.discarded), "send", "emails", "discarded"],
        [str(ids.done), "send", "emails", "done"],
    ]
    (listed,) = json.loads(greenjobs("list", ids.done, "--json").stdout)
    assert (listed["state"], listed["result"]) == ("done", {"sent": ["done", None]})


def test_show_has_how_it_went_and_what_it_returned(ids: Ids) -> None:
    shown = greenjobs("show", ids.done, ids.discarded).stdout
    facts = {line[2:16].strip() for line in shown.splitlines()}
    assert f"job {ids.done}: send" in shown
    assert 'result        {"sent": ["done", null]}' in shown
    assert "Discard: no such address" in shown
    assert {"started at", "ended at", "kept until", "ran for", "waited for", "claims", "arguments"} <= facts


def test_prune_deletes_finished_jobs_that_are_named_by_their_state(ids: Ids, database: running.Database) -> None:
    """Before their time, as somebody may have to who deletes all that is known of a customer."""
    assert jobs.prune(older_than=0).ids == (ids.failed,)
    assert jobs.get(ids.failed) is None
    with pytest.raises(OptionError, match="prune finished jobs that ended how long ago"):
        jobs.prune(state="done")
    assert greenjobs("prune", "--state", "done", status=2).exit_code == 2
    assert jobs.prune(state="done", older_than="1 h").ids == ()
    assert jobs.plan("prune", state=["done", "discarded"], older_than=timedelta(0), limit=1).ids == (ids.discarded,)
    assert found_ids(state=["done", "discarded"]) == [ids.discarded, ids.done]
    assert greenjobs("prune", "--state", "done", "--older-than", "0", "--yes").stdout == f"pruned 1 job: {ids.done}\n"
    assert found_ids(state=["done", "discarded"]) == [ids.discarded]
    assert database.column("SELECT id FROM background_jobs") == [ids.scheduled]


def test_finished_job_that_was_pruned_since_it_was_chosen_is_left_alone(ids: Ids, database: running.Database) -> None:
    plan = jobs.plan("prune", state=["done", "discarded"], older_than=0)
    database.rows("DELETE FROM background_history WHERE id = %s", ids.done)
    outcome = plan.carry_out()
    assert outcome.ids == (ids.discarded,)
    assert outcome.left_alone == {ids.done: "has moved on: is gone"}


def test_job_that_is_cancelled_by_its_state_is_kept_as_cancelled(ids: Ids) -> None:
    """Where running ones are not meant, too."""
    assert jobs.cancel(ids.scheduled, state="scheduled").ids == (ids.scheduled,)
    assert jobs.handle(ids.scheduled).status() == "cancelled"
