"""Imports point down only, as the contract in setup.cfg has it, and `import greenjobs` brings nothing along."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "greenjobs"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
    """The child of the package that a module belongs to, as in greenjobs.contrib.flask: contrib."""
    return module.split(".")[1]


def layers() -> list[set[str]]:
    """The rooms of each line of the contract, the highest first."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = parser["importlinter:contract:layers"]["layers"].strip().splitlines()
    return [{name.strip().strip("()") for name in line.split("|")} for line in lines]


def imports(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, inside functions and for type checkers, too."""
    file = MODULES[module]
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from greenjobs import pool` imports the module pool; `from greenjobs import job`, a name of the root.
            for alias in node.names:
                yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source


def test_every_module_has_its_place_in_the_contract() -> None:
    places = set().union(*layers())
    assert {room(module) for module in MODULES if module != "greenjobs"} <= places


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"greenjobs"}))
def test_a_module_imports_only_from_below(module: str) -> None:
    places = {name: height for height, names in enumerate(reversed(layers())) for name in names}
    own = room(module)
    imported = {each for each in imports(module) if each.startswith("greenjobs.") and room(each) != own}
    assert {each for each in imported if places[room(each)] >= places[own]} == set()


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"greenjobs"}))
def test_no_module_imports_the_package_root(module: str) -> None:
    assert "greenjobs" not in imports(module)


def in_fresh_interpreter(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


HEAVY = [
    "click",
    "cronsim",
    "dataclasses_json",
    "flask",
    "gevent",
    "opentelemetry",
    "psycopg2",
    "sentry_sdk",
    "sqlalchemy",
    "zoneinfo",
]


@pytest.mark.parametrize("package", HEAVY)
def test_importing_greenjobs_does_not_load(package: str) -> None:
    assert in_fresh_interpreter(f"import greenjobs, sys; print({package!r} in sys.modules)") == "False"


def test_importing_greenjobs_patches_nothing() -> None:
    """What gevent would replace is what it was: the same objects before and after."""
    code = """
import os, select, socket, ssl, subprocess, threading, time
before = [dict(vars(each)) for each in (os, select, socket, ssl, subprocess, threading, time)]
import greenjobs
after = [dict(vars(each)) for each in (os, select, socket, ssl, subprocess, threading, time)]
print(before == after)
"""
    assert in_fresh_interpreter(code) == "True"


def test_settings_need_neither_driver_nor_gevent() -> None:
    """A process reads its settings before it decides what to load and to patch."""
    code = "import greenjobs.config, sys; print({'click', 'gevent', 'psycopg2'} & set(sys.modules))"
    assert in_fresh_interpreter(code) == "set()"
