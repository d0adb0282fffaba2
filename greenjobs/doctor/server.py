"""Checks of the database and its server: whether runners can reach it, write to it, and hold what they need there."""

from __future__ import annotations

import os
import time
import uuid
from datetime import datetime, timezone

import gevent
import gevent.socket
from gevent.socket import wait_read
from psycopg2 import extensions

from greenjobs import inspection, migrate
from greenjobs.doctor.case import Case, Check
from greenjobs.doctor.finding import Verdict, fail, ok, skipped, warn
from greenjobs.embedded import is_embedded_url
from greenjobs.errors import DatabaseUnavailable, SchemaError
from greenjobs.inspection import fitness
from greenjobs.pool import parameters_of
from greenjobs.redaction import redact
from greenjobs.service import SERVICE_CONNECTIONS

_NAP_SECONDS = 0.2
_NOTIFY_SECONDS = 4.0
_POOLER_SECONDS = 2.0

# A process for jobs has one job at a time: a connection that is lent to it, and one on which it enqueues.
_PROCESS_CONNECTIONS = 2

# Two connections may have to be opened.
_SESSION_SECONDS = 12.0

_CLOCK_LOOKS = 3

# An embedded server may have to be made first.
_FIRST_CONNECTION_SECONDS = 60.0

_DIRECT_WAY = "let session_url (--session-url, GREENJOBS_SESSION_URL) name a direct way to the same database"


def connection(case: Case) -> Verdict:
    """Whether the database can be reached, and in what time."""
    url = case.settings.require_database_url()
    shown = redact(url)
    if unknown := _unknown_hosts(url, case.limits.connect_seconds):
        return fail(
            f"{shown}: the name of the host cannot be looked up: {', '.join(unknown)}",
            "correct database_url, or the DNS",
        )
    began = time.monotonic()
    try:
        reached = case.connection()
    except DatabaseUnavailable as error:
        return fail(str(error), "start the server, or correct database_url")
    took = (time.monotonic() - began) * 1000
    server = fitness.server(reached)
    development = ", a private server for development" if is_embedded_url(url) else ""
    return ok(f"{shown}{development}: PostgreSQL {server.version}, as {server.user}, connected in {took:.0f} ms")


def writes(case: Case) -> Verdict:
    """Whether the server takes writes from this role."""
    reached = case.connection()
    if fitness.server(reached).in_recovery:
        return fail("the server is a standby, which takes no jobs", "let database_url lead to the primary")
    if fitness.settings(reached, "default_transaction_read_only").get("default_transaction_read_only") == "on":
        return fail(
            "default_transaction_read_only is on, for the server, the database or the role",
            "turn it off, as with ALTER ROLE … RESET default_transaction_read_only",
        )
    return ok("the server is a primary, and takes writes")


def isolation(case: Case) -> Verdict:
    """Whether transactions see what was committed before each of their statements, as claims are written for."""
    name = "default_transaction_isolation"
    found = fitness.settings(case.connection(), name).get(name)
    if found != "read committed":
        return warn(
            f"{name} is {found!r}: claims of several runners fail now and then, and have to be tried again",
            "let it be 'read committed' for the role of greenjobs, as with ALTER ROLE … SET; jobs can ask for another",
        )
    return ok("transactions begin as read committed")


def encoding(case: Case) -> Verdict:
    """Whether the database can hold any text."""
    found = fitness.server(case.connection()).encoding
    if found != "UTF8":
        return warn(f"the encoding of the database is {found}: payloads with other characters are refused", "use UTF8")
    return ok("the encoding of the database is UTF8")


def durability(case: Case) -> Verdict:
    """Whether what was committed is on the disk."""
    names = ("fsync", "full_page_writes", "synchronous_commit")
    off = [name for name, value in fitness.settings(case.connection(), *names).items() if value == "off"]
    if off:
        return warn(
            f"{' and '.join(sorted(off))} {'is' if len(off) == 1 else 'are'} off: a crash of the server can lose jobs "
            f"that were committed, and bring back jobs that were done",
            "turn it on, but for tests and development",
        )
    return ok("what is committed survives a crash of the server")


def schema(case: Case) -> Verdict:
    """Whether the tables are those of this release."""
    try:
        later = migrate.require_current(case.connection())
    except SchemaError as error:
        message, _, remedy = str(error).partition("; ")
        return fail(message, remedy)
    if later:
        return warn(
            f"a later release has applied {', '.join(later)}; this one works with that",
            "let this one be replaced as well, or go on as it is",
        )
    return ok(f"the tables are up to date: {migrate.load()[-1].label}")


