"""Other job queues on PostgreSQL, measured the same way where they are installed.

Each is driven by a program of its own in this package, run by the interpreter that has the peer; see skeleton.py. Its
rate counts to the end of the last job, not to the last acknowledgement: stopping means something else to each.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from psycopg2.extensions import parse_dsn

from benchmarks.backlog import Backlog
from benchmarks.case import Case, Side, Sizes, Values
from benchmarks.cases import drain as drain_cases
from benchmarks.cases import enqueue as enqueue_cases
from benchmarks.cases import idle as idle_cases
from benchmarks.measure import Runners, drain, enqueue, run_program
from benchmarks.server import Database

_VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"

# Peers that keep their jobs in Redis lose them with it, as it is set up by default: not the same question.
_NOT_ON_POSTGRESQL = ("dramatiq", "celery")


@dataclass(frozen=True, slots=True)
class Peer:
    """Another job queue: its name here, its package, its program, and the table that holds jobs.

    `unfinished` is the condition that a job in the table is not finished. `options` are for the program's `run`.
    """

    name: str
    package: str
    table: str
    unfinished: str = "true"
    has_bulk: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable

    @property
    def module(self) -> str:
        """The program."""
        return f"benchmarks.peers.with_{self.package}"

    @property
    def rows(self) -> str:
        """What to count."""
        return f"{self.table} WHERE {self.unfinished}"

    def order(self, database: Database, action: str, **more: Any) -> dict[str, Any]:
        """As the program reads it."""
        return {"action": action, "parameters": parse_dsn(database.url), **more}

    def prepare(self, database: Database) -> None:
        """Have the peer make its tables, unless it has, and empty them."""
        if not database.has_table(self.table):
            run_program(self.module, self.order(database, "install"), python=self.python)
        database.execute(f"TRUNCATE {self.table} CASCADE")

    def enqueue(self, database: Database, mode: str, jobs: int, *, warm_up: int) -> float:
        """Jobs enqueued per second."""
        order = self.order(database, mode, jobs=jobs, warm_up=warm_up)
        return enqueue(database, order, module=self.module, table=self.rows, python=self.python)

    def runners(self, database: Database) -> Runners:
        """The peer's worker, running the jobs of this database."""
        order = self.order(database, "run", **self.options)
        return Runners(self.module, pool=drain_cases.POOL, more=order, python=self.python)


PEERS = (
    # Its cap on concurrency has to be twice its batch.
    Peer("pgqueuer", "pgqueuer", "pgqueuer", options={"batch_size": 25, "concurrency": 50}),
    Peer("pgqueuer, uncapped", "pgqueuer", "pgqueuer", options={"batch_size": 50, "concurrency": None}),
    Peer("procrastinate", "procrastinate", "procrastinate_jobs", "status IN ('todo', 'doing')"),
    Peer("huey", "huey", "huey_task", has_bulk=False),
    Peer("chancy", "chancy", "chancy_jobs", "state IN ('pending', 'running')"),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One question to greenjobs and to all peers that have an answer."""

    name: str
    title: str
    peers: Sequence[Peer]
    ours: Callable[[Sizes], Side]
    theirs: Callable[[Peer, Sizes, Database], Values]

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        """greenjobs first."""
        return [
            self.ours(sizes),
            *(Side(peer.name, partial(self.theirs, peer, sizes), migrated=False) for peer in self.peers),
        ]


def comparisons(python: str) -> tuple[Sequence[Case], Sequence[str]]:
    """The cases for the peers that this interpreter has, and a remark for each that it does not have."""
    peers: list[Peer] = []
    remarks: list[str] = []
    for peer in PEERS:
        version = _installed_version(python, peer.package)
        if version:
            peers.append(
                Peer(
                    f"{peer.name} {version}",
                    *(peer.package, peer.table, peer.unfinished, peer.has_bulk),
                    options=peer.options,
                    python=python,
                )
            )
        else:
            remarks.append(f"{peer.name}: {peer.package} is not installed for {python.rpartition('/')[2]}")
    remarks += [f"{name}: keeps its jobs in Redis, not in PostgreSQL" for name in _NOT_ON_POSTGRESQL]
    cases = (
        Comparison("peers_enqueue_one", "peers: enqueue, one after the other", _capable(peers), *_ENQUEUE_ONE),
        Comparison("peers_enqueue_bulk", "peers: enqueue in bulk", _with_bulk(peers), *_ENQUEUE_BULK),
        Comparison("peers_drain", "peers: drain, one process, 50 at a time", peers, *_DRAIN),
        Comparison("peers_latency", "peers: latency, idle worker", _capable(peers), *_LATENCY),
    )
    return cases, remarks


def _capable(peers: Sequence[Peer]) -> Sequence[Peer]:
    """One of each package: its options make a difference to draining only."""
    return list({peer.package: peer for peer in reversed(peers)}.values())[::-1]


def _with_bulk(peers: Sequence[Peer]) -> Sequence[Peer]:
    return [peer for peer in _capable(peers) if peer.has_bulk]


def _installed_version(python: str, package: str) -> str:
    found = subprocess.run([python, "-c", _VERSION, package], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""


# --- the questions ----------------------------------------------------------------------------------------------------

_ENQUEUED_ONE = 2_000
_ENQUEUED_TOGETHER = 20_000
_DRAINED = 10_000
_WAITED_FOR = 100
_WARM_UP = 10


def _enqueue_one(peer: Peer, sizes: Sizes, database: Database) -> Values:
    peer.prepare(database)
    return {"rate": peer.enqueue(database, "one", sizes.of(_ENQUEUED_ONE, at_least=20), warm_up=_WARM_UP)}


def _enqueue_bulk(peer: Peer, sizes: Sizes, database: Database) -> Values:
    peer.prepare(database)
    return {"rate": peer.enqueue(database, "several", sizes.of(_ENQUEUED_TOGETHER, at_least=100), warm_up=_WARM_UP)}


def _drain(peer: Peer, sizes: Sizes, database: Database) -> Values:
    jobs = sizes.of(_DRAINED, at_least=100)
    peer.prepare(database)
    peer.enqueue(database, "several" if peer.has_bulk else "one", jobs, warm_up=0)
    database.settle(peer.table)
    report = drain(database, peer.runners(database), table=peer.rows, jobs=jobs)
    return {"rate": jobs / (report.marks[-1] - report.first_at)}


def _latency(peer: Peer, sizes: Sizes, database: Database) -> Values:
    peer.prepare(database)
    return idle_cases.latencies(
        database,
        peer.runners(database),
        enqueuer=peer.module,
        order=peer.order(database, "paced"),
        jobs=sizes.of(_WAITED_FOR, at_least=10),
        python=peer.python,
    )


def _our_enqueue(name: str, mode: str, jobs: int) -> Callable[[Sizes], Side]:
    return lambda sizes: enqueue_cases.Enqueue(name, "", mode=mode, jobs=jobs).sides(sizes)[0]


def _our_drain(sizes: Sizes) -> Side:
    return drain_cases.greenjobs_side(Backlog(sizes.of(_DRAINED, at_least=100)))


def _our_latency(sizes: Sizes) -> Side:
    return idle_cases.Latency("", "", jobs=_WAITED_FOR).sides(sizes)[0]


_ENQUEUE_ONE = (_our_enqueue("peers_enqueue_one", "one", _ENQUEUED_ONE), _enqueue_one)
_ENQUEUE_BULK = (_our_enqueue("peers_enqueue_bulk", "several", _ENQUEUED_TOGETHER), _enqueue_bulk)
_DRAIN = (_our_drain, _drain)
_LATENCY = (_our_latency, _latency)
