"""What enqueuing returns: the job, as seen from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from greenjobs import config
from greenjobs.current import database_rooms, lender


@dataclass(slots=True, unsafe_hash=True)  # frozen would make it three times as dear
class JobHandle:
    """A job that was enqueued. With `duplicate`, `id` is the unstarted job that was there already."""

    id: int
    job_type: str
    duplicate: bool = False

    def cancel(self) -> Literal["removed", "asked", "gone"]:
        """End the job. One that waits is removed; one that runs is asked to end, and JobCancelled raised in it within a
        second, in whichever process it runs; one that is done or failed is gone."""
        _, storage = database_rooms()
        with lender(config.current()).connection() as connection:
            removed, asked = storage.cancel(connection, [self.id])
        return "removed" if removed else "asked" if asked else "gone"
