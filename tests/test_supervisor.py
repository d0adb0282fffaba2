"""`greenjobs run` with several processes, with limits on them, and with a reload: real processes, and what they print.

Nothing but the names of signals and files passes between a test and the processes: jobs wait at a gate, which is a
file, and write to a ledger, which is a table.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import databases
import processes
import pytest
from processes import Process
from waiting import eventually

from greenjobs import config, memory
from greenjobs import order as orders
from greenjobs.errors import ConfigError

APPLICATION = """
    import os, signal, subprocess, time
    import gevent.lock, gevent.monkey, psycopg2
    from greenjobs import config, current_job, job

    VERSION = "old"
    connection = None
    turn = gevent.lock.RLock()
    leaked = []

    def write(what):
        global connection
        with turn:
            if connection is None:
                connection = psycopg2.connect(config.current().require_database_url())
                connection.autocommit = True
            with connection.cursor() as cursor:
                values = (current_job.id, what, os.getpid())
                cursor.execute("INSERT INTO ledger (job, what, pid) VALUES (%s, %s, %s)", values)

    @job
    def note():
        write(VERSION)

    @job
    def nap():
        time.sleep(0.02)
        write("napped")

    @job
    def wait_at_gate():
        write(f"{VERSION} began")
        while not os.path.exists("gate"):
            time.sleep(0.01)
        write(f"{VERSION} ended")

    @job
    def have_a_program_wait_at_gate():
        write("program began")
        subprocess.run(["sh", "-c", "until test -e gate; do sleep 0.05; done"], check=True)
        write("program ended")

    @job
    def leak():
        time.sleep(0.1)
        leaked.append(b"x" * 20 * 2**20)
        write("leaked")

    @job
    def hold_the_event_loop():
        write("began")
        while True:
            gevent.monkey.get_original("time", "sleep")(1)
