"""What enqueuing returns: the job, as seen from outside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from greenjobs import config
from greenjobs.current import database_rooms, lender

Action = Literal["enqueued", "kept", "replaced", "extended", "merged"]


@dataclass(slots=True, unsafe_hash=True)  # frozen would make it three times as dear
class JobHandle:
    """A job that was enqueued. With `duplicate`, `id` is that of the job that has its unique key already, and `action`
    says what became of that one."""

    id: int
    job_type: str
    duplicate: bool = False
    action: Action = field(default="enqueued", compare=False)

    def cancel(self) -> Literal["removed", "asked", "gone"]:
        """End the job. One that waits is removed; one that runs is asked to end, and JobCancelled raised in it within a
        second, in whichever process it runs; one that is done or failed is gone."""
        _, storage = database_rooms()
        with lender(config.current()).connection() as connection:
            removed, asked = storage.cancel(connection, [self.id])
        return "removed" if removed else "asked" if asked else "gone"
