"""Storage against a model of it: whatever happens, in whatever order, no job gets lost or has two owners.

The model is what the docstrings of greenjobs.storage promise, in plain Python. After every step each row of the table
is compared with it, so that a counter that is wrong once, an owner too many, or a row that is gone is found there.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gevent
import hypothesis.strategies as st
import psycopg2
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from greenjobs import inspection, pool, storage
from greenjobs.statement import PlanningConnection
from greenjobs.storage import Ended, Enqueued, Failure, Fence, NewJobs, Snoozed

QUEUES = ("mail", "index")
HOMES = {"send": "mail", "scan": "index"}
JOB_TYPES = list(HOMES)
REGISTERED = (JOB_TYPES, JOB_TYPES, JOB_TYPES[:1])  # most runners know all types
PRIORITIES = (-1, 0, 7)
KEYS = ("a", "b")
EXCLUSIVE = ("x", "y")
OUTCOMES = ("done", "failed", "retried", "retried later")
UNSTARTED = ("scheduled", "available")
MOST_CRASHES = 3
HOUR = 3600.0


def thoroughly(examples: int) -> settings:
    """So many histories of so many steps each; how long they take is the machine's business."""
    return settings(
        max_examples=examples,
        stateful_step_count=70,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@dataclass
class Row:
    """A row as it must be. `is_due`: whether its time has come, while it is scheduled."""

    id: int
    job_type: str
    queue: str | None
    priority: int
    state: str
    key: str | None = None
    attempt: int = 0
    retries: int = 0
    crashes: int = 0
    owner: int | None = None
    is_due: bool = True
    cancel_asked: bool = False
    exclusive: str | None = None


@dataclass
class Process:
    """A process that runs jobs: the ids it registered under, and its session while it has one."""

    ids: list[int]
    session: psycopg2.extensions.connection | None
    fences: list[Fence] = field(default_factory=list)

    @property
    def runner(self) -> int:
        return self.ids[-1]


class Storage(RuleBasedStateMachine):
    """`rows` is what is committed; what the open transaction has done stands beside it until it ends."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.connections = [connect(url) for _ in range(3)]
        self.open_transaction = connect(url)
        with self.open_transaction.cursor() as cursor:
            cursor.execute("TRUNCATE background_jobs, background_runners, background_waiting, background_history")
        self.rows: dict[int, Row] = {}
        self.history: dict[int, tuple[str, int]] = {}
        self.processes: list[Process] = []
        self.registered: set[int] = set()
        self.blamed: set[int] = set()
        self.is_open = False
        self.locked: dict[int, Row] = {}
        self.added: dict[int, Row] = {}
        self.claimed_in_transaction: list[tuple[Process, Fence]] = []

    def teardown(self) -> None:
        for connection in (*self.connections, self.open_transaction, *self._sessions()):
            connection.close()

    @initialize()
    def begin_with_work_and_workers(self) -> None:
        for keys, exclusive in ((["a", "b"], None), (None, None), (["a"], "x"), (None, "y")):
            self.enqueue(0, "send", "mail", 0, 0.0, keys, 4, exclusive)
        for _ in range(2):
            self.start_process()

    # --- enqueue ------------------------------------------------------------------------------------------------------

    @rule(
        which=st.integers(0, 2),
        job_type=st.sampled_from(JOB_TYPES),
        queue=st.sampled_from(QUEUES),
        priority=st.sampled_from(PRIORITIES),
        delay=st.sampled_from((0.0, HOUR)),
        keys=st.none() | st.lists(st.sampled_from(KEYS), min_size=1, max_size=3),
        count=st.integers(1, 3),
        exclusive=st.sampled_from((None, *EXCLUSIVE)),
    )
    def enqueue(
        self,
        which: int,
        job_type: str,
        queue: str,
        priority: int,
        delay: float,
        keys: list[str] | None,
        count: int,
        exclusive: str | None,
    ) -> None:
        if keys is not None and self._keys_in_transaction() & set(keys):
            return  # it would wait for the transaction, rightly
        data = ["{}"] * (len(keys) if keys else count)
        new = NewJobs(job_type, data, queue, priority, delay, unique_keys=keys)
        if exclusive is not None:
            new = new._replace(exclusive_key_of=lambda _: exclusive)
        enqueued = storage.enqueue(self.connections[which], [new])
        self._note_enqueued(self.rows, new, enqueued)

    @rule(job_type=st.sampled_from(JOB_TYPES), priority=st.sampled_from(PRIORITIES), is_routed=st.booleans())
    def insert_as_the_crate_does(self, job_type: str, priority: int, is_routed: bool) -> None:
        insert = "INSERT INTO background_jobs (job_type, data, priority) VALUES (%s, '{}', %s) RETURNING id"
        ((id,),) = self._read(insert, job_type, priority)
        self.rows[id] = Row(id, job_type, None, priority, "available")
        if is_routed:
            homeless = [row for row in self.rows.values() if row.queue is None]
            routed = storage.route(self.connections[1], HOMES)
            assert sorted(routed) == sorted({HOMES[row.job_type] for row in homeless})
            for row in homeless:
                row.queue = HOMES[row.job_type]

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = self._some(data, [id for id in self.rows if id not in self.locked])
        removed, asked = storage.cancel(self.connections[2], chosen)
        assert removed == sorted(id for id in chosen if self.rows[id].state in UNSTARTED)
        assert asked == sorted(id for id in chosen if self.rows[id].state == "running")
        for id in removed:
            del self.rows[id]
        for id in asked:
            self.rows[id].cancel_asked = True

    @precondition(lambda self: not any(row.cancel_asked for row in self.locked.values()))
    @rule()
    def remove_cancelled(self) -> None:
        """What was to be cancelled while it ran, and waits again instead."""
        gone = [row.id for row in self.rows.values() if row.cancel_asked and row.state in UNSTARTED]
        assert storage.remove_cancelled(self.connections[0]) == len(gone)
        for id in gone:
            del self.rows[id]

    # --- claim --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self._living())
    @rule(data=st.data(), which=st.integers(0, 2), limit=st.integers(1, 4), job_types=st.sampled_from(REGISTERED))
    def claim_some(self, data: st.DataObject, which: int, limit: int, job_types: list[str]) -> None:
        self._claim(data, which, limit, job_types)

    def _claim(self, data: st.DataObject, which: int, limit: int, job_types: list[str]) -> None:
        """Suspects, if there are any, and others: a runner may hold one with the other."""
        process = data.draw(st.sampled_from(self._living()))
        queue = data.draw(st.sampled_from(self._queues_with_work()))
        begins_behind: bool = data.draw(st.booleans())
        after = None
        if self.rows and begins_behind:
            place = data.draw(st.sampled_from(sorted(self.rows)))
            after = storage.ClaimCursor(-self.rows[place].priority, place)
        for suspects in (True, False):
            claimed = storage.claim(
                self.connections[which],
                runner=process.runner,
                queue=queue,
                job_types=job_types,
                limit=1 if suspects else limit,
                suspects=suspects,
                after=None if suspects else after,
            )
            expected = self._claimable(queue, job_types, suspects=suspects, after=None if suspects else after)
            self._check_claimed(claimed, expected[: 1 if suspects else limit])
            for row in expected[: 1 if suspects else limit]:
                self._start(row, process)
                process.fences.append(Fence(row.id, row.attempt))

    @precondition(lambda self: self._living())
    @rule(data=st.data())
    def claim_all(self, data: st.DataObject) -> None:
        """Again, so that more is under way when something happens."""
        self._claim(data, 0, 10, JOB_TYPES)

    @precondition(lambda self: self._living())
    @rule(
        data=st.data(),
        which=st.integers(0, 2),
        limit=st.integers(1, 3),
        job_types=st.sampled_from(REGISTERED),
        keys=st.none() | st.lists(st.sampled_from(EXCLUSIVE), min_size=1, max_size=2),
    )
    def claim_exclusive(
        self, data: st.DataObject, which: int, limit: int, job_types: list[str], keys: list[str] | None
    ) -> None:
        """The first in line of each key of which none runs; of suspects in front nothing is taken, nor behind them."""
        process = data.draw(st.sampled_from(self._living()))
        queue = data.draw(st.sampled_from(QUEUES))
        claimed = storage.claim_exclusive(
            self.connections[which], runner=process.runner, queue=queue, job_types=job_types, limit=limit, keys=keys
        )
        heads: dict[str, Row] = {}
        for row in sorted(self.rows.values(), key=lambda row: (-row.priority, row.id)):
            if row.exclusive and (row.state, row.queue) == ("available", queue) and row.job_type in job_types:
                heads.setdefault(row.exclusive, row)
        free = [key for key in heads if key not in self._taken() and (keys is None or key in keys)]
        expected = [row for row in heads.values() if row.exclusive in free and row.crashes == 0][:limit]
        self._check_claimed(claimed, expected)
        for row in expected:
            self._start(row, process)
            process.fences.append(Fence(row.id, row.attempt))

    @rule(data=st.data(), which=st.integers(0, 2), limit=st.integers(1, 5))
    def promote(self, data: st.DataObject, which: int, limit: int) -> None:
        promoted = storage.promote(self.connections[which], limit=limit)
        due = [row for row in self.rows.values() if row.state == "scheduled" and row.is_due]
        assert sum(promoted.values()) == min(limit, len(due))
        # Which of those that are due at the same time come first is not promised.
        states = dict(self._read("SELECT id, state FROM background_jobs"))
        moved = [row for row in due if states[row.id] == "available"]
        assert Counter(row.queue for row in moved) == promoted
        for row in moved:
            row.state = "available"

    # --- outcomes -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.processes)
    @rule(
        data=st.data(), which=st.integers(0, 2), outcome=st.sampled_from(("done", "failed", "retried", "retried later"))
    )
    def finish(self, data: st.DataObject, which: int, outcome: str) -> None:
        process, fences = self._some_fences(data)
        if not fences:
            return
        if outcome == "done":
            held = storage.acknowledge(self.connections[which], process.ids, fences)
            assert held == {row.id for row in self._held(process, fences)}
            for id in held:
                del self.rows[id]
            return
        retry_in = {"failed": None, "retried": 0.0, "retried later": HOUR}[outcome]
        failures = [Failure(fence, retry_in, {"error": "Oops"}) for fence in fences]
        held = storage.fail(self.connections[which], process.ids, failures)
        state = "failed" if retry_in is None else "scheduled"
        for row in self._check_back(process, fences, held, state, is_due=retry_in != HOUR):
            row.retries += 1

    @precondition(lambda self: self.processes)
    @rule(
        data=st.data(), which=st.integers(0, 2), outcome=st.sampled_from(("done", "discarded")), is_kept=st.booleans()
    )
    def finish_for_good(self, data: st.DataObject, which: int, outcome: str, is_kept: bool) -> None:
        process, fences = self._some_fences(data)
        if not fences:
            return
        ended = [Ended(fence, outcome, keep_seconds=HOUR if is_kept else 0.0) for fence in fences]
        held = storage.end(self.connections[which], process.ids, ended)
        assert held == {row.id for row in self._held(process, fences)}
        for id in held:
            row = self.rows.pop(id)
            if is_kept:
                self.history[id] = (outcome, row.attempt)

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), which=st.integers(0, 2), put_off=st.sampled_from((None, None, 0.0, HOUR)))
    def put_back(self, data: st.DataObject, which: int, put_off: float | None) -> None:
        process, fences = self._some_fences(data)
        if fences and put_off is None:
            held = storage.give_back(self.connections[which], process.ids, fences)
            self._check_back(process, fences, held, "available")
        elif fences and put_off is not None:
            held = storage.snooze(self.connections[which], process.ids, [Snoozed(fence, put_off) for fence in fences])
            self._check_back(process, fences, held, "scheduled", is_due=put_off == 0)

    # --- runners ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.processes) < 3)
    @rule()
    def start_process(self) -> None:
        session = connect(self.url)
        self.processes.append(Process([self._register(session, former=[])], session))

    @precondition(lambda self: self._living() and not self._keys_in_transaction())
    @rule(data=st.data(), is_noticed=st.booleans())
    def lose_session(self, data: st.DataObject, is_noticed: bool) -> None:
        process = data.draw(st.sampled_from(self._living()))
        self._end_session(process)
        if is_noticed:
            self.rescue(0)

    @precondition(lambda self: self._without_session())
    @rule(data=st.data())
    def register_again(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self._without_session()))
        process.session = connect(self.url)
        former = list(process.ids)
        process.ids.append(self._register(process.session, former=former))
        self.blamed.update(former)
        for row in self.rows.values():
            if row.owner in former:
                row.owner = process.runner

    @precondition(lambda self: not self._keys_in_transaction())
    @rule(which=st.integers(0, 2))
    def rescue(self, which: int) -> None:
        connection = self.connections[which]
        dead = inspection.dead_runners(connection)
        assert set(dead) == self.registered - {process.runner for process in self._living()}
        held = [row for row in self.rows.values() if row.owner in dead]
        suspected = {row.owner for row in held if row.crashes > 0}
        rescued = storage.rescue(connection, dead, most_crashes=MOST_CRASHES)
        ids = [row.id for row in held]
        keys = self._contested(ids)
        for row in held:
            is_news = row.owner not in self.blamed
            row.crashes += is_news and (row.crashes > 0 or row.owner not in suspected)
            self._send_back(row, "failed" if row.crashes >= MOST_CRASHES else "available", keys)
        self.blamed.update(dead)
        assert sorted((job.id, job.crashes, job.has_failed) for job in rescued) == sorted(
            (row.id, row.crashes, row.state == "failed") for row in held
        )

    @precondition(lambda self: self._living() and not self._keys_in_transaction())
    @rule(data=st.data())
    def end_process(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self._living()))
        held = [row for row in self.rows.values() if row.owner in process.ids]
        queues = storage.end_runners(self.connections[0], process.ids)
        assert set(queues) == {row.queue for row in held}
        keys = self._contested([row.id for row in held])
        for row in held:
            self._send_back(row, "available", keys)
        self.blamed.update(process.ids)
        self._end_session(process)
        self.processes.remove(process)

    # --- a transaction that takes its time ----------------------------------------------------------------------------

    @precondition(lambda self: self._living() and not self.is_open)
    @rule(data=st.data(), queue=st.sampled_from(QUEUES), limit=st.integers(1, 3))
    def begin_a_claim(self, data: st.DataObject, queue: str, limit: int) -> None:
        """As a claim is seen by others while it is under way."""
        process = data.draw(st.sampled_from(self._living()))
        self._begin()
        claimed = storage.claim(
            self.open_transaction, runner=process.runner, queue=queue, job_types=JOB_TYPES, limit=limit
        )
        expected = self._claimable(queue, JOB_TYPES)[:limit]
        self._check_claimed(claimed, expected)
        self.locked = {row.id: replace(row) for row in expected}
        for row in self.locked.values():
            self._start(row, process)
            self.claimed_in_transaction.append((process, Fence(row.id, row.attempt)))

    @precondition(lambda self: not self.is_open)
    @rule(keys=st.none() | st.lists(st.sampled_from(KEYS), min_size=1, max_size=2), queue=st.sampled_from(QUEUES))
    def begin_an_enqueue(self, keys: list[str] | None, queue: str) -> None:
        if any(self._doomed(self.rows, key) for key in keys or ()):
            return  # it would lock the rows that it removes
        self._begin()
        new = NewJobs("send", ["{}"] * (len(keys) if keys else 2), queue, unique_keys=keys)
        enqueued = storage.enqueue_inside(self.open_transaction, [new])
        seen = dict(self.rows)
        self._note_enqueued(seen, new, enqueued)
        self.added = {id: row for id, row in seen.items() if id not in self.rows}

    @precondition(lambda self: self.is_open)
    @rule(commits=st.booleans())
    def end_the_transaction(self, commits: bool) -> None:
        if commits:
            self.open_transaction.commit()
            self.rows.update(self.locked | self.added)
            for process, fence in self.claimed_in_transaction:
                process.fences.append(fence)
        else:
            self.open_transaction.rollback()
        self.open_transaction.autocommit = True
        self.is_open = False
        self.locked, self.added, self.claimed_in_transaction = {}, {}, []

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def every_row_is_as_the_model_has_it(self) -> None:
        read = self._read(
            "SELECT id, job_type, queue, priority, state, unique_key, attempt, retries, crashes, claimed_by,"
            " run_at <= now(), cancel_asked_at IS NOT NULL, exclusive_key FROM background_jobs"
        )
        found = {fields[0]: Row(*fields) for fields in read}
        for row in found.values():
            if row.state != "scheduled":  # only there does it matter, and is known
                row.is_due = self.rows[row.id].is_due if row.id in self.rows else True
        assert found == self.rows

    @invariant()
    def history_is_as_the_model_has_it(self) -> None:
        read = self._read("SELECT id, outcome, attempt FROM background_history")
        assert {id: (outcome, attempt) for id, outcome, attempt in read} == self.history

    @invariant()
    def a_key_has_one_unstarted_job_at_most(self) -> None:
        keys = Counter(row.key for row in self.rows.values() if row.key and row.state in UNSTARTED)
        assert all(count == 1 for count in keys.values())

    @invariant()
    def of_an_exclusive_key_one_job_runs_at_most(self) -> None:
        running = [row.exclusive for row in self.rows.values() if row.exclusive and row.state == "running"]
        assert len(running) == len(set(running))

    # --- the model ----------------------------------------------------------------------------------------------------

    def _doomed(self, rows: dict[int, Row], key: str | None) -> list[int]:
        """Jobs with this key that wait to be removed: who wants the key removes them."""
        if key is None:
            return []
        return [row.id for row in rows.values() if row.key == key and row.cancel_asked and row.state in UNSTARTED]

    def _note_enqueued(self, rows: dict[int, Row], new: NewJobs, enqueued: Sequence[Enqueued]) -> None:
        state = "scheduled" if new.delay_seconds else "available"
        keys: Sequence[str | None] = new.unique_keys or [None] * len(new.data)
        assert len(enqueued) == len(new.data)
        for key, each in zip(keys, enqueued, strict=True):
            for doomed in self._doomed(rows, key):
                del rows[doomed]
            id, is_duplicate = each.id, each.is_duplicate
            first = [row.id for row in rows.values() if key is not None and row.key == key and row.state in UNSTARTED]
            assert is_duplicate == bool(first)
            if is_duplicate:
                assert [id] == first
            else:
                assert id not in rows
                rows[id] = Row(id, new.job_type, new.queue, new.priority, state, key, is_due=not new.delay_seconds)
                (rows[id].exclusive,) = new.exclusive_keys(["{}"])

    def _claimable(
        self, queue: str, job_types: Iterable[str], *, suspects: bool = False, after: storage.ClaimCursor | None = None
    ) -> list[Row]:
        places = {id: storage.ClaimCursor(-row.priority, id) for id, row in self.rows.items()}
        found = [
            row
            for row in self.rows.values()
            if row.state == "available"
            and row.queue == queue
            and row.job_type in job_types
            and (row.crashes > 0) == suspects
            and (row.exclusive is None or (suspects and row.exclusive not in self._taken()))
            and row.id not in self.locked
            and (after is None or places[row.id] > after)
        ]
        return sorted(found, key=lambda row: places[row.id])

    def _taken(self) -> set[str]:
        """The exclusive keys of which a job runs."""
        return {row.exclusive for row in self.rows.values() if row.exclusive and row.state == "running"}

    def _queues_with_work(self) -> list[str]:
        """The queues where something can be claimed; all, if there are none."""
        waiting = {row.queue for row in self.rows.values() if row.state == "available"}
        return [queue for queue in QUEUES if queue in waiting] or list(QUEUES)

    def _check_claimed(self, claimed: Sequence[storage.ClaimedJob], expected: Sequence[Row]) -> None:
        assert [(job.id, job.attempt, job.retries, job.crashes) for job in claimed] == [
            (row.id, row.attempt + 1, row.retries, row.crashes) for row in expected
        ]

    def _start(self, row: Row, process: Process) -> None:
        row.state, row.owner, row.attempt = "running", process.runner, row.attempt + 1

    def _some_fences(self, data: st.DataObject) -> tuple[Process, list[Fence]]:
        """Claims of one process, some of them long over; none that would wait for the open transaction."""
        process = data.draw(st.sampled_from(self.processes))
        keys = self._keys_in_transaction()
        free = [
            fence
            for fence in process.fences
            if fence.id not in self.locked and (fence.id not in self.rows or self.rows[fence.id].key not in keys)
        ]
        # Of a job that was claimed twice, one claim at a time: an outcome is written once. Now and then the first.
        by_id = {fence.id: fence for fence in (reversed(free) if data.draw(st.booleans()) else free)}
        return process, [by_id[id] for id in self._some(data, sorted(by_id))]

    def _held(self, process: Process, fences: Iterable[Fence]) -> list[Row]:
        rows = [self.rows[fence.id] for fence in fences if fence.id in self.rows]
        attempts = dict(fences)
        return [row for row in rows if row.owner in process.ids and row.attempt == attempts[row.id]]

    def _check_back(
        self, process: Process, fences: Sequence[Fence], held: set[int], state: str, *, is_due: bool = True
    ) -> list[Row]:
        rows = self._held(process, fences)
        assert held == {row.id for row in rows}
        keys = self._contested([fence.id for fence in fences])
        for row in rows:
            self._send_back(row, state, keys)
            row.is_due = is_due
        return rows

    def _send_back(self, row: Row, state: str, keys: dict[int, str | None]) -> None:
        """A job that is to wait again takes its key back, unless another has it by now."""
        row.state, row.owner = state, None
        row.key = keys[row.id]

    def _contested(self, ids: Sequence[int]) -> dict[int, str | None]:
        """The keys of these jobs, by the database, each of which may be lost only to an unstarted job that has it."""
        found = dict(self._read("SELECT id, unique_key FROM background_jobs"))
        for id in ids:
            row = self.rows.get(id)
            if row is None or row.key is None or found[id] == row.key:
                continue
            assert found[id] is None
            rivals = [other for other in self.rows.values() if other.key == row.key and other.id != id]
            assert any(rival.state in UNSTARTED or (rival.id in ids and rival.id < id) for rival in rivals), row
        for id in ids:
            if id in self.rows and self.rows[id].state == "running":
                self.rows[id].key = found[id]
        return found

    # --- odds and ends ------------------------------------------------------------------------------------------------

    def _some(self, data: st.DataObject, ids: Sequence[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=4, unique=True)) if ids else []

    def _register(self, session: psycopg2.extensions.connection, *, former: Sequence[int]) -> int:
        runner = storage.register_runner(
            session, hostname="here", pid=1, version="0", queues={}, job_types=JOB_TYPES, former=former
        )
        self.registered.add(runner)
        return runner

    def _end_session(self, process: Process) -> None:
        assert process.session is not None
        process.session.close()
        process.session = None
        # The server takes a moment to notice; everything else here counts on what it has noticed.
        while process.runner not in inspection.dead_runners(self.connections[0]):
            gevent.sleep(0.001)

    def _living(self) -> list[Process]:
        return [process for process in self.processes if process.session is not None]

    def _without_session(self) -> list[Process]:
        return [process for process in self.processes if process.session is None]

    def _sessions(self) -> list[psycopg2.extensions.connection]:
        return [process.session for process in self.processes if process.session is not None]

    def _keys_in_transaction(self) -> set[str]:
        return {row.key for row in (*self.locked.values(), *self.added.values()) if row.key}

    def _begin(self) -> None:
        self.open_transaction.autocommit = False
        self.is_open = True

    def _read(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        with self.connections[0].cursor() as cursor:
            cursor.execute(sql, parameters or None)
            return cursor.fetchall()


def connect(url: str) -> PlanningConnection:
    # What waits for a lock here waits for ever: nothing else goes on meanwhile.
    return pool.connect(url, application_name="model", timeout_seconds=10, session={"lock_timeout": "2s"})


@pytest.mark.parametrize("examples", [15, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_storage_does_what_its_model_does(database_url: str, examples: int) -> None:
    run_state_machine_as_test(functools.partial(Storage, database_url), settings=thoroughly(examples))  # type: ignore[arg-type]  # it is only called
