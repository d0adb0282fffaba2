"""The middleware for WSGI applications without an extension: transactions, held jobs, settings, and surroundings."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import databases
import gevent
import processes
import psycopg2
import pytest
import running
import sqlalchemy as sa
from gevent.event import Event
from sqlalchemy.orm import Session

import greenjobs
from greenjobs import config, current_job, job, testing
from greenjobs.contrib.wsgi import GreenJobs, active_environ, equipment_of
from greenjobs.errors import ConfigError, DatabaseUnavailable, JobHeld
from greenjobs.runner import Runner


@pytest.fixture
def database(database_url: str) -> Iterator[running.Database]:
    with running.application(database_url) as database:
        yield database
        config.adopt(None)


def work_of(database: running.Database) -> Any:
    @job
    def work(number: int = 0) -> None: ...

    return work


class Response:
    """What a client gets, as a server goes about it."""

    def __init__(self) -> None:
        self.status = ""
        self.body = b""

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        self.status = status
        return self.written

    def written(self, chunk: bytes) -> None:
        self.body += chunk


def environ_of(path: str = "/", **more: Any) -> dict[str, Any]:
    environ: dict[str, Any] = {"SCRIPT_NAME": "", "PATH_INFO": path, **more}
    setup_testing_defaults(environ)
    return environ


def get(application: Any, path: str = "/", **more: Any) -> Response:
    response = Response()
    body = application(environ_of(path, **more), response.start)
    try:
        for chunk in body:
            response.body += chunk
    finally:
        if hasattr(body, "close"):
            body.close()
    return response


def answering(
    view: Callable[[], Any], *, status: str = "200 OK", body: Callable[[], Any] = lambda: [b"done"]
) -> Callable[..., Any]:
    def application(environ: Any, start_response: Any) -> Any:
        view()
        start_response(status, [("Content-Type", "text/plain")])
        return body()

    return application


class Body:
    """What a framework returns that has to be closed; its last chunk is followed by `end`, its close does `finish`."""

    def __init__(self, *, end: Callable[[], Any] = lambda: None, finish: Callable[[], Any] = lambda: None) -> None:
        self.closed = 0
        self._end = end
        self._finish = finish
        self._chunks = self._produce()

    def _produce(self) -> Iterator[bytes]:
        yield b"a"
        yield b"b"
        self._end()

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        self.closed += 1
        self._finish()


# --- held -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [lambda: [b"done"], lambda: (b"done",), Body, lambda: iter([b"done"])], ids=str)
def test_held_job_is_there_when_the_request_has_succeeded(database: running.Database, body: Any) -> None:
    work, seen = work_of(database), list[int]()

    def view() -> None:
        work.delay()
        seen.append(database.count())

    get(GreenJobs(answering(view, body=body), hold=True))
    assert (seen, database.count()) == ([0], 1)


@pytest.mark.parametrize(("status", "count"), [("204 No Content", 1), ("303 See Other", 1), ("404 x", 0), ("500 x", 0)])
@pytest.mark.parametrize("body", [lambda: [b""], Body], ids=["list", "stream"])
def test_held_job_is_dropped_with_a_response_that_is_no_success(
    database: running.Database, caplog: pytest.LogCaptureFixture, status: str, count: int, body: Any
) -> None:
    work = work_of(database)
    with caplog.at_level(logging.INFO, "greenjobs.contrib.wsgi"):
        get(GreenJobs(answering(work.delay, status=status, body=body), hold=True))
    assert database.count() == count
    assert (f"was answered with {status}; the jobs that it held are not enqueued: work (1)" in caplog.text) != count


def test_held_job_is_dropped_with_an_error(database: running.Database) -> None:
    work = work_of(database)

    def view() -> None:
        work.delay()
        raise LookupError("no such order")

    with pytest.raises(LookupError):
        get(GreenJobs(answering(view), hold=True))
    assert database.count() == 0


def test_held_job_is_dropped_with_an_error_in_the_stream(database: running.Database) -> None:
    work = work_of(database)

    def fail() -> None:
        raise LookupError("half way")

    body = Body(end=fail)
    with pytest.raises(LookupError):
        get(GreenJobs(answering(work.delay, body=lambda: body), hold=True))
    assert (database.count(), body.closed) == (0, 1)


def test_held_job_is_dropped_with_an_error_at_the_close(database: running.Database) -> None:
    """Where a framework commits."""
    work = work_of(database)

    def fail() -> None:
        raise OSError("cannot commit")

    body = Body(finish=fail)
    with pytest.raises(OSError, match="cannot commit"):
        get(GreenJobs(answering(work.delay, body=lambda: body), hold=True))
    assert (database.count(), body.closed) == (0, 1)


def test_job_of_a_stream_waits_for_what_is_done_at_its_close(database: running.Database) -> None:
    work, seen = work_of(database), list[int]()
    body = Body(end=work.delay, finish=lambda: seen.append(database.count()))
    get(GreenJobs(answering(lambda: None, body=lambda: body), hold=True))
    assert (seen, database.count(), body.closed) == ([0], 1, 1)


def test_client_that_goes_away_takes_no_job_along(database: running.Database) -> None:
    """The work was done; that nobody heard of it changes nothing."""
    work, body = work_of(database), Body()
    stream = GreenJobs(answering(work.delay, body=lambda: body), hold=True)(environ_of(), Response().start)
    assert next(iter(stream)) == b"a"
    stream.close()  # type: ignore[attr-defined]
    assert (database.count(), body.closed) == (1, 1)


def test_close_is_called_once_where_a_server_calls_it_twice(database: running.Database) -> None:
    work, body = work_of(database), Body()
    stream = GreenJobs(answering(work.delay, body=lambda: body), hold=True)(environ_of(), Response().start)
    assert b"".join(stream) == b"ab"
    stream.close()  # type: ignore[attr-defined]
    stream.close()  # type: ignore[attr-defined]
    assert (database.count(), body.closed) == (1, 1)


def test_stream_without_jobs_is_closed_by_the_server_alone(database: running.Database) -> None:
    body = Body()
    stream = GreenJobs(answering(lambda: None, body=lambda: body), hold=True)(environ_of(), Response().start)
    assert b"".join(stream) == b"ab"
    assert body.closed == 0
    stream.close()  # type: ignore[attr-defined]
    assert body.closed == 1


def test_generator_may_begin_its_response_late(database: running.Database) -> None:
    work = work_of(database)

    def application(environ: Any, start_response: Any) -> Iterator[bytes]:
        work.delay()
        start_response("200 OK", [])
        yield b"late"

    response = get(GreenJobs(application, hold=True))
    assert (response.status, response.body, database.count()) == ("200 OK", b"late", 1)


def test_response_may_be_written(database: running.Database) -> None:
    work = work_of(database)

    def application(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])(b"written, ")
        work.delay()
        return [b"returned"]

    assert get(GreenJobs(application, hold=True)).body == b"written, returned"
    assert database.count() == 1


def test_file_is_left_to_the_server(database: running.Database, tmp_path: Path) -> None:
    """It sends it in a way of its own, if it gets the wrapper that it made."""
    work, file = work_of(database), tmp_path / "file"
    file.write_bytes(b"a file")
    opened = FileWrapper(file.open("rb"))
    application = GreenJobs(answering(work.delay, body=lambda: opened), hold=True)
    assert application(environ_of(**{"wsgi.file_wrapper": FileWrapper}), Response().start) is opened
    assert database.count() == 1
    opened.close()


def test_later_status_of_a_response_counts(database: running.Database) -> None:
    work = work_of(database)

    def application(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        work.delay()
        try:
            raise LookupError
        except LookupError as error:
            start_response("500 Sorry", [], (LookupError, error, error.__traceback__))
        return [b""]

    assert get(GreenJobs(application, hold=True)).status == "500 Sorry"
    assert database.count() == 0


def test_middleware_keeps_to_the_letter_of_wsgi(database: running.Database) -> None:
    work = work_of(database)
    for body in (lambda: [b"done"], lambda: iter([b"do", b"ne"])):
        application = validator(GreenJobs(validator(answering(work.delay, body=body)), hold=True))
        assert get(application, QUERY_STRING="").body == b"done"
    assert database.count() == 2


def test_held_jobs_are_enqueued_all_or_none(database: running.Database, caplog: pytest.LogCaptureFixture) -> None:
    """Before the client hears of success."""
    work = work_of(database)
    database.rows("ALTER TABLE background_jobs ADD CHECK (data <> '{\"number\": 13}')")
    handles: list[Any] = []

    def view() -> None:
        handles.extend([work.delay(12), *work.delay_many([(13,), (14,)])])

    application = GreenJobs(answering(view), hold=True)
    with pytest.raises(psycopg2.errors.CheckViolation):
        application(environ_of(), Response().start)
    assert database.count() == 0
    assert "could not be enqueued, and are lost: work (1), work (2)" in caplog.text
    with pytest.raises(JobHeld):
        assert handles[0].id


def test_database_that_is_gone_is_an_error_of_the_request(database: running.Database) -> None:
    application = GreenJobs(answering(work_of(database).delay), hold=True, database_url="postgresql://127.0.0.1:1/no")
    greenjobs.configure()
    with pytest.raises(DatabaseUnavailable):
        application(environ_of(), Response().start)


def test_handle_of_a_held_job_is_an_ordinary_one_when_it_is_enqueued(database: running.Database) -> None:
    work, handles = work_of(database), list[Any]()

    def view() -> None:
        handle = work.delay()
        handles.append(handle)
        assert repr(handle) == "<work, held>" and handle.job_type == "work"
        for ask in (lambda: handle.id, lambda: handle.action, handle.cancel, lambda: handle.wait(0)):
            with pytest.raises(JobHeld, match="work has not been enqueued yet, and so has no .*independent=True"):
                ask()

    get(GreenJobs(answering(view), hold=True))
    (handle,) = handles
    assert database.column("SELECT id FROM background_jobs") == [handle.id]
    assert type(handle) is greenjobs.JobHandle and handle.cancel() == "removed"


def test_unique_job_is_judged_when_it_is_enqueued(database: running.Database) -> None:
    @job(unique=True)
    def work() -> None: ...

    handles: list[Any] = []
    get(GreenJobs(answering(lambda: handles.extend([work.delay(), work.delay()])), hold=True))
    assert [handle.duplicate for handle in handles] == [False, True]
    assert handles[0].id == handles[1].id


def test_independent_job_is_not_held(database: running.Database) -> None:
    work, seen = work_of(database), list[int]()

    def view() -> None:
        work.options(independent=True).delay()
        seen.append(database.count())

    get(GreenJobs(answering(view, status="500 x"), hold=True))
    assert (seen, database.count()) == ([1], 1)


def test_options_of_a_held_call_are_kept(database: running.Database) -> None:
    work = work_of(database)
    get(GreenJobs(answering(work.options(priority=7, delay=60, queue="slow").delay), hold=True))
    assert database.rows("SELECT priority, queue, state FROM background_jobs") == [(7, "slow", "scheduled")]


def test_held_job_is_enqueued_in_the_context_of_its_call(database: running.Database) -> None:
    """Such as the span that a trace is in."""
    from greenjobs import surroundings

    work, span, seen = work_of(database), contextvars.ContextVar[str]("span"), list[str]()

    @contextlib.contextmanager
    def traced(enqueue: Any) -> Iterator[None]:
        seen.append(span.get("none"))
        yield

    def view() -> None:
        span.set("of the view")
        work.delay()
        span.set("of later")

    surroundings.surround_enqueue(traced)
    try:
        get(GreenJobs(answering(view), hold=True))
    finally:
        surroundings.around_enqueues.remove(traced)
    assert seen == ["of the view"]


def test_thread_with_a_copy_of_the_context_enqueues_at_once_when_the_request_is_over(
    database: running.Database,
) -> None:
    work, copies = work_of(database), list[contextvars.Context]()
    get(GreenJobs(answering(lambda: copies.append(contextvars.copy_context())), hold=True))
    copies[0].run(work.delay)
    assert database.count() == 1


def test_thread_of_its_own_belongs_to_no_request(database: running.Database) -> None:
    work, seen = work_of(database), list[int]()

    def view() -> None:
        thread = threading.Thread(target=contextvars.Context().run, args=(work.delay,))
        thread.start()
        thread.join()
        seen.append(database.count())

    get(GreenJobs(answering(view), hold=True))
    assert seen == [1]


def test_requests_at_the_same_time_hold_their_own(database: running.Database) -> None:
    """Fifty greenlets, all in the middle of a request, every other of which fails."""
    work, here, all_are_here = work_of(database), set[int](), Event()

    def application(environ: Any, start_response: Any) -> Any:
        number = int(environ["PATH_INFO"][1:])
        work.delay(number)
        here.add(number)
        if len(here) == 50:
            all_are_here.set()
        assert all_are_here.wait(running.PATIENCE_SECONDS)
        assert active_environ() is environ
        start_response("200 OK" if number % 2 else "500 x", [])
        return Body()

    wrapped = GreenJobs(application, hold=True)
    gevent.joinall([gevent.spawn(get, wrapped, f"/{number}") for number in range(50)], raise_error=True)
    assert sorted(database.column("SELECT (data ->> 'number')::int FROM background_jobs")) == list(range(1, 50, 2))


def test_parts_of_a_stream_may_be_asked_for_by_several_threads(database: running.Database) -> None:
    work = work_of(database)
    stream = GreenJobs(answering(lambda: None, body=lambda: Body(end=work.delay)), hold=True)(
        environ_of(), Response().start
    )
    for _ in range(2):
        thread = threading.Thread(target=next, args=(iter(stream),))
        thread.start()
        thread.join()
    assert list(stream) == []
    assert database.count() == 1
    assert active_environ() is None


def test_modes_of_tests_come_before_the_request(database: running.Database) -> None:
    work = work_of(database)
    with testing.recording() as mode:
        get(GreenJobs(answering(work.delay, status="500 x"), hold=True))
    assert [each.job_type for each in mode.jobs] == ["work"]


# --- joined -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(databases.sqlalchemy_url(database_url))
    yield engine
    engine.dispose()


@pytest.mark.parametrize(("end", "count"), [("commit", 1), ("rollback", 0)])
def test_job_joins_the_transaction_that_the_application_names(
    database: running.Database, engine: sa.Engine, end: str, count: int
) -> None:
    work = work_of(database)

    def application(environ: Any, start_response: Any) -> list[bytes]:
        with Session(engine) as session:
            environ["shop.session"] = session
            work.delay()
            assert database.count() == 0
            getattr(session, end)()
        start_response("200 OK", [])
        return [b""]

    get(GreenJobs(application, connection=lambda environ: environ.get("shop.session")))
    assert database.count() == count


def test_job_of_a_hook_after_the_commit_is_committed_at_once(database: running.Database, engine: sa.Engine) -> None:
    work = work_of(database)

    def application(environ: Any, start_response: Any) -> list[bytes]:
        with Session(engine) as session:
            environ["shop.session"] = session
            sa.event.listen(session, "after_commit", lambda _: work.delay())
            session.execute(sa.text("SELECT 1"))
            session.commit()
        start_response("200 OK", [])
        return [b""]

    get(GreenJobs(application, connection=lambda environ: environ.get("shop.session")))
    assert database.count() == 1


def test_job_is_committed_at_once_where_the_application_names_none(database: running.Database) -> None:
    work, seen = work_of(database), list[int]()

    def view() -> None:
        work.delay()
        seen.append(database.count())

    get(GreenJobs(answering(view, status="500 x"), connection=lambda environ: None))
    assert seen == [1]


def test_job_is_held_where_the_application_names_none_and_holds(database: running.Database) -> None:
    get(GreenJobs(answering(work_of(database).delay, status="500 x"), connection=lambda environ: None, hold=True))
    assert database.count() == 0


def test_connection_of_another_database_is_not_joined(
    database: running.Database, server_url: str, migrated_template: str
) -> None:
    """An inner application that is active has its own."""
    work = work_of(database)
    greenjobs.configure()
    with databases.fresh(server_url, template=migrated_template) as other_url, running.application(other_url) as other:
        greenjobs.configure()
        connection = psycopg2.connect(database.url)
        inner = GreenJobs(answering(work.delay), database_url=other_url)
        outer = GreenJobs(inner, connection=lambda environ: connection, database_url=database.url)
        get(outer)
        connection.close()
        assert (database.count(), other.count()) == (0, 1)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_application_in_its_requests(database: running.Database) -> None:
    work = work_of(database)
    applications = [GreenJobs(answering(work.delay), default_queue=queue) for queue in ("one", "two")]
    for application in applications:
        get(application)
    work.delay()  # outside: those of the one that was made last
    assert database.column("SELECT queue FROM background_jobs ORDER BY id") == ["one", "two", "two"]


def test_inner_application_has_its_own_settings_and_leaves_those_of_the_outer(database: running.Database) -> None:
    work = work_of(database)
    inner = GreenJobs(answering(work.delay, status="500 x"), default_queue="inner", hold=True)

    def mounts(environ: Any, start_response: Any) -> list[bytes]:
        work.delay()
        get(inner)
        work.delay()
        start_response("200 OK", [])
        return [b""]

    get(GreenJobs(mounts, default_queue="outer", hold=True))
    assert database.column("SELECT queue FROM background_jobs") == ["outer", "outer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pools": 5}, "there is no option 'pools'; did you mean pool"),
        ({"pool": 0}, r"pool is 0 \(an argument of GreenJobs\); the value must be a whole number"),
        ({"processes": 2}, "GreenJobs has processes, which counts before the application is loaded"),
        ({"http": "9600"}, "GreenJobs has http, which counts before"),
        ({"log_format": "json"}, "GreenJobs has log_format, which counts before"),
        ({"hold": "yes"}, "hold is 'yes' .*must be True or False"),
        ({"connection": 5}, "takes a callable as connection, not 5"),
        ({"around": 5}, "takes a callable as around, not 5"),
    ],
    ids=str,
)
def test_wrong_argument_is_refused(database: running.Database, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GreenJobs(answering(lambda: None), **arguments)


def test_what_is_no_application_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes a callable as application, not None"):
        GreenJobs(None)  # type: ignore[arg-type]


# --- surroundings -----------------------------------------------------------------------------------------------------


def noting(notes: list[Any]) -> Callable[[Any], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def around(environ: Any) -> Iterator[None]:
        environ["shop.name"] = "around"
        notes.append("begins")
        try:
            yield
        except BaseException as error:
            notes.append(type(error).__name__)
            raise
        else:
            notes.append("ends")
        finally:
            environ["shop.name"] = None

    return around


def test_surroundings_last_until_a_stream_is_closed(database: running.Database) -> None:
    notes: list[Any] = []
    body = Body(end=lambda: notes.append("last chunk"), finish=lambda: notes.append("close"))
    get(GreenJobs(answering(lambda: notes.append("call"), body=lambda: body), around=noting(notes)))
    assert notes == ["begins", "call", "last chunk", "close", "ends"]


def test_surroundings_end_before_held_jobs_are_enqueued(database: running.Database) -> None:
    """They may commit what the jobs are about."""
    work, seen = work_of(database), list[int]()

    @contextlib.contextmanager
    def around(environ: Any) -> Iterator[None]:
        yield
        seen.append(database.count())

    get(GreenJobs(answering(work.delay), around=around, hold=True))
    assert (seen, database.count()) == ([0], 1)


def test_held_jobs_are_dropped_where_surroundings_fail_at_their_end(database: running.Database) -> None:
    @contextlib.contextmanager
    def around(environ: Any) -> Iterator[None]:
        yield
        raise OSError("cannot commit")

    with pytest.raises(OSError, match="cannot commit"):
        get(GreenJobs(answering(work_of(database).delay), around=around, hold=True))
    assert database.count() == 0


@pytest.mark.parametrize("where", ["call", "stream", "close"])
def test_surroundings_hear_of_an_error(database: running.Database, where: str) -> None:
    notes: list[Any] = []

    def fail() -> None:
        raise LookupError(where)

    nothing = lambda: None  # noqa: E731
    body = Body(end=fail if where == "stream" else nothing, finish=fail if where == "close" else nothing)
    application = answering(fail if where == "call" else nothing, body=lambda: body)
    with pytest.raises(LookupError, match=where):
        get(GreenJobs(application, around=noting(notes)))
    assert notes == ["begins", "LookupError"]


def test_surroundings_that_fail_at_their_beginning_are_not_ended(database: running.Database) -> None:
    @contextlib.contextmanager
    def around(environ: Any) -> Iterator[None]:
        raise OSError("no connection")
        yield

    with pytest.raises(OSError, match="no connection"):
        get(GreenJobs(answering(lambda: None), around=around))


def work_off(application: GreenJobs, *jobs: Any, pool: int = 10) -> None:
    runner = Runner(context=application.app).register(*jobs).configure_queue("default", pool=pool)
    application.equip(runner.shutdown_when_queue_empty())
    assert runner.start().wait_for_shutdown(running.PATIENCE_SECONDS)


def test_jobs_run_in_the_surroundings_of_requests(database: running.Database) -> None:
    notes: list[Any] = []

    @job(max_retries=0)
    def work(number: int) -> None:
        environ = active_environ()
        assert environ is not None
        notes.append((environ["shop.name"], environ["greenjobs.job_type"], environ["greenjobs.job_id"]))
        assert environ["wsgi.url_scheme"] == "http" and environ["greenjobs.job_id"] == current_job.id
        if number:
            raise LookupError(number)

    ids = [work.delay(number).id for number in (0, 1)]
    work_off(GreenJobs(answering(lambda: None), around=noting(notes), hold=True), work, pool=1)
    assert notes == [
        *("begins", ("around", "work", ids[0]), "ends"),
        *("begins", ("around", "work", ids[1]), "LookupError"),
    ]
    assert active_environ() is None


def test_jobs_of_jobs_join_what_the_application_names_and_are_not_held(
    database: running.Database, engine: sa.Engine
) -> None:
    @contextlib.contextmanager
    def around(environ: Any) -> Iterator[None]:
        with Session(engine) as session:
            environ["shop.session"] = session
            yield
            session.commit()

    @job
    def child() -> None: ...

    @job(max_retries=0)
    def parent(fails: bool) -> None:
        child.delay()
        assert database.count("job_type = 'child'") == 0
        if fails:
            raise LookupError("takes its child along")

    application = GreenJobs(
        answering(lambda: None), around=around, connection=lambda environ: environ.get("shop.session"), hold=True
    )
    parent.delay(True)
    work_off(application, parent)
    assert database.count("job_type = 'child'") == 0
    database.rows("UPDATE background_jobs SET data = '{\"fails\": false}', state = 'available'")
    work_off(application, parent)
    assert database.count("job_type = 'child'") == 1


def test_fifty_jobs_at_once_have_an_environ_each(database: running.Database) -> None:
    here, all_are_here, seen = set[int](), Event(), set[int]()

    @job
    def work(number: int) -> None:
        environ = active_environ()
        assert environ is not None and "number" not in environ
        environ["number"] = number
        here.add(number)
        if len(here) == 50:
            all_are_here.set()
        assert all_are_here.wait(running.PATIENCE_SECONDS)
        assert (active_environ() or {})["number"] == number
        seen.add(id(environ))

    work.delay_many([(number,) for number in range(50)])
    work_off(GreenJobs(answering(lambda: None)), work, pool=50)
    assert (database.count(), len(seen)) == (0, 50)


# --- greenjobs run ----------------------------------------------------------------------------------------------------

SHOP = """
import contextlib
import bottle
from greenjobs import current_job, green, job
from greenjobs.contrib.wsgi import GreenJobs, active_environ

