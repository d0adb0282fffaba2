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
has the least for its weight, as seats go to parties (the method of Sainte-Laguë). Slots are whole, and parts are not:
what a queue has too much or too little by less than a slot adds up over time, and counts. Without that, one slot would
always be the heaviest queue's. More than that is no matter of rounding: jobs of a queue that was alone run on, and it
owes nobody for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from greenjobs.execution import Executor

# So many slot-seconds too much count as one slot. It is long beside the milliseconds in which slots are handed out, and
# short beside what people notice.
_SLOT_SECONDS = 0.1

# No more than so many slot-seconds are remembered.
_MOST_SLOT_SECONDS = 60.0

# A queue that is off its part by a slot or more is not so by rounding.
_ROUNDING = 0.999


class Stake:
    """What one queue has in a share. Made by `Share.join`.

    `limit` is the most slots it may have, `is_hungry` says that there may be more jobs to claim, and `may_read_ahead`
    that jobs claimed beyond the free slots would not wait behind those of other queues.
    """

    __slots__ = (
        "_on_room",
        "debt",
        "executor",
        "granted",
        "is_hungry",
        "limit",
        "may_read_ahead",
        "share",
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
        self.debt = 0.0
        """How many slot-seconds it had beyond its part, as far as rounding goes."""
        self._on_room = on_room

    def set_hungry(self, is_hungry: bool) -> None:
        """Say whether there may be more jobs than were claimed."""
        self.is_hungry = is_hungry
        self.share.distribute()

    def count_wanted(self) -> int:
        """How many slots it would use beside those in which its jobs run."""
        # One that may have all slots, and has them, wants the next that gets free as well.
        limit = self.limit if self.limit < self.share.slots else self.share.slots + 1
        most = max(limit - len(self.executor.running), 0)
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
        if self.by_weight:
            self._charge()
        free = self.slots
        for stake in self._stakes:
            stake.granted = len(stake.executor.running)
            stake.wanted = stake.count_wanted()
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
        return (min(rivals, key=_need) if self.by_weight else rivals[0]) is stake

    def _hand_out_in_order(self, free: int) -> None:
        somebody_before_waits = False
        for stake in self._stakes:
            given = min(stake.wanted, free)
            stake.granted += given
            free -= given
            stake.may_read_ahead = not somebody_before_waits
            # A hungry queue that got all it may have could still have more jobs than that, but not start them.
            if stake.wanted and (stake.is_hungry or given < stake.wanted):
                somebody_before_waits = True

    def _hand_out_by_weight(self, free: int) -> None:
        left = {}
        for stake in self._stakes:
            if stake.wanted:
                left[stake] = stake.wanted
            else:  # it has saved nothing up for when it does
                stake.debt = 0.0
        while free > 0 and left:
            if len(left) > 1:
                stake, given = min(left, key=_need), 1
            else:
                stake = next(iter(left))
                given = min(left[stake], free)
            stake.granted += given
            free -= given
            left[stake] -= given
            if not left[stake]:
                del left[stake]

    def _charge(self) -> None:
        """Write down what each queue that wanted slots had beyond its part since they were handed out."""
        now = time.monotonic()
        seconds, self._counted_at = now - self._counted_at, now
        rivals = [stake for stake in self._stakes if stake.wanted]
        if not rivals:
            return
        whole = sum(stake.granted for stake in rivals) / sum(stake.weight for stake in rivals)
        for stake in rivals:
            excess = stake.granted - whole * stake.weight
            if abs(excess) < _ROUNDING:
                stake.debt += excess * seconds
        # What one had too much others had too little; also after some of them have left.
        total = sum(stake.debt for stake in rivals) / sum(stake.weight for stake in rivals)
        for stake in rivals:
            debt = stake.debt - total * stake.weight
            stake.debt = max(min(debt, _MOST_SLOT_SECONDS), -_MOST_SLOT_SECONDS)


def _need(stake: Stake) -> float:
    """The smaller, the more a queue is in need of one more slot; of equal ones the first is."""
    return (stake.granted + 0.5 + stake.debt / _SLOT_SECONDS) / stake.weight
