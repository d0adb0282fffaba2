"""The pages of docs/, followed as they stand: a reader in a folder, with a database, who types every block in order.

A block that follows a line with `name`: or `name`, …: is a file of that name. Python is run as a script, shell commands
in `sh`, SQL in the database. Blocks of other languages, such as text, show what is printed, and are for the test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import databases
import processes

DOCS = processes.ROOT / "docs"

_FILE_NAME = re.compile(r"`([\w-]+\.[\w]+)`[^`:]*:$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: the heading it stands under, its language, and the name of the file that it is, or ""."""

    heading: str
    language: str
    name: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    """The blocks of docs/<page>, in order."""
    heading, language, before, text = "", None, "", list[str]()
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if language is None and line.startswith("#"):
            heading = line.lstrip("#").strip()
        if line.startswith("```") and language is None:
            language, text = line.removeprefix("```"), []
        elif line == "```" and language is not None:
            named = _FILE_NAME.search(before)
            yield Block(heading, language, named[1] if named else "", "\n".join([*text, ""]))
            language, before = None, ""
        elif language is not None:
            text.append(line)
        elif line.strip():
            before = line


def follow(page: str, folder: Path, database_url: str) -> dict[str, str]:
    """Do all that the page says, and fail where something fails; returns what was printed under each heading."""
    printed: dict[str, str] = {}
    for number, block in enumerate(blocks(page)):
        if block.name:
            (folder / block.name).write_text(block.text, encoding="utf-8")
            continue
        command: tuple[str, ...] = ()
        if block.language == "sh":
            command = ("sh", "-ec", block.text)
        elif block.language == "python":
            (folder / f"snippet_{number}.py").write_text(block.text, encoding="utf-8")
            command = ("python", f"snippet_{number}.py")
        elif block.language == "sql":
            with databases.administration(database_url) as cursor:
                cursor.execute(block.text)
        if command:
            output = processes.run(*command, folder=folder, database_url=database_url)
            printed[block.heading] = printed.get(block.heading, "") + output
    return printed
