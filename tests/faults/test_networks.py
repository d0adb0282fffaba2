"""Faults of what is between runner and server: a network that falls silent, a pooler that shares sessions."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import free_port
from waiting import eventually

from greenjobs.migrate import migrate

from . import arena as arenas
from . import proxy as proxies
from .arena import Arena
from .conftest import MakeServer
from .proxy import Proxy
from .server import Server, give_to_account, run_as_account, workshop

POOL = 10
LOAD = ("--threads", "4", "--pause", "0.02")


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxies.opened(server.port) as proxy:
        yield proxy


def through(proxy: Proxy, arena: Arena) -> str:
    """The way to the arena's database by the proxy; the arena itself has another."""
    return f"postgresql://postgres@127.0.0.1:{proxy.port}/{arena.ledger.database_name}"


# --- silence ----------------------------------------------------------------------------------------------------------


def test_network_that_falls_silent_and_comes_back_costs_no_job_and_repeats_none(served: Arena, proxy: Proxy) -> None:
    served.runner("--pool", "50", url=through(proxy, served))
    served.runner("--pool", "50")
    served.enqueue("hold", POOL, gate="gate")
    load = served.load(*LOAD)
    served.ledger.wait_for_runs(POOL + 50)
    proxy.cut()
    served.open_gate("gate")
    served.ledger.wait_for_runs(served.ledger.run_count() + 100)
    proxy.mend()
    load.stop()
    served.ledger.settle()


def test_runner_that_the_server_has_given_up_unnoticed_changes_nothing_afterwards(served: Arena, proxy: Proxy) -> None:
    distant = served.runner("--pool", str(POOL), url=through(proxy, served))
    jobs = set(served.enqueue("hold", POOL, gate="gate"))
    served.ledger.wait_for_runs(POOL)
    proxy.cut()
    assert proxy.forget_clients()
    near = served.runner("--pool", str(POOL))
    near.wait_until_it_holds(1)
    served.open_gate("gate", only=distant)
    ended = "SELECT id FROM faults_runs WHERE runner = %s AND ended_at IS NOT NULL"
    eventually(lambda: len(served.ledger.rows(ended, distant.pid)) == POOL, "the jobs do not end", seconds=30)
    assert served.ledger.states().keys() == jobs
    proxy.mend()
    distant.process.wait_for_line("the session is back")
    served.open_gate("gate")
    balance = served.ledger.settle(may_run_twice=jobs)
    assert near.pid in {run.runner for runs in balance.twice.values() for run in runs}


# --- a cable that is pulled -------------------------------------------------------------------------------------------


class Island:
    """A network namespace with one cable, which can be pulled: no reset, no farewell, not even from the kernel."""

    def __init__(self) -> None:
        self.name = f"gjf-{uuid.uuid4().hex[:6]}"
        number = os.getpid() % 60
        self.near, self.far = f"10.213.{number}.1", f"10.213.{number}.2"

    def connect(self) -> None:
        outside, inside = f"{self.name}-o"[-15:], f"{self.name}-i"[-15:]
        self._outside = outside
        _ip(f"netns add {self.name}")
        _ip(f"link add {outside} type veth peer name {inside} netns {self.name}")
        _ip(f"addr add {self.near}/30 dev {outside}")
        _ip(f"link set {outside} up")
        _ip(f"-n {self.name} addr add {self.far}/30 dev {inside}")
        _ip(f"-n {self.name} link set {inside} up")

    def cut(self) -> None:
        _ip(f"link set {self._outside} down")

    def mend(self) -> None:
        _ip(f"link set {self._outside} up")

    def remove(self) -> None:
        _ip(f"netns del {self.name}")


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@pytest.fixture
def island() -> Iterator[Island]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace needs root and the program ip (Debian package iproute2)")
    island = Island()
    try:
        island.connect()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a network namespace cannot be made here: {error.stderr.decode().strip()}")
    try:
        yield island
    finally:
        island.remove()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_runner_whose_cable_is_pulled_loses_its_jobs_and_nobody_waits_for_ever(
    island: Island, make_server: MakeServer, tmp_path: Path, empty_database_url: str
) -> None:
    """TCP's keepalives tell both sides within half a minute."""
    server = make_server(listen_addresses=island.near)
    server.trust(f"{island.near}/30")
    migrate(server.url)
    with arenas.opened(tmp_path, server.url, empty_database_url) as arena:
        pull_the_cable_of_a_runner(arena, island, f"postgresql://postgres@{island.near}:{server.port}/postgres")


