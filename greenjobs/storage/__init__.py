"""Every statement that changes rows of jobs, runners and waiting workers.

Each function takes an autocommit connection (or, to enqueue and to complete, the caller's own, in its transaction)
and does one statement, so that nothing is ever half done. Changes to a claimed job are fenced by owner and attempt:
they name the runner and the attempt they speak for, and leave alone a row that has moved on.
"""

from greenjobs.storage.cancellation import cancel, remove_cancelled
from greenjobs.storage.care import Rescued, promote, rescue, route
from greenjobs.storage.claims import ClaimCursor, ClaimedJob, claim, claim_order
from greenjobs.storage.counts import add_counts, prune_counts, read_counts, total_counts
from greenjobs.storage.enqueuing import (
    PROMOTER_SECONDS,
    Enqueued,
    NewJobs,
    enqueue,
    enqueue_inside,
    exclusive_key,
    unique_key,
)
from greenjobs.storage.exclusive import claim_exclusive, wake_next
from greenjobs.storage.fence import Fence
from greenjobs.storage.history import Ended, end, forget, listen_for_end, prune_history, watch
from greenjobs.storage.outcomes import KEPT_ERRORS, Failure, Snoozed, acknowledge, fail, give_back, snooze
from greenjobs.storage.people import discard, prune, retry
from greenjobs.storage.progress import last_progress, report
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
from greenjobs.storage.transaction import CHANNEL, atomic, patiently, transaction_id
from greenjobs.storage.unique import UniqueRule
from greenjobs.storage.windows import prune_windows

__all__ = [
    "CHANNEL",
    "KEPT_ERRORS",
    "PROMOTER_SECONDS",
    "ClaimCursor",
    "ClaimedJob",
    "Ended",
    "Enqueued",
    "Failure",
    "Fence",
    "NewJobs",
    "NewSchedule",
    "Rescued",
    "Snoozed",
    "TakenTicks",
    "UniqueRule",
    "acknowledge",
    "add_counts",
    "atomic",
    "cancel",
    "claim",
    "claim_exclusive",
    "claim_order",
    "discard",
    "drop_schedule",
    "end",
    "end_runners",
    "enqueue",
    "enqueue_inside",
    "exclusive_key",
    "fail",
    "forget",
    "forget_runners",
    "give_back",
    "keep_schedule",
    "last_progress",
    "listen_for_end",
    "note_memory",
    "note_tick",
    "patiently",
    "pause_queues",
    "pause_schedule",
    "promote",
    "prune",
    "prune_counts",
    "prune_history",
    "prune_windows",
    "read_counts",
    "register_runner",
    "remove_cancelled",
    "renew_lease",
    "report",
    "rescue",
    "resize_queues",
    "restore_queue_sizes",
    "resume_queues",
    "retry",
    "route",
    "say_waiting",
    "snooze",
    "take_ticks",
    "total_counts",
    "transaction_id",
    "unique_key",
    "wake",
    "wake_next",
    "watch",
]
