"""What a job writes in its completing transaction happens exactly once, whatever happens to runners and sessions."""

from __future__ import annotations

import random
import signal

import pytest

from .arena import Arena
from .bank import OPTIONS, Bank


@pytest.mark.parametrize(
    ("transfers", "at_once", "pause", "seconds"),
    [
        pytest.param(3_000, 100, 0.1, 200.0, marks=[pytest.mark.timeout(300)]),
        pytest.param(100_000, 500, 0.5, 3_000.0, marks=[pytest.mark.long, pytest.mark.timeout(3_600)]),
    ],
)
def test_every_transfer_is_made_exactly_once_though_runners_and_sessions_die(
    arena: Arena, transfers: int, at_once: int, pause: float, seconds: float
) -> None:
    bank = Bank(arena, seed=random.randrange(10**6))
    bank.trouble(transfers, at_once=at_once, runners=3, pause=pause, seconds=seconds)
    ran_again = bank.check()
    print(f"{transfers} transfers; {dict(bank.faults)}; {ran_again} jobs ran again")
    assert ran_again, "no job ran twice: nothing is proven"


@pytest.mark.parametrize(
    "environment",
    [
        {"FAULTS_DIE_IN": "block"},
        {"FAULTS_DIE_AT": "acknowledge:before:1"},
        {"FAULTS_DIE_AT": "acknowledge:after:1"},
        {"FAULTS_DIE_IN": "commit"},
    ],
    ids=["in the block", "before the acknowledge", "before the commit", "after the commit"],
)
def test_runner_that_dies_at_any_place_of_the_transaction_makes_no_transfer_twice(
    arena: Arena, environment: dict[str, str]
) -> None:
    bank = Bank(arena, seed=random.randrange(10**6))
    bank.order(20)
    for _ in range(2):
        doomed = arena.start_runner(*OPTIONS, environment=environment)
        assert doomed.process.wait() == -signal.SIGKILL, doomed.process.output
    arena.runner(*OPTIONS)
    bank.check()
