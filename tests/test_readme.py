"""The README: every command and every snippet in it is run here, and its tables say what the code says.

Blocks are taken out of the text as they stand. One that follows `name`: is a file of that name, and is there before
anything runs. The others run in order, each section in a folder and with a database of its own: Python and SQL as they
are; shell commands in `sh`, and where a block has servers, each of its lines in a terminal of its own.

`make stress` and `make test` are mentioned in the text only: the one has tests of its own, and the other runs this.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import databases
import processes
import pytest
import requests
from processes import Process
from waiting import eventually

from greenjobs import config, policy
from greenjobs.cli import main
from greenjobs.job import HIGHEST_PRIORITY, LOWEST_PRIORITY, Job

README = (processes.ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES = 250

_FILE_NAME = re.compile(r"`([\w.]+)`:$")

# Commands that end only when they are told to; and what they print when they are up.
_SERVERS = {
    re.compile(r"flask run"): "Running on ",
    re.compile(r"greenjobs run(?!.*--until-empty)"): r"^.* greenjobs\.cli: jobs: .*$",
}


# What a checkout has beside what is checked in.
_LITTER = (
    ".git",
    ".venv",
    ".tox",
    ".greenjobs",
    ".*_cache",
    ".hypothesis",
    "__pycache__",
    "build",
    "dist",
    "*.egg-info",
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, and the name of the file that it is, or ""."""

    section: str
    language: str
    name: str
    text: str


def read_blocks() -> list[Block]:
    blocks, section, language, before, text = [], "", None, "", []
    for line in README.splitlines():
        if language is None and line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("```") and language is None:
            language, text = line.removeprefix("```"), []
        elif line == "```" and language is not None:
            named = _FILE_NAME.search(before)
            blocks.append(Block(section, language, named[1] if named else "", "\n".join([*text, ""])))
            language = None
        elif language is not None:
            text.append(line)
        elif line.strip():
            before = line
    return blocks


BLOCKS = read_blocks()
SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS))


def blocks_of(section: str, language: str) -> list[Block]:
    return [block for block in BLOCKS if (block.section, block.language) == (section, language) and not block.name]


class Reader:
    """Somebody who types what the README says, in a folder with its files."""

    def __init__(self, folder: Path, database_url: str | None, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.database_url = database_url
        self.environment = environment or {}
        self.terminals: list[Process] = []
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """End what was left running."""
        self._stack.close()

    def save_files(self) -> None:
        """Write the files that the README shows; with a database URL in the environment that of setup.cfg is idle."""
        for block in BLOCKS:
            if block.name:
                (self.folder / block.name).write_text(block.text, encoding="utf-8")

    def follow(self, block: Block) -> str:
        """Do what the block says; returns what was printed by all of it that has ended."""
        if block.language == "sql":
            assert self.database_url
            with databases.administration(self.database_url) as cursor:
                cursor.execute(block.text)
            return ""
        if block.language == "python":
            (self.folder / "snippet.py").write_text(block.text, encoding="utf-8")
            return self.type("python snippet.py")
        assert block.language == "sh", f"nobody knows how to run {block}"
        if any(server.search(block.text) for server in _SERVERS):
            return "".join(self.type(line) for line in block.text.splitlines())
        return self.type(block.text)

    def type(self, text: str) -> str:
        """Type it in a new terminal; returns what it printed. A server is left running, once it is up."""
        up = next((line for server, line in _SERVERS.items() if server.search(text)), None)
        started = processes.start(
            "sh", "-ec", text, folder=self.folder, database_url=self.database_url, environment=self.environment
        )
        if up is None:
            with started as process:
                status = process.wait()
                assert status == 0, f"{process} ended with status {status}:\n{process.output}"
                return process.output
        terminal = self._stack.enter_context(started)
        terminal.wait_for_line(up)
        self.terminals.append(terminal)
        return ""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that root's embedded server can reach under its own account, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="greenjobs-readme-")).resolve()
    folder.chmod(0o755)
    yield folder
    # The server stops soon after its last user, which has been killed, and writes to its folder until then.
    eventually(lambda: not list(folder.rglob("postmaster.pid")), "the embedded server runs on", seconds=60)
    eventually(lambda: is_removed(folder), f"{folder} cannot be removed", seconds=60)


def is_removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


@pytest.fixture
def reader(tmp_path: Path, database_url: str) -> Iterator[Reader]:
    with contextlib.closing(Reader(tmp_path, database_url)) as reader:
        reader.save_files()
        yield reader


def copy_checkout(folder: Path) -> Path:
    return Path(shutil.copytree(processes.ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*_LITTER)))


