"""How much memory this process takes."""

from __future__ import annotations

import resource
import sys

_MEGABYTE = 2**20


def resident_megabytes() -> float:
    """How much memory this process occupies, in units of 2**20 bytes; the most it ever did, where there is no /proc."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / _MEGABYTE
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (_MEGABYTE if sys.platform == "darwin" else 1024)
