"""The number under which this process keeps its metrics, where a supervisor gave it one: see metrics_folder."""

from __future__ import annotations

import os

from greenjobs.metrics_folder import NUMBER


def take() -> None:
    """Keep metrics under the number that the supervisor gave. To be called before anybody makes a metric."""
    given = os.environ.pop(NUMBER, None)
    if given is None:
        return
    from prometheus_client import values

    number, process_id = int(given), os.getpid()
    # A process that is forked off, by a job for example, shares the memory of these files, and must not write there.
    own = values.MultiProcessValue(  # type: ignore[no-untyped-call]
        lambda: number if os.getpid() == process_id else os.getpid()
    )
    values.ValueClass = own
