"""How a measured program talks with the harness: an order comes, `ready` goes, `go` and `stop` come, a report goes.

Lines on stdin and stdout, and the standard library alone: programs of peers run in interpreters without greenjobs. The
end of stdin counts as `stop`, so that no program outlives the harness.
"""

from __future__ import annotations

import json
import sys
from typing import Any

READY = "ready"
GO = "go"
MARK = "mark"
STOP = "stop"


def receive_order() -> dict[str, Any]:
    """The first line: what to do, as a JSON object."""
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    return order


def wait_for_go() -> None:
    """Say that all is prepared, and block until the harness says to begin. Exits when the harness is gone."""
    print(READY, flush=True)
    if sys.stdin.readline().strip() != GO:
        sys.exit(1)


def next_command() -> str:
    """Block until the harness says `mark` or `stop`."""
    return sys.stdin.readline().strip() or STOP


def send_report(report: dict[str, Any]) -> None:
    """The last line: what was measured, as a JSON object."""
    print(json.dumps(report), flush=True)