"""

# What `greenjobs run` is, but for how long it waits for a process that hangs.
IMPATIENT = """
from greenjobs import supervisor
supervisor.STUCK_SECONDS = 0.5
from greenjobs.__main__ import main
main()
"""


class Fleet:
    """A supervisor and its children."""

    def __init__(self, process: Process, folder: Path, cursor: Any) -> None:
        self.process = process
        self.folder = folder
        self._cursor = cursor

    @property
    def supervisors(self) -> list[int]:
        """The supervisor, by process id; none where it was not asked for."""
        return [int(pid) for pid in re.findall(r"supervisor: .*, supervisor (\d+) of", self.process.output)]

    @property
    def children(self) -> list[int]:
        """All that were ever started, in that order, by process id."""
        return [int(pid) for pid in re.findall(r"supervisor: process (\d+) is starting", self.process.output)]

    def wait_until_up(self, count: int) -> list[int]:
        """Block until so many children have come up since the start; returns them all."""
        self.process.wait_for_line(rf"(?:supervisor: process \d+ is up[\s\S]*){{{count}}}")
        return [int(pid) for pid in re.findall(r"supervisor: process (\d+) is up", self.process.output)]

    def enqueue(self, job_type: str, count: int = 1) -> None:
        enqueue(self._cursor, job_type, count)

    def ledger(self, what: str = "%") -> list[tuple[int, str, int]]:
        """What the jobs wrote: job, what, and process, in that order."""
        self._cursor.execute("SELECT job, what, pid FROM ledger WHERE what LIKE %s ORDER BY id", (what,))
        return list(self._cursor.fetchall())

    def wait_for_entries(self, what: str, count: int = 1) -> list[tuple[int, str, int]]:
        """Block until the jobs have written this so many times; returns the entries."""
        seen = f"{count} entries like {what!r} in the ledger"
        eventually(lambda: len(self.ledger(what)) >= count, seen, seconds=processes.PATIENCE_SECONDS)
        return self.ledger(what)

    def waiting_jobs(self) -> int:
        """How many jobs there are that are not finished."""
        self._cursor.execute("SELECT count(*) FROM background_jobs")
        return int(self._cursor.fetchone()[0])

    def open_gate(self) -> None:
        (self.folder / "gate").touch()

    def wait_until_gone(self, pids: list[int]) -> None:
        eventually(
            lambda: not [pid for pid in pids if is_alive(pid)],
            f"not all of {pids} are gone: {self.process.output}",
            seconds=processes.PATIENCE_SECONDS,
        )


def enqueue(cursor: Any, job_type: str, count: int) -> None:
    columns, values = "job_type, data, queue", "%s, '{}', 'default' FROM generate_series(1, %s)"
    cursor.execute(f"INSERT INTO background_jobs ({columns}) SELECT {values}", (job_type, count))


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended, and whom its parent has not yet taken note of, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return sys.platform != "linux"


@contextlib.contextmanager
def fleet(
    folder: Path,
    database_url: str,
    *arguments: str,
    code: str = APPLICATION,
    command: tuple[str, ...] = ("greenjobs",),
    environment: dict[str, str] | None = None,
) -> Iterator[Fleet]:
    """`greenjobs run` with these arguments; ended at the end, and with it its children, in sessions of their own.

    One job at a time in each process, and none ahead, unless the arguments say otherwise.
    """
    if not (folder / "app.py").exists():
        processes.write_application(folder, code)
    words = (*command, "run", "--pool", "1", "--read-ahead", "0", "--poll-interval", "0.05", *arguments)
    with databases.administration(database_url) as cursor:
        cursor.execute("CREATE TABLE ledger (id serial, job bigint, what text, pid int)")
        with processes.start(*words, folder=folder, database_url=database_url, environment=environment) as process:
            started = Fleet(process, folder, cursor)
            try:
                yield started
            finally:
                # The supervisor first, or it would replace them; in a terminal it is not the process that was started.
                for pid in filter(is_alive, started.supervisors + started.children):
                    os.kill(pid, signal.SIGKILL)


# Who asks for a supervisor


@pytest.mark.parametrize(
    "line",
    [
        "run --processes 2",
        "run --pool 5 --processes=2 --app jobs",
        "run --max-jobs 1000",
        "run --max-memory 500",
        "run --reload",
        "run --processes 1 --processes 3",
    ],
)
def test_supervisor_is_asked_for_by(line: str) -> None:
    assert orders.order_in(line.split()) is not None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "run",
        "run --processes 1",
        "run --processes 3 --processes 1",
        "run --processes 2 --help",
        "run --processes",
        "run --processes 0",
        "run --max-jobs many",
        "run --processes 2 --log-level LOUD",
        "status --processes 2",
        "migrate",
    ],
)
def test_supervisor_is_not_asked_for_by(line: str) -> None:
    assert orders.order_in(line.split()) is None


def test_supervisor_is_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENJOBS_PROCESSES", "3")
    order = orders.order_in(["run", "--until-empty"])
    assert order is not None
    assert (order.settings.processes, order.until_empty, order.reload) == (3, True, False)


def test_supervisor_is_asked_for_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "setup.cfg").write_text("[greenjobs]\nmax_memory = 700\n")
    monkeypatch.chdir(tmp_path)
    order = orders.order_in(["run"])
    assert order is not None
    assert order.settings.max_memory == 700


def test_child_asks_for_no_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(orders.SUPERVISED, "1:3")
    assert orders.order_in(["run", "--processes", "2"]) is None


def test_supervisor_loads_nothing_that_its_children_need() -> None:
    code = """
import sys
import greenjobs.__main__
print({"click", "gevent", "greenjobs.cli", "psycopg2"} & set(sys.modules))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_wrong_value_is_refused_at_start(tmp_path: Path) -> None:
    output = processes.run("greenjobs", "run", "--processes", "0", folder=tmp_path, status=2)
    assert "processes is '0' (an argument); the value must be a whole number from 1 to 1,000." in output