def pull_the_cable_of_a_runner(arena: Arena, island: Island, url: str) -> None:
    distant = arena.runner("--pool", str(POOL), url=url, inside=("ip", "netns", "exec", island.name))
    jobs = set(arena.enqueue("hold", POOL, gate="gate"))
    arena.ledger.wait_for_runs(POOL)
    near = arena.runner("--pool", str(POOL))
    island.cut()
    near.wait_until_it_holds(1)
    distant.process.wait_for_line("lost its session", seconds=120)
    arena.open_gate("gate")
    arena.ledger.wait_until_done(seconds=120)
    island.mend()
    distant.process.wait_for_line("the session is back", seconds=120)
    balance = arena.ledger.settle(may_run_twice=jobs)
    assert balance.twice.keys() == jobs


# --- a pooler ---------------------------------------------------------------------------------------------------------

_POOLER = """
[databases]
* = host={server} port={server_port} user=postgres
[pgbouncer]
unix_socket_dir = {folder}
listen_port = {port}
auth_type = any
pool_mode = transaction
default_pool_size = 8
max_client_conn = 300
"""


@pytest.fixture
def pooled_url(server: Server, served: Arena) -> Iterator[str]:
    """A way to the server through PgBouncer, where every transaction may be another session."""
    # Debian keeps it where only root's path leads.
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed (Debian package pgbouncer)")
    with workshop() as folder:
        give_to_account(folder)
        folder.chmod(0o700)
        port = free_port()
        file = folder / "pgbouncer.ini"
        file.write_text(_POOLER.format(server=server.folder / "s", server_port=server.port, folder=folder, port=port))
        file.chmod(0o644)
        with (folder / "log").open("wb") as log:
            pooler = run_as_account([program, str(file)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            ready = folder / f".s.PGSQL.{port}"
            eventually(lambda: ready.exists() or pooler.poll() is not None, "no pooler", seconds=30)
            assert pooler.poll() is None, (folder / "log").read_text()
            yield f"postgresql://postgres@/{served.ledger.database_name}?host={folder}&port={port}"
        finally:
            pooler.kill()
            pooler.wait()


def test_jobs_run_once_behind_a_pooler_by_lease_and_with_a_direct_way(served: Arena, pooled_url: str) -> None:
    ledger = served.ledger
    by_lease = served.runner("--pool", "20", url=pooled_url)
    load = served.load(*LOAD, url=pooled_url)
    ledger.wait_for_runs(50)
    by_lock = served.runner("--pool", "20", "--session-url", ledger.jobs_url, url=pooled_url)
    by_lease.terminate()
    assert by_lease.process.wait() == 0
    ledger.wait_for_runs(ledger.run_count() + 50)
    load.stop()
    balance = ledger.settle()
    assert {run.runner for runs in balance.runs.values() for run in runs} == {by_lease.pid, by_lock.pid}
    assert "by lease" in by_lease.process.output
    assert "by lease" not in by_lock.process.output


def test_runner_with_a_direct_way_that_is_killed_behind_a_pooler_is_noticed(served: Arena, pooled_url: str) -> None:
    direct_way = ("--session-url", served.ledger.jobs_url)
    doomed = served.runner("--pool", str(POOL), *direct_way, url=pooled_url)
    served.runner("--pool", str(POOL), *direct_way, url=pooled_url)
    served.enqueue("hold", POOL, gate="gate")
    served.ledger.wait_for_runs(POOL)
    held = doomed.freeze()
    doomed.kill()
    served.open_gate("gate")
    balance = served.ledger.settle(may_run_twice=held)
    assert balance.twice.keys() == held


@pytest.mark.long
@pytest.mark.timeout(300)
def test_runner_with_a_lease_that_is_killed_behind_a_pooler_is_noticed(served: Arena, pooled_url: str) -> None:
    doomed = served.runner("--pool", str(POOL), url=pooled_url)
    served.enqueue("hold", POOL, gate="gate")
    served.ledger.wait_for_runs(POOL)
    held = doomed.held()
    doomed.kill()
    served.open_gate("gate")
    served.runner("--pool", str(POOL), url=pooled_url)
    balance = served.ledger.settle(may_run_twice=held)
    assert balance.twice.keys() == held


@pytest.mark.long
@pytest.mark.timeout(300)
def test_job_that_blocks_the_event_loop_does_not_cost_its_runner_the_lease(served: Arena, pooled_url: str) -> None:
    """The lease lasts 20 s; a native thread renews it."""
    blocked = served.runner("--pool", str(POOL), url=pooled_url)
    served.enqueue("spin", seconds=45.0)
    blocked.wait_until_it_holds(1)
    served.runner("--pool", str(POOL), url=pooled_url)
    served.ledger.settle(seconds=120)
