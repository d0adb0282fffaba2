"""Everything at once, for a while: see faults.storm."""

from __future__ import annotations

import random

import pytest

from .arena import Arena
from .server import Server
from .storm import Storm


@pytest.mark.parametrize(
    ("seconds", "runners", "enqueuers", "pause"),
    [
        (10.0, 3, 20, 0.1),
        pytest.param(120.0, 8, 200, 0.4, marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_no_job_is_lost_in_a_storm_of_faults_and_none_runs_twice_without_one(
    server: Server, served: Arena, seconds: float, runners: int, enqueuers: int, pause: float
) -> None:
    storm = Storm(served, server, seed=random.randrange(10**6))
    loads = [served.load("--threads", str(enqueuers // 2), "--pause", str(pause)) for _ in range(2)]
    storm.blow(seconds=seconds, runners=runners, mean_pause=1.0 if seconds < 60 else 2.0)
    counted = [load.stop() for load in loads]
    balance = storm.check(seconds=seconds + 60)
    assert len(balance.returned) == sum(each["returned"] for each in counted)