def rights(case: Case) -> Verdict:
    """Whether this role may do all that runners do."""
    reached = case.connection()
    found = fitness.tables(reached)
    if not found:
        return skipped("the tables are not there yet")
    missing = [f"{', '.join(table.missing_rights)} on {table.name}" for table in found.values() if table.missing_rights]
    missing += [f"USAGE on {sequence}" for sequence in fitness.unusable_sequences(reached)]
    user = fitness.server(reached).user
    if missing:
        return fail(
            f"{user} lacks {'; '.join(missing)}", f"as the owner of the tables: `greenjobs migrate --grant run={user}`"
        )
    return ok(f"{user} has every right on the tables that runners need")


def overlap(case: Case) -> Verdict:
    """Whether two connections of psycopg2 wait at the same time."""
    events: list[str] = []

    def nap(reached: extensions.connection) -> None:
        events.append("begins")
        fitness.nap(reached, _NAP_SECONDS)
        events.append("ends")

    gevent.joinall(
        [gevent.spawn(nap, reached) for reached in (case.connection(), case.second_connection())], raise_error=True
    )
    if events[:2] == ["begins", "begins"]:
        return ok("two pg_sleep overlap")
    return fail(
        "two pg_sleep come one after the other: psycopg2 holds up all jobs while one waits for the database",
        "call greenjobs.green.patch() before anything else, or start with `greenjobs run`",
    )


def session(case: Case) -> Verdict:
    """Whether a runner can hold a lock there, and the others see it."""
    mode = case.settings.session
    try:
        reached = case.session()
    except DatabaseUnavailable as error:
        return fail(str(error), "correct session_url, or leave it out where no pooler is in between")
    if reached.is_pooled:
        shares = _changes_sessions(case)
        if mode == "lock" and shares:
            return fail("session is 'lock', and a pooler in transaction mode keeps no locks", _DIRECT_WAY)
        if mode != "lock":
            kind = "in transaction mode" if shares else "which keeps sessions, as far as can be seen"
            lost = "runners live by a lease, find jobs by polling, and take over those of dead ones after 20 s"
            remedy = _DIRECT_WAY if shares else f"{_DIRECT_WAY}; or set session to 'lock'"
            return warn(f"a pooler is in between, {kind}: {lost}", remedy)
    if not fitness.lock_is_seen(reached, case.connection()):
        return fail(
            f"a lock taken by {redact(case.session_url)} is not there, seen from the database of the jobs: "
            f"runners would take each other for dead",
            "let session_url lead to the same database, and through no pooler",
        )
    if mode == "lease":
        return ok("a lock is held and seen; but session is 'lease', so that runners find jobs by polling")
    return ok("a lock of a session is held, and seen by others")


def notify(case: Case) -> Verdict:
    """Whether a notification arrives where a runner listens."""
    reached = case.session()
    if reached.is_pooled and case.settings.session != "lock":
        return skipped("a pooler passes no notifications on; runners find jobs by polling")
    if case.settings.session == "lease":
        return skipped("session is 'lease'; runners find jobs by polling")
    channel, payload = f"greenjobs_doctor_{os.getpid()}", uuid.uuid4().hex
    fitness.listen(reached, channel)
    began = time.monotonic()
    fitness.notify(case.connection(), channel, payload)
    arrived = _arrives(reached, payload)
    took = (time.monotonic() - began) * 1000
    if not arrived:
        return fail(
            f"a notification did not arrive within {_NOTIFY_SECONDS:g} s: idle runners find jobs by polling alone",
            "let session_url lead to the same database, and through no pooler",
        )
    fitness.unlisten(reached, channel)
    return ok(f"a notification went there and back in {took:.1f} ms")


def keepalives(case: Case) -> Verdict:
    """Whether the server notices soon that the host of a runner is gone."""
    reached = case.session()
    if fitness.server(reached).is_local:
        return ok("connected by a Unix socket, whose end the server notices at once")
    if reached.is_pooled:
        return skipped("a pooler is in between; runners live by a lease")
    idle = int(fitness.settings(reached, "tcp_keepalives_idle", of_session=True).get("tcp_keepalives_idle", 0))
    if not 0 < idle <= 60:
        return warn(
            f"the server asks for a sign of life only after {idle} s, whatever a session wishes: the jobs of a host "
            f"that is gone wait so long",
            "set tcp_keepalives_idle = 10, tcp_keepalives_interval = 5 and tcp_keepalives_count = 3 for the server",
        )
    return ok(f"the server asks for a sign of life after {idle} s of silence")


