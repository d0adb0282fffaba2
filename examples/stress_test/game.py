"""The game: what its players ask for, and the jobs that do it.

The jobs are plain synchronous functions, and the players plain threads. `time.sleep` stands for what a real job waits
for: a web service, a database, a mail server.

Three queues, each with a pool of its own. Healing and gym battles share a queue with exploring, and go first: a queue
is where priority counts. Training is deduplicated: who asks again before it has started gets the job that waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from threading import Event
from typing import Any

from examples.stress_test.ledger import Ledger
from greenjobs import current_job, job

PLAYERS = ("Ada", "Barbara", "Edsger", "Grace", "Linus", "Radia")
TEAM_SIZE = 3

# A move is 0.75 s of work on average, so two a second for every worker are more than they can do. Work piles up while
# the game goes on, and it shows that some of it goes first.
MOVES_PER_SECOND_AND_WORKER = 2.0

MONSTERS = ("Cindercub", "Dewdrake", "Fernwhisk", "Gravelimp", "Hushowl", "Joltmouse", "Mirthworm", "Nettlecat")
PLACES = ("the Whispering Wood", "Lantern Lake", "the Salt Flats", "Mount Murmur", "the Old Quarry")
LEADERS = ("Petra of the Rocks", "Marina of the Tides", "Volta of the Storm", "Ember of the Forge")

# How a job that met with a mishap is tried again: a second later, and then it is done.
SECOND_CHANCE: Mapping[str, Any] = {"max_retries": 3, "backoff": 1.0}


class Mishap(Exception):
    """What goes wrong in the game, on purpose: such an attempt fails, and the job is tried again."""


@dataclass(frozen=True, slots=True)
class World:
    """What every job finds as `current_job.context`."""

    ledger: Ledger
    seed: int


# --- the jobs ---------------------------------------------------------------------------------------------------------


@job(queue="wild", **SECOND_CHANCE)
def catch(player: str, monster: str, place: str, turn: int) -> None:
    """Takes 0.2 to 0.8 s. Of ten monsters one breaks free."""
    with adventure() as luck:
        time.sleep(luck.uniform(0.2, 0.8))
        if is_mishap(luck, 0.1):
            raise Mishap(f"the {monster} in {place} broke free from {player} on turn {turn}")


@job(queue="training", unique=True)
def train(player: str, monster: str) -> None:
    """Takes 0.5 to 1.5 s."""
    with adventure() as luck:
        time.sleep(luck.uniform(0.5, 1.5))


@job(queue="journey", priority=20)
def heal(player: str, monsters: Sequence[str], turn: int) -> None:
    """Takes 0.1 to 0.2 s for each monster. Nobody has to wait long at the centre."""
    with adventure() as luck:
        for _ in monsters:
            time.sleep(luck.uniform(0.1, 0.2))


@job(queue="journey", priority=10, **SECOND_CHANCE)
def battle(player: str, leader: str, turn: int) -> None:
    """Takes 0.6 to 1.6 s. Of five battles one is lost."""
    with adventure() as luck:
        time.sleep(luck.uniform(0.6, 1.6))
        if is_mishap(luck, 0.2):
            raise Mishap(f"{player} lost to {leader} on turn {turn}")


@job(queue="journey")
def explore(player: str, place: str, turn: int) -> None:
    """Takes 0.4 to 1.4 s."""
    with adventure() as luck:
        time.sleep(luck.uniform(0.4, 1.4))


JOBS = (catch, train, heal, battle, explore)


@contextmanager
def adventure() -> Iterator[Random]:
    """Write the attempt down in the ledger, and give it luck of its own: the same in every game of the same seed."""
    world: World = current_job.context
    with world.ledger.run():
        yield Random(f"{world.seed} {current_job.name} {current_job.row.data} {current_job.attempt}")


def is_mishap(luck: Random, share: float) -> bool:
    """Whether this attempt goes wrong: so do that share of all first attempts, and no later ones."""
    return current_job.attempt == 1 and luck.random() < share


def share_workers(workers: int) -> dict[str, int]:
    """How many jobs of each queue run at a time: a quarter each for wild and training, the rest for the journey."""
    quarter = max(1, workers // 4)
    return {"wild": quarter, "training": quarter, "journey": workers - 2 * quarter}


# --- the players ------------------------------------------------------------------------------------------------------


def play(player: str, *, moves: int, seconds_per_move: float, world: World, game_over: Event) -> None:
    """Make this many moves, or as many as there is time for. A move enqueues one job, as a view of a website would.

    Moves come at random, in so many seconds each on average, and sooner than that after one that took its time.
    """
    luck = Random(f"{world.seed} {player}")
    team = luck.sample(MONSTERS, TEAM_SIZE)
    next_move_at = time.monotonic()
    with world.ledger.connection() as connection:
        for turn in range(1, moves + 1):
            next_move_at += luck.expovariate(1 / seconds_per_move)
            if game_over.wait(max(0.0, next_move_at - time.monotonic())):
                return
            job, arguments = choose_move(player, team, turn, luck)
            # The job and its entry in the ledger are written in one transaction: there is never one without the other.
            with connection:
                handle = job.options(connection=connection).delay(**arguments)
                world.ledger.note_move(connection, handle)


def choose_move(player: str, team: Sequence[str], turn: int, luck: Random) -> tuple[Any, dict[str, Any]]:
    """The job that a player asks for, and its arguments."""
    weighted: dict[Callable[..., None], tuple[int, dict[str, Any]]] = {
        catch: (25, {"monster": luck.choice(MONSTERS), "place": luck.choice(PLACES), "turn": turn}),
        train: (25, {"monster": luck.choice(team)}),
        heal: (15, {"monsters": luck.sample(team, luck.randint(1, TEAM_SIZE)), "turn": turn}),
        battle: (10, {"leader": luck.choice(LEADERS), "turn": turn}),
        explore: (25, {"place": luck.choice(PLACES), "turn": turn}),
    }
    job = luck.choices(list(weighted), [weight for weight, _ in weighted.values()])[0]
    return job, {"player": player, **weighted[job][1]}