@job(queue="mail")
def send(to):
    print(f"mail to {to} as {active_environ()['shop.user']} {green.missing_patches()}", flush=True)

@contextlib.contextmanager
def around(environ):
    environ["shop.user"] = "nobody"
    try:
        yield
    finally:
        print("tidied up", flush=True)

inner = bottle.Bottle()

@inner.post("/orders/<to>")
def order(to):
    send.delay(to)
    if to == "Mallory":
        bottle.abort(403)
    return "thanks"

application = GreenJobs(inner, around=around, hold=True, database_url=URL, pool=7)
"""

ORDERS = """
from wsgiref.util import setup_testing_defaults
from shop import application

for name in ("Ann", "Mallory"):
    environ = {"PATH_INFO": f"/orders/{name}", "REQUEST_METHOD": "POST"}
    setup_testing_defaults(environ)
    body = application(environ, lambda status, headers, exc_info=None: print(name, status))
    list(body)
    getattr(body, "close", lambda: None)()
"""


@pytest.mark.parametrize("app", ["shop", "shop:application", "shop:inner", "tasks"])
def test_greenjobs_run_finds_the_surroundings(tmp_path: Path, database_url: str, app: str) -> None:
    processes.write_application(tmp_path, f"URL = {database_url!r}\n{SHOP}", name="shop.py")
    processes.write_application(tmp_path, "import shop", name="tasks.py")
    processes.write_application(tmp_path, ORDERS, name="orders.py")
    assert "Ann 200 OK" in processes.run("python", "orders.py", folder=tmp_path)
    lines = processes.run("greenjobs", "run", "--app", app, "--until-empty", folder=tmp_path).splitlines()
    begin = lines.index("mail to Ann as nobody ()")
    assert lines[begin + 1] == "tidied up"
    assert not [line for line in lines if "Mallory" in line]
    assert [line for line in lines if "queues: mail (7 at a time)" in line]


def test_middleware_is_found_where_greenjobs_run_looks(database: running.Database) -> None:
    import types

    module = types.ModuleType("shop")
    one, two = (GreenJobs(answering(lambda: None)) for _ in range(2))
    module.one, module.two = one, two  # type: ignore[attr-defined]
    assert equipment_of(one, "shop:one") is one
    with pytest.raises(ConfigError, match="app is 'shop', .* name the one, as in myapp:application"):
        equipment_of(module, "shop")
    module.application = two  # type: ignore[attr-defined]
    assert equipment_of(module, "shop") is two


def test_middleware_loads_neither_gevent_nor_psycopg2(tmp_path: Path) -> None:
    code = """
import sys
from greenjobs.contrib.wsgi import GreenJobs
GreenJobs(lambda environ, start_response: [])
print({"gevent", "psycopg2", "sqlalchemy", "flask"} & set(sys.modules))
"""
    assert processes.run("python", "-c", code, folder=tmp_path) == "set()\n"
