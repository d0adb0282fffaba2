"""All cases, in the order in which they are run and shown."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.case import Case
from benchmarks.cases import drain, enqueue, idle, waiting

CASES: Mapping[str, Case] = {case.name: case for module in (enqueue, drain, idle, waiting) for case in module.CASES}
