"""What a job raises to say how this attempt ends."""

from __future__ import annotations

from datetime import timedelta

from greenjobs.errors import JobControl
from greenjobs.retry import seconds_after


class Retry(JobControl):
    """Raise it to fail this attempt and say when to try again; counts like any failure, up to `max_retries`.

    `after` is in seconds, a timedelta, or the value of a Retry-After header; without it the job's backoff decides.
    """

    def __init__(self, reason: str = "", *, after: float | timedelta | str | None = None) -> None:
        super().__init__(reason)
        self.after = None if after is None else seconds_after(after)


class Snooze(JobControl):
    """Raise it to run again after so many seconds (or a timedelta); counts as nothing."""

    def __init__(self, after: float | timedelta | str, reason: str = "") -> None:
        super().__init__(reason)
        self.after = seconds_after(after)


class Discard(JobControl):
    """Raise it to end the job for good: it is neither done nor failed, and not tried again."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