# --- five minutes -----------------------------------------------------------------------------------------------------

INSTALL, START, SHOP = blocks_of("Five minutes", "sh")


def test_installation_as_typed_brings_the_command(tmp_path: Path) -> None:
    """pip is told, by its environment, to stay offline; what greenjobs depends on lies in a folder on the path."""
    checkout = copy_checkout(tmp_path)
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for each in Path(sysconfig.get_path("purelib")).iterdir():
        if "greenjobs" not in each.name and each.suffix != ".pth":
            (dependencies / each.name).symlink_to(each)
    environment = {"PYTHONPATH": str(dependencies), "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    with contextlib.closing(Reader(checkout, None, environment)) as reader:
        reader.follow(INSTALL)
        assert reader.type(".venv/bin/greenjobs --version").startswith("greenjobs, version ")
        assert "CREATE TABLE IF NOT EXISTS background_jobs" in reader.type(".venv/bin/greenjobs migrate --sql")


def test_first_runner_prints_what_another_process_enqueued(open_folder: Path) -> None:
    """On the embedded server, which setup.cfg names."""
    with contextlib.closing(Reader(open_folder, None)) as reader:
        reader.save_files()
        reader.follow(START)
        (runner,) = reader.terminals
        runner.wait_for_line("^Welcome, Ann!$")


def test_first_view_enqueues_what_the_runner_prints(reader: Reader) -> None:
    port = processes.free_port()
    reader.environment["FLASK_RUN_PORT"] = str(port)
    reader.type("greenjobs run")
    reader.type("flask run")
    answer = requests.post(f"http://127.0.0.1:{port}/welcome/Bob", timeout=30)
    assert answer.text == "Your mail is on its way.\n"
    reader.terminals[0].wait_for_line("^Welcome, Bob!$")


def test_shop_starts_with_its_two_commands(open_folder: Path) -> None:
    """On the embedded server, which its own setup.cfg names."""
    port = processes.free_port()
    checkout = copy_checkout(open_folder)
    with contextlib.closing(Reader(checkout, None, {"FLASK_RUN_PORT": str(port)})) as reader:
        reader.follow(SHOP)
        assert len(reader.terminals) == 2
        page = f"http://127.0.0.1:{port}"
        order = {"customer": "ann@example.com", "item": "Notebook", "quantity": "2"}
        requests.post(f"{page}/orders", order, timeout=30).raise_for_status()
        eventually(lambda: "<td>paid at " in requests.get(page, timeout=30).text, "not paid", seconds=60)


# --- the other sections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [section for section in SECTIONS if section != "Five minutes"])
def test_section_runs_as_it_stands(reader: Reader, section: str) -> None:
    for block in BLOCKS:
        if block.section == section and not block.name:
            reader.follow(block)


def test_row_inserted_by_sql_is_a_job(reader: Reader) -> None:
    (insert,) = blocks_of("Schema", "sql")
    reader.follow(insert)
    assert "Welcome, Ann!\n" in reader.type("greenjobs run --until-empty")


def test_jobs_of_the_first_usage_snippet_are_run_or_wait_for_their_time(reader: Reader) -> None:
    snippet = blocks_of("Usage", "python")[0]
    assert reader.follow(snippet) == "Here and now: it still is a function, Ann!\n"
    printed = reader.type("greenjobs run --until-empty")
    assert {line for line in printed.splitlines() if line.endswith("!")} == {
        "Welcome, Ann!",
        "Now or never, Ann!",
        "Not twice in an hour, Ann!",
        "Hello, Ann!",
        "Hello, Bob!",
        "You have an account, Ann!",
    }
    with databases.administration(str(reader.database_url)) as cursor:
        cursor.execute("SELECT data->>'subject' FROM background_jobs WHERE state = 'scheduled' ORDER BY run_at")
        subjects = [row[0] for row in cursor.fetchall()]
    assert subjects == ["In a minute, before others", "Only the last one", "Tomorrow"]


def test_dataclass_of_the_second_usage_snippet_comes_back_as_itself(reader: Reader) -> None:
    snippet = blocks_of("Usage", "python")[1]
    reader.follow(snippet)
    assert ", attempt 1: 20.99\n" in reader.type("greenjobs run --app snippet --until-empty")


def test_runner_of_the_third_usage_snippet_runs_what_waits(reader: Reader) -> None:
    snippet = blocks_of("Usage", "python")[2]
    reader.type("python -c \"import app; app.send_email.delay('Ann', 'Hello')\"")
    assert "Hello, Ann!\n" in reader.follow(snippet)


def test_command_for_failed_jobs_has_them_tried_anew(reader: Reader) -> None:
    (retry_failed,) = blocks_of("Errors", "sh")
    reader.type("python -c \"import app; app.send_email.delay('Ann', 'Hello')\"")
    with databases.administration(str(reader.database_url)) as cursor:
        cursor.execute("UPDATE background_jobs SET state = 'failed', retries = 11, crashes = 3")
    assert "Hello, Ann!" not in reader.type("greenjobs run --until-empty")
    reader.follow(retry_failed)
    assert "Hello, Ann!\n" in reader.type("greenjobs run --until-empty")


# --- what the text says -----------------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_table_of_options_is_that_of_the_code() -> None:
    """When this fails, the lines that are expected belong into docs/configuration.md."""
    rows = [
        f"| `{option.name}` | {'' if option.default is None else f'`{option.default}`'} | {option.help} |"
        for option in config.OPTIONS.values()
    ]
    page = (processes.ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page.endswith("\n".join(["| Option | Default | Meaning |", "| --- | --- | --- |", *rows, ""]))


def keyword_parameters(function: object) -> list[str]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]


def test_settings_of_a_job_are_all_named() -> None:
    (listed,) = re.findall(r"^`@job` takes (.*?)\.$", README, re.MULTILINE | re.DOTALL)
    settings = {*keyword_parameters(Job.__init__), *keyword_parameters(policy.declared)}
    assert set(re.findall(r"`(\w+)`", listed)) == settings


def test_options_of_a_call_are_all_shown() -> None:
    (snippet, *_) = blocks_of("Usage", "python")
    shown = re.findall(r"(\w+)=", "".join(line for line in snippet.text.splitlines() if ".options(" in line))
    assert set(keyword_parameters(Job.options)) <= set(shown)


def test_columns_are_all_named(database_url: str) -> None:
    with databases.administration(database_url) as cursor:
        cursor.execute("SELECT column_name FROM information_schema.columns WHERE table_name = 'background_jobs'")
        columns = {row[0] for row in cursor.fetchall()}
    schema = README[README.index("## Schema") : README.index("## Usage")]
    assert columns <= set(re.findall(r"`(\w+)`", schema))


def test_flags_are_those_of_the_command_line() -> None:
    commands = list(main.commands.values())  # type: ignore[attr-defined]
    for command in commands:  # those of groups are found on the way
        commands.extend(getattr(command, "commands", {}).values())
    known = {flag for command in commands for each in command.params for flag in each.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= known


def test_range_of_priorities_is_that_of_the_code() -> None:
    assert f"{LOWEST_PRIORITY} to {HIGHEST_PRIORITY}" in README


def test_default_retries_take_about_a_day_and_a_half() -> None:
    """At 1 minute × 2^retries for each of them, as one of the guarantees is tested to keep."""
    retries = config.OPTIONS["max_retries"].default
    assert isinstance(retries, int)
    assert 1.25 < sum(60 * 2**number for number in range(1, retries + 1)) / (24 * 3600) < 1.75


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z]+)", README))))
def test_make_knows_the_target(target: str) -> None:
    assert processes.run("make", "--dry-run", target, folder=processes.ROOT)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:docs|examples|tests)/[\w./]+)`", README))))
def test_path_exists(path: str) -> None:
    assert (processes.ROOT / path).exists()
