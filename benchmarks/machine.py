"""What the figures were measured on, and with."""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.server import Server

_CPU_INFO = Path("/proc/cpuinfo")
_PACKAGES = ("gevent", "psycopg2-binary", "orjson")
_PRIVATE_OPTIONS = ("--database-url", "--peer-python", "--output")


def facts(server: Server, arguments: Sequence[str]) -> Mapping[str, str]:
    """Machine, versions, the server's settings, and the command that made the figures."""
    system = f"{platform.system()} {platform.release()}"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} × {_processor()}, {_memory_gb():.0f} GB, {system}",
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in ("greenjobs", *_PACKAGES)),
        "PostgreSQL": server.version(),
        "settings": ", ".join(f"{name} = {value}" for name, value in sorted(server.settings().items())),
        "command": command(arguments),
    }


def command(arguments: Sequence[str]) -> str:
    """The command line, without what is of this machine alone: the server's address, with its password, and folders."""
    shown = [re.sub(rf"^({'|'.join(_PRIVATE_OPTIONS)})=.*", r"\1=…", argument) for argument in arguments]
    for place, argument in enumerate(shown[:-1]):
        if argument in _PRIVATE_OPTIONS:
            shown[place + 1] = "…"
    quoted = [argument if "…" in argument else shlex.quote(argument) for argument in shown]
    return " ".join(["python -m benchmarks", *quoted])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _processor() -> str:
    if _CPU_INFO.exists():
        found = re.search(r"^model name\s*: (.*)$", _CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
