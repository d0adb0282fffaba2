"""Several queues of one runner that share a number of slots, in strict order or by weights.

A slot is room for one running job. Whenever something changes (a job ends, jobs were claimed, a queue has nothing more)
the share says anew how many slots each queue may use: those in which its jobs run, and of the free ones what its order
or its weight gives it, if it wants any. It says so by the size of the pool of each queue's executor, which starts jobs
within it, and from which the worker sees how many to claim. So the sum of all pools is never more than the share has
slots, and what was claimed ahead in one queue holds up no other: it waits until its queue is given a slot.

A queue wants slots while jobs of it are here that have not started, and while it is hungry: its last claim brought as
many as were asked for, so that there may be more. What a hungry queue is given is kept free until its claim is
answered, which takes about a millisecond; when that comes back short, others get the rest.

In strict order the first queue that wants slots gets all that are free. By weights, each slot goes to the queue that
has the least for its weight: the slots that it has with this one, and what it had too much over time. Without the
latter one slot, or fewer slots than queues, would always go to the heaviest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from greenjobs.execution import Executor

# So many seconds of one slot too much, at the smallest weight, count as much as one slot. It is long beside the
# milliseconds in which slots are handed out, and short beside what people notice.
_LAG_SECONDS = 0.1

# What a queue had too much is remembered up to so many seconds of one slot, at the smallest weight.
_LONGEST_LAG_SECONDS = 60.0


class Stake:
    """What one queue has in a share. Made by `Share.join`.

    `limit` is the most slots it may have, `is_hungry` says that there may be more jobs to claim, and `may_read_ahead`
    that jobs claimed beyond the free slots would not wait behind those of other queues.
    """

    __slots__ = (
        "_on_room",
        "executor",
        "granted",
        "is_hungry",
        "limit",
        "may_read_ahead",
        "share",
        "used",
        "wanted",
        "weight",
    )

    def __init__(
        self, share: Share, executor: Executor, *, limit: int, weight: float, on_room: Callable[[], None]
    ) -> None:
        self.share = share
        self.executor = executor
        self.limit = limit
        self.weight = weight
        self.is_hungry = True
        self.may_read_ahead = True
        self.granted = 0
        self.wanted = 0
        """What it wanted when slots were handed out last."""
        self.used = 0.0
        """Slot-seconds for its weight, on a scale that only the share can read."""
        self._on_room = on_room

    def set_hungry(self, is_hungry: bool) -> None:
        """Say whether there may be more jobs than were claimed."""
        self.is_hungry = is_hungry
        self.share.distribute()

    def count_wanted(self) -> int:
        """How many slots it would use beside those in which its jobs run."""
        most = max(self.limit - len(self.executor.running), 0)
        return most if self.is_hungry else min(self.executor.ready, most)

    def take_up(self) -> None:
        """Let the executor and the worker use what was granted."""
        executor = self.executor
        if executor.pool != self.granted:
            executor.resize(self.granted)
        if self.is_hungry and self.granted > executor.held:
            self._on_room()


class Share:
    """So many slots for the queues that have joined, in strict order unless it is `by_weight`."""

    def __init__(self, slots: int, *, by_weight: bool) -> None:
        self.slots = slots
        self.by_weight = by_weight
        self._stakes: list[Stake] = []
        self._counted_at = time.monotonic()

    def join(
        self, executor: Executor, *, limit: int, weight: float | None = None, on_room: Callable[[], None]
    ) -> Stake:
        """A stake for one more queue, behind those that have joined; `on_room` is called when it may claim jobs."""
        stake = Stake(self, executor, limit=limit, weight=weight or 1.0, on_room=on_room)
        self._stakes.append(stake)
        return stake

    def distribute(self) -> None:
        """Say how many slots each queue may use now. Switches to no other greenlet."""
        free = self.slots
        used_until = self._counted_at
        self._counted_at = time.monotonic()
        for stake in self._stakes:
            if self.by_weight:
                stake.used += stake.granted * (self._counted_at - used_until) / stake.weight
            stake.granted = len(stake.executor.running)
            free -= stake.granted
        if self.by_weight:
            self._hand_out_by_weight(free)
        else:
            self._hand_out_in_order(free)
        for stake in self._stakes:
            stake.take_up()

    def is_next(self, stake: Stake) -> bool:
        """Whether the next free slot would be for this queue, if it had a job ready for it."""
        if len(stake.executor.running) >= stake.limit:
            return False
        rivals = [each for each in self._stakes if each is stake or each.count_wanted()]
        return (min(rivals, key=self._need(rivals)) if self.by_weight else rivals[0]) is stake

    def _hand_out_in_order(self, free: int) -> None:
        somebody_before_waits = False
        for stake in self._stakes:
            stake.wanted = stake.count_wanted()
            given = min(stake.wanted, free)
            stake.granted += given
            free -= given
            stake.may_read_ahead = not somebody_before_waits
            # A hungry queue that got all it may have could still have more jobs than that, but not start them.
            if stake.wanted and (stake.is_hungry or given < stake.wanted):
                somebody_before_waits = True

    def _hand_out_by_weight(self, free: int) -> None:
        wanting = self._find_wanting()
        need = self._need(wanting)
        left = {stake: stake.wanted for stake in wanting}
        while free > 0 and left:
            stake = min(left, key=need) if len(left) > 1 else next(iter(left))
            given = 1 if len(left) > 1 else min(left[stake], free)
            stake.granted += given
            free -= given
            left[stake] -= given
            if not left[stake]:
                del left[stake]

    def _find_wanting(self) -> list[Stake]:
        """The stakes that want slots. One that wanted none until now has saved nothing up, and owes nothing."""
        new: list[Stake] = []
        old: list[Stake] = []
        for stake in self._stakes:
            wanted_before = stake.wanted
            stake.wanted = stake.count_wanted()
            if stake.wanted:
                (old if wanted_before else new).append(stake)
        if old:
            least = min(stake.used for stake in old)
            for stake in new:
                stake.used = max(stake.used, least)
        return [stake for stake in self._stakes if stake.wanted]

    def _need(self, wanting: Sequence[Stake]) -> Callable[[Stake], float]:
        """The smaller, the more a stake is in need of a slot; of equal ones the first is."""
        least = min((stake.used for stake in wanting), default=0.0)

        def need(stake: Stake) -> float:
            lag = min(stake.used - least, _LONGEST_LAG_SECONDS)
            return (stake.granted + 1) / stake.weight + lag / _LAG_SECONDS

        return need
