"""The commands of greenjobs inside of the command of a framework."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click


def main() -> click.Group:
    """The command line of greenjobs.

    By name, as the console script has it: that room stands above this one, and needs gevent, which a web server does
    not.
    """
    group = importlib.import_module("greenjobs.cli").main
    assert isinstance(group, click.Group)
    return group


def run_elsewhere(arguments: Sequence[str]) -> NoReturn:
    """Become `greenjobs run` with these arguments, in a fresh interpreter.

    The command of the framework has imported the application, and much else, before gevent could patch any of it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "greenjobs", "run", *arguments])
