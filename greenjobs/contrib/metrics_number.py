"""The number under which this process keeps its metrics, where it was given one: see metrics_folder."""

from __future__ import annotations

import os

from greenjobs import metrics_folder


def take() -> None:
    """Keep metrics under the number that was given, if any. To be called before anybody makes a metric."""
    given = os.environ.pop(metrics_folder.NUMBER, None)
    if given is None:
        return
    from prometheus_client import values

    metrics_folder.own_number = given
    process_id = os.getpid()
    # A process that is forked off, by a job for example, shares the memory of these files, and must not write there.
    own = values.MultiProcessValue(  # type: ignore[no-untyped-call]
        lambda: given if os.getpid() == process_id else os.getpid()
    )
    values.ValueClass = own