@pytest.mark.parametrize(("option", "value"), [("max_jobs", "0"), ("max_memory", "1.5"), ("max_memory", "0")])
def test_limit_that_is_no_positive_whole_number_is_refused(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is '{value}' .*; the value must be a whole number of "):
        config.check({option: value})


def test_run_that_was_called_in_another_way_says_that_it_has_no_supervisor(tmp_path: Path) -> None:
    code = "from greenjobs import cli; cli.main(['run', '--processes', '2'])"
    output = processes.run("python", "-c", code, folder=tmp_path, status=2)
    assert "need a supervisor" in output


def test_memory_of_a_process_is_what_it_occupies() -> None:
    before = memory.resident_megabytes()
    block = b"x" * 100 * 2**20
    assert 95 < memory.resident_megabytes() - before < 150
    del block


# Start


def test_application_that_cannot_be_imported_ends_the_supervisor_with_its_one_traceback(
    tmp_path: Path, database_url: str
) -> None:
    with fleet(tmp_path, database_url, "--processes", "4", code="1 / 0") as broken:
        assert broken.process.wait() == 2
        assert broken.process.output.count("ZeroDivisionError: division by zero") == 1
        assert len(broken.children) == 1


def test_wrong_command_line_ends_the_supervisor(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--processes", "2", "--colour", "red") as mistaken:
        assert mistaken.process.wait() == 2
        assert "--colour" in mistaken.process.output


def test_process_that_keeps_dying_is_started_again_for_ever_and_later_each_time(
    tmp_path: Path, database_url: str
) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with fleet(tmp_path, database_url, "--max-jobs", "5", code=code) as dying:
        dying.process.wait_for_line(
            r"WARNING .*was ended by SIGKILL .* early death 1 in a row; starting another in 0\.[01] s$"
        )
        dying.process.wait_for_line(
            r"ERROR .*was ended by SIGKILL .* early death 3 in a row; starting another in 0\.[2-4] s$"
        )
        assert dying.process.is_running
        dying.process.terminate()
        assert dying.process.wait() == 0


# Death


def test_killed_child_is_replaced_and_its_job_runs_again(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--max-jobs", "100") as bereft:
        bereft.enqueue("wait_at_gate")
        [(job, _, victim)] = bereft.wait_for_entries("old began")
        os.kill(victim, signal.SIGKILL)
        bereft.process.wait_for_line(f"WARNING .*process {victim} was ended by SIGKILL")
        bereft.open_gate()
        [(ended, _, successor)] = bereft.wait_for_entries("old ended")
        assert ended == job
        assert [victim, successor] == bereft.children


def test_children_of_a_killed_supervisor_finish_what_they_run_and_end(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--processes", "2") as orphaned:
        children = orphaned.wait_until_up(2)
        orphaned.enqueue("wait_at_gate", 2)
        orphaned.wait_for_entries("old began", 2)
        orphaned.enqueue("note", 10)
        orphaned.process.kill()
        eventually(
            lambda: orphaned.process.output.count("the supervisor is gone; stopping") == 2,
            "the children did not notice",
            seconds=processes.PATIENCE_SECONDS,
        )
        orphaned.open_gate()
        orphaned.wait_until_gone(children)
        assert Counter(orphaned.ledger()) == Counter(orphaned.ledger("old began") + orphaned.ledger("old ended"))
        assert (len(orphaned.ledger("old ended")), orphaned.waiting_jobs()) == (2, 10)


def test_child_that_hangs_when_its_supervisor_is_killed_ends_all_the_same(tmp_path: Path, database_url: str) -> None:
    command = ("python", "-c", IMPATIENT)
    with fleet(tmp_path, database_url, "--max-jobs", "9", "--grace", "0.1", command=command) as orphaned:
        children = orphaned.wait_until_up(1)
        orphaned.enqueue("hold_the_event_loop")
        orphaned.wait_for_entries("began")
        orphaned.process.kill()
        orphaned.wait_until_gone(children)


def test_child_whose_supervisor_is_gone_when_it_starts_ends_at_once(tmp_path: Path) -> None:
    """Whoever is its parent now: not the process that it was told of."""
    code = f"""
import os
from greenjobs import config, supervised
os.environ["{orders.SUPERVISED}"] = f"{{os.getpid()}}:{{os.pipe()[0]}}"
supervised.Line.open(config.load())
print("open")
"""
    assert "open" not in processes.run("python", "-c", code, folder=tmp_path, status=1)


if sys.platform == "linux":

    def test_death_of_the_supervisor_reaches_a_child_whose_line_is_held_open(tmp_path: Path) -> None:
        """The child of this test has both ends of it, so that nothing is ever heard of an end."""
        child = (
            "from greenjobs import config, supervised; supervised.Line.open(config.load()); print('open', flush=True)"
        )
        parent = f"""
import os, signal, subprocess, sys
pipe = os.pipe()
environment = {{**os.environ, "{orders.SUPERVISED}": f"{{os.getpid()}}:{{pipe[0]}}"}}
child = "{child}; import signal; signal.pause()"
print(subprocess.Popen([sys.executable, "-c", child], env=environment, pass_fds=pipe).pid, flush=True)
signal.pause()
"""
        with processes.start("python", "-c", parent, folder=tmp_path) as process:
            pid = int(process.wait_for_line(r"^\d+$")[0])
            process.wait_for_line("^open$")
            process.kill()
            eventually(lambda: not is_alive(pid), "the child lives on", seconds=processes.PATIENCE_SECONDS)


# Stop


def test_sigterm_lets_all_children_finish_what_they_run(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--processes", "2") as stopping:
        children = stopping.wait_until_up(2)
        stopping.enqueue("wait_at_gate", 2)
        stopping.wait_for_entries("old began", 2)
        stopping.enqueue("note", 10)
        stopping.process.terminate()
        stopping.process.wait_for_line(r"(?:claims no more; 1 jobs are still running[\s\S]*){2}")
        stopping.open_gate()
        assert stopping.process.wait() == 0
        assert {pid for _, _, pid in stopping.ledger("old ended")} == set(children)
        assert stopping.waiting_jobs() == 10
        stopping.wait_until_gone(children)


def test_ctrl_c_in_a_terminal_stops_neither_jobs_nor_the_programs_that_they_wait_for(
    tmp_path: Path, database_url: str
) -> None:
    """The terminal sends it to the whole group of the supervisor, of which children are none."""
    with fleet(tmp_path, database_url, "--max-jobs", "100") as stopping:
        stopping.enqueue("have_a_program_wait_at_gate")
        stopping.wait_for_entries("program began")
        os.killpg(stopping.process.pid, signal.SIGINT)
        stopping.process.wait_for_line("claims no more; 1 jobs are still running")
        stopping.open_gate()
        assert stopping.process.wait() == 0
        assert (len(stopping.ledger("program began")), len(stopping.ledger("program ended"))) == (1, 1)


def test_sigterm_to_the_supervisor_and_to_its_child_is_one_wish_to_stop(tmp_path: Path, database_url: str) -> None:
    """As systemd sends it."""
    with fleet(tmp_path, database_url, "--max-jobs", "100") as stopping:
        [child] = stopping.wait_until_up(1)
        stopping.enqueue("wait_at_gate")
        stopping.wait_for_entries("old began")
        stopping.process.terminate()
        stopping.process.wait_for_line("claims no more")
        os.kill(child, signal.SIGTERM)
        # It is answered after the other signal, which came before.
        os.kill(child, signal.SIGQUIT)
        stopping.process.wait_for_line("runs 1 jobs")
        stopping.open_gate()
        assert stopping.process.wait() == 0
        assert len(stopping.ledger("old ended")) == 1


def test_second_signal_interrupts_the_jobs_and_shows_in_the_status(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--max-jobs", "100") as stopping:
        stopping.enqueue("wait_at_gate")
        stopping.wait_for_entries("old began")
        stopping.process.terminate()
        stopping.process.wait_for_line("claims no more")
        stopping.process.terminate()
        assert stopping.process.wait() == 3
        assert (len(stopping.ledger("old ended")), stopping.waiting_jobs()) == (0, 1)


def test_child_that_hangs_is_killed_after_its_grace(tmp_path: Path, database_url: str) -> None:
    command = ("python", "-c", IMPATIENT)
    with fleet(tmp_path, database_url, "--max-jobs", "9", "--grace", "0.1", command=command) as stopping:
        stopping.wait_until_up(1)
        stopping.enqueue("hold_the_event_loop")
        stopping.wait_for_entries("began")
        stopping.process.terminate()
        assert stopping.process.wait() == 128 + signal.SIGKILL
        assert stopping.waiting_jobs() == 1


def test_closed_terminal_stops_all(tmp_path: Path, database_url: str) -> None:
    """It sends SIGHUP, as who wants a reload does."""
    command = ("python", "-c", "import pty, sys; pty.spawn(sys.argv[1:])", "greenjobs")
    with fleet(tmp_path, database_url, "--processes", "2", command=command) as closed:
        children = closed.wait_until_up(2)
        closed.process.kill()
        closed.wait_until_gone([*closed.supervisors, *children])
        assert closed.children == children


def test_closed_terminal_lets_a_runner_without_a_supervisor_finish_what_it_runs(
    tmp_path: Path, database_url: str
) -> None:
    with fleet(tmp_path, database_url) as alone:
        alone.enqueue("wait_at_gate")
        alone.wait_for_entries("old began")
        alone.process.send(signal.SIGHUP)
        alone.process.wait_for_line("claims no more; 1 jobs are still running")
        alone.open_gate()
        assert alone.process.wait() == 0
        assert len(alone.ledger("old ended")) == 1


def test_sigquit_shows_the_stacks_of_all_children(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--processes", "2") as asked:
        asked.wait_until_up(2)
        asked.enqueue("wait_at_gate", 2)
        asked.wait_for_entries("old began", 2)
        asked.process.send(signal.SIGQUIT)
        asked.process.wait_for_line(r"(?:in wait_at_gate[\s\S]*){2}")


def test_until_empty_ends_when_every_child_has_nothing_left(tmp_path: Path, database_url: str) -> None:
    with databases.administration(database_url) as cursor:  # before anybody can find that there is nothing to do
        enqueue(cursor, "nap", 50)
    with fleet(tmp_path, database_url, "--processes", "2", "--until-empty", "--migrate") as working:
        assert working.process.wait() == 0
        assert len(working.ledger("napped")) == 50
        assert len(working.children) == 2


# Replacement


def test_recycling_under_load_runs_every_job_once_and_never_leaves_fewer_runners(
    tmp_path: Path, database_url: str
) -> None:
    with fleet(tmp_path, database_url, "--processes", "2", "--max-jobs", "100", "--pool", "8") as recycled:
        # Both have to be replaced while the first half is done, and at least one of those that follow in the second.
        recycled.enqueue("nap", 1_000)
        recycled.wait_until_up(4)
        recycled.enqueue("nap", 1_000)
        recycled.wait_until_up(5)
        recycled.wait_for_entries("napped", 2_000)
        recycled.process.terminate()
        assert recycled.process.wait() == 0
        assert recycled.waiting_jobs() == 0
        assert set(Counter(job for job, _, _ in recycled.ledger()).values()) == {1}
        claiming = claiming_runners(recycled.process.output.partition("telling")[0])
        assert min(claiming[claiming.index(2) :]) == 2


def claiming_runners(output: str) -> list[int]:
    """How many runners claimed, after each event: one that came up, or that claims no more."""
    events = re.findall(r"greenjobs\.(cli: jobs:|runner: .* claims no more)", output)
    counts = [0]
    for event in events:
        counts.append(counts[-1] + (1 if event.startswith("cli") else -1))
    return counts


def test_process_that_outgrows_its_memory_is_replaced(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--max-memory", "200") as leaking:
        leaking.enqueue("leak", 15)
        leaking.wait_for_entries("leaked", 15)
        leaking.process.wait_for_line(r"is to be replaced: it occupies \d+ MB \(max_memory\)")
        leaking.process.wait_for_line(f"process {leaking.children[0]} ended with status 0 .* as it was told to")
        assert set(Counter(job for job, _, _ in leaking.ledger()).values()) == {1}
        leaking.enqueue("note")
        [(_, _, pid)] = leaking.wait_for_entries("old")
        assert pid != leaking.children[0]


def test_memory_that_is_too_little_to_begin_with_is_refused(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--max-memory", "10") as refused:
        assert refused.process.wait() == 2
        assert "max_memory is 10, but this process takes" in refused.process.output


def test_successor_that_does_not_come_up_is_tried_again_while_the_old_process_goes_on(
    tmp_path: Path, database_url: str
) -> None:
    with fleet(tmp_path, database_url, "--max-jobs", "1") as recycled:
        [old] = recycled.wait_until_up(1)
        processes.write_application(tmp_path, "1 / 0")
        recycled.enqueue("note")
        recycled.process.wait_for_line(r"ERROR .*did not come up; process \d+ goes on; trying again in 0\.")
        recycled.enqueue("note")
        assert [pid for _, _, pid in recycled.wait_for_entries("old", 2)] == [old, old]
        processes.write_application(tmp_path, APPLICATION)
        recycled.wait_until_up(2)
        recycled.process.wait_for_line(f"process {old} ended with status 0 .* as it was told to")


# Reload


def test_sighup_brings_new_code_while_jobs_of_the_old_code_finish(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--processes", "2") as reloaded:
        children = reloaded.wait_until_up(2)
        reloaded.enqueue("wait_at_gate", 2)
        reloaded.wait_for_entries("old began", 2)
        processes.write_application(tmp_path, APPLICATION.replace('"old"', '"brand-new"'))
        reloaded.process.send(signal.SIGHUP)
        reloaded.wait_until_up(4)
        reloaded.enqueue("note", 4)
        entries = reloaded.wait_for_entries("brand-new", 4)
        assert {pid for _, _, pid in entries}.isdisjoint(children)
        reloaded.open_gate()
        assert {pid for _, _, pid in reloaded.wait_for_entries("old ended", 2)} == set(children)
        reloaded.wait_until_gone(children)
        assert len(reloaded.ledger("%began")) == 2


def test_stop_during_a_reload_does_not_interrupt_the_old_code(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--max-jobs", "100") as reloaded:
        reloaded.wait_until_up(1)
        reloaded.enqueue("wait_at_gate")
        reloaded.wait_for_entries("old began")
        reloaded.process.send(signal.SIGHUP)
        reloaded.process.wait_for_line("claims no more; 1 jobs are still running")
        reloaded.process.terminate()
        reloaded.process.wait_for_line("claims no more; 0 jobs are still running")
        reloaded.open_gate()
        assert reloaded.process.wait() == 0
        assert (len(reloaded.ledger("old began")), len(reloaded.ledger("old ended"))) == (1, 1)


def test_reload_of_code_that_does_not_start_leaves_the_old_at_work(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--processes", "2") as reloaded:
        children = reloaded.wait_until_up(2)
        processes.write_application(tmp_path, "1 / 0")
        reloaded.process.send(signal.SIGHUP)
        reloaded.process.wait_for_line("ERROR .*did not come up; the old code goes on")
        reloaded.enqueue("note", 4)
        assert {pid for _, _, pid in reloaded.wait_for_entries("old", 4)} <= set(children)
        assert len(reloaded.children) == 3


def test_reload_follows_the_symbolic_link_that_the_working_directory_was_entered_by(
    tmp_path: Path, database_url: str
) -> None:
    for release in ("first", "second"):
        (tmp_path / release).mkdir()
        processes.write_application(tmp_path / release, APPLICATION.replace('"old"', f'"{release}"'))
    current = tmp_path / "current"
    current.symlink_to("first")
    with fleet(current, database_url, "--max-jobs", "100", environment={"PWD": str(current)}) as deployed:
        deployed.wait_until_up(1)
        (tmp_path / "next").symlink_to("second")
        (tmp_path / "next").replace(current)
        deployed.process.send(signal.SIGHUP)
        deployed.process.wait_for_line("takes the place of")
        deployed.process.wait_for_line("as it was told to")
        deployed.enqueue("note")
        assert deployed.wait_for_entries("second")


def test_changed_file_is_loaded_with_reload(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--reload") as reloaded:
        [old] = reloaded.wait_until_up(1)
        processes.write_application(tmp_path, APPLICATION.replace('"old"', '"brand-new"'))
        reloaded.process.wait_for_line("files have changed")
        reloaded.process.wait_for_line(f"process {old} ended with status 0 .* as it was told to")
        reloaded.enqueue("note")
        assert reloaded.wait_for_entries("brand-new")


def test_broken_application_is_waited_for_with_reload(tmp_path: Path, database_url: str) -> None:
    with fleet(tmp_path, database_url, "--reload", code="1 / 0") as mended:
        mended.process.wait_for_line("ended with status 2 .*; waiting for files to change")
        processes.write_application(tmp_path, APPLICATION)
        mended.wait_until_up(1)


def test_reload_without_watchfiles_names_the_extra(tmp_path: Path, database_url: str) -> None:
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "watchfiles.py").write_text("raise ModuleNotFoundError('No module named watchfiles')")
    with fleet(tmp_path, database_url, "--reload", environment={"PYTHONPATH": str(missing)}) as refused:
        assert refused.process.wait() == 2
        assert "pip install 'greenjobs[reload]'" in refused.process.output
