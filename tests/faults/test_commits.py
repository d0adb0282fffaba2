"""The answer to a COMMIT is lost, and the commit was done: nobody can tell, and nothing is done twice.

A server that waits for a standby which is not there has committed on its own disk already; who ends its session then
learns nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import databases
import pytest
import running
from waiting import eventually

from greenjobs import current_job, job
from greenjobs.migrate import migrate
from greenjobs.runner import Runner

from .server import Server

_UNANSWERED = "wait_event = 'SyncRep'"


@pytest.mark.parametrize("how", ["session ends", "timeout", "interrupted"])
def test_commit_that_was_not_answered_is_done_once(make_server: Callable[..., Server], how: str) -> None:
    # Whoever does not ask for it, as everybody but the job here, waits for no standby.
    server = make_server(synchronous_standby_names="nobody", synchronous_commit="local")
    with databases.fresh(server.url) as url:
        migrate(url)
        with running.application(url) as database:
            database.rows("CREATE TABLE notes (what text)")

            @job(queue="others")
            def note() -> None: ...

            @job(backoff=[0.01], timeout=3 if how == "timeout" else None)
            def work() -> None:
                with current_job.transaction() as connection, connection.cursor() as cursor:
                    cursor.execute("SET LOCAL synchronous_commit = on")
                    cursor.execute("INSERT INTO notes VALUES (%s)", (f"attempt {current_job.attempt}",))
                    note.delay()

            work.delay()
            with running.started(Runner().register(work)) as runner:
                waits = f"SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND {_UNANSWERED}"
                found: list[Any] = eventually(lambda: database.column(waits), "nobody waits", seconds=30)
                if how == "session ends":
                    database.rows("SELECT pg_terminate_backend(%s)", *found)
                elif how == "interrupted":
                    runner.shutdown(urgency=2)
                eventually(lambda: not database.count("job_type = 'work'"), "the job is not done", seconds=30)
                eventually(lambda: not runner.held_ids(), "the outcome is not written", seconds=30)
            assert database.column("SELECT what FROM notes") == ["attempt 1"]
            assert database.count("job_type = 'note'") == 1
