"""Every statement that changes rows of jobs, runners and waiting workers.

Each function takes an autocommit connection (or, to enqueue, the caller's own, in its transaction) and does one
statement, so that nothing is ever half done. Changes to a claimed job are fenced by owner and attempt: they name the
runner and the attempt they speak for, and leave alone a row that has moved on.
"""

from greenjobs.storage.cancellation import cancel, remove_cancelled
from greenjobs.storage.care import Rescued, promote, rescue, route
from greenjobs.storage.claims import ClaimCursor, ClaimedJob, claim, claim_order
from greenjobs.storage.enqueuing import PROMOTER_SECONDS, Enqueued, NewJobs, enqueue, enqueue_inside, unique_key
from greenjobs.storage.fence import Fence
from greenjobs.storage.outcomes import KEPT_ERRORS, Failure, Snoozed, acknowledge, fail, give_back, snooze
from greenjobs.storage.people import discard, prune, retry
from greenjobs.storage.queues import pause_queues, resize_queues, restore_queue_sizes, resume_queues
from greenjobs.storage.runners import (
    end_runners,
    forget_runners,
    note_memory,
    register_runner,
    renew_lease,
    say_waiting,
    wake,
)
from greenjobs.storage.schedules import (
    NewSchedule,
    TakenTicks,
    drop_schedule,
    keep_schedule,
    note_tick,
    pause_schedule,
    take_ticks,
)
from greenjobs.storage.transaction import CHANNEL, atomic

__all__ = [
    "CHANNEL",
    "KEPT_ERRORS",
    "PROMOTER_SECONDS",
    "ClaimCursor",
    "ClaimedJob",
    "Enqueued",
    "Failure",
    "Fence",
    "NewJobs",
    "NewSchedule",
    "Rescued",
    "Snoozed",
    "TakenTicks",
    "acknowledge",
    "atomic",
    "cancel",
    "claim",
    "claim_order",
    "discard",
    "drop_schedule",
    "end_runners",
    "enqueue",
    "enqueue_inside",
    "fail",
    "forget_runners",
    "give_back",
    "keep_schedule",
    "note_memory",
    "note_tick",
    "pause_queues",
    "pause_schedule",
    "promote",
    "prune",
    "register_runner",
    "remove_cancelled",
    "renew_lease",
    "rescue",
    "resize_queues",
    "restore_queue_sizes",
    "resume_queues",
    "retry",
    "route",
    "say_waiting",
    "snooze",
    "take_ticks",
    "unique_key",
    "wake",
]
