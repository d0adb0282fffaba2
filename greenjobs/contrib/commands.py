"""The commands of greenjobs inside of the command of a framework."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

ELSEWHERE = ("run", "doctor")
"""The commands that run jobs, or say how they would run: in a process of their own."""


def main() -> click.Group:
    """The command line of greenjobs.

    By name, as the console script has it: that room stands above this one, and needs gevent, which a web server does
    not.
    """
    group = importlib.import_module("greenjobs.cli").main
    assert isinstance(group, click.Group)
    return group


def run_elsewhere(name: str, arguments: Sequence[str]) -> NoReturn:
    """Become the command of this name with these arguments, in a fresh interpreter.

    The command of the framework has imported the application, and much else, before gevent could patch any of it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "greenjobs", name, *arguments])