def clock(case: Case) -> Verdict:
    """How far this machine's clock is from that of the server, which decides when jobs are due."""
    looks = []
    for _ in range(_CLOCK_LOOKS):
        sent = time.time()
        there = inspection.now(case.connection()).timestamp()
        received = time.time()
        looks.append((received - sent, there - (sent + received) / 2))
    took, ahead = min(looks)
    limits = case.limits
    text = f"the clock of the server is {abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'} that of this machine"
    uncertain = took / 2
    if abs(ahead) - uncertain > limits.clock_failure_seconds:
        return fail(f"{text}: instants that are made here, for run_at, are wrong by as much", "set both by NTP")
    if abs(ahead) - uncertain > limits.clock_seconds:
        return warn(f"{text}: instants that are made here, for run_at, are wrong by as much", "set both by NTP")
    return ok(f"{text}, give or take {uncertain:.3f} s, at {datetime.now(timezone.utc):%H:%M:%S} UTC")


def connections(case: Case) -> Verdict:
    """Whether the server has room for the connections of all runners."""
    reached = case.connection()
    if reached.is_pooled:
        return skipped("a pooler is in between, which has a limit of its own")
    room, settings = fitness.room(reached), case.settings
    least = SERVICE_CONNECTIONS + 1
    most = least + settings.job_connections + settings.enqueue_connections
    if any(job.policy.executor == "process" for job in case.application.jobs.values()):
        most += _PROCESS_CONNECTIONS * (settings.job_processes or os.cpu_count() or 1)
    live = len(inspection.live_runners(reached))
    runners = live + settings.processes
    limits = {
        "max_connections, less those that are reserved": room.server - room.reserved - room.others,
        "the limit of the database": room.database and room.database - room.others,
        "the limit of the role": room.role,
    }
    which, free = min(((name, left) for name, left in limits.items() if left is not None), key=lambda limit: limit[1])
    text = (
        f"{live} live runners and {settings.processes} to come need {runners * least} connections for themselves, and "
        f"up to {runners * most} with those of their jobs; there are {free} ({which}, without {room.others} of others)"
    )
    if runners * least > free:
        return fail(text, "raise max_connections, or run fewer processes")
    if runners * most > free:
        return warn(
            text, "raise max_connections, or lower job_connections and enqueue_connections, or run fewer processes"
        )
    return ok(text)


CHECKS = (
    Check("connection", connection, seconds=_FIRST_CONNECTION_SECONDS),
    Check("writes", writes, needs=("connection",)),
    Check("isolation", isolation, needs=("connection",)),
    Check("encoding", encoding, needs=("connection",)),
    Check("durability", durability, needs=("connection",)),
    Check("schema", schema, needs=("connection",)),
    Check("rights", rights, needs=("connection",)),
    Check("database waits", overlap, needs=("connection",)),
    Check("session", session, needs=("connection",), seconds=_SESSION_SECONDS),
    Check("notify", notify, needs=("session", "writes")),
    Check("keepalives", keepalives, needs=("session",)),
    Check("clock", clock, needs=("connection",)),
    Check("connections", connections, needs=("schema",)),
)


def _unknown_hosts(url: str, seconds: float) -> list[str]:
    """The hosts of a URL, when none of them can be looked up: libpq would do that in C, for as long as it takes."""
    if is_embedded_url(url):
        return []
    try:
        given = parameters_of(url)
    except DatabaseUnavailable:
        return []  # which connecting will say better
    hosts = [host for host in str(given.get("host") or "").split(",") if host and host[0] not in "/@"]
    if not hosts or given.get("hostaddr"):
        return []
    for host in hosts:
        try:
            with gevent.Timeout(seconds, TimeoutError("no answer")):
                gevent.socket.getaddrinfo(host, None)
        except OSError:
            continue
        return []
    return hosts


def _changes_sessions(case: Case) -> bool:
    """Whether a connection has another session of the server while somebody else holds the one that it had.

    A pooler gives its clients the session that came back last. Whoever has to wait for another shares them, too.
    """
    reached, other = case.session(), case.second_session()
    before = fitness.backend(reached)
    with fitness.held_transaction(other):
        try:
            with gevent.Timeout(_POOLER_SECONDS, TimeoutError("no other session")):
                return fitness.backend(reached) != before
        except TimeoutError:
            return True


def _arrives(reached: extensions.connection, payload: str) -> bool:
    deadline = time.monotonic() + _NOTIFY_SECONDS
    while not any(each.payload == payload for each in reached.notifies):
        left = deadline - time.monotonic()
        try:
            wait_read(reached.fileno(), timeout=max(left, 0.001), timeout_exc=TimeoutError())
        except TimeoutError:
            return False
        reached.poll()
    return True
