"""What `expires` may be: how long after it is due, or until when, a job may begin."""

from __future__ import annotations

from datetime import datetime, timedelta

from greenjobs.errors import JobDefinitionError, OptionError

LONGEST_EXPIRY_SECONDS = 100 * 365 * 24 * 60 * 60.0


def checked_seconds(job_name: str, expires: object, error: type[JobDefinitionError | OptionError]) -> float:
    """The seconds that these are; raises `error` for what are none."""
    is_call = error is OptionError
    seconds = expires.total_seconds() if isinstance(expires, timedelta) else expires
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        allowed = "a number of seconds, a timedelta, or an aware datetime" if is_call else "seconds, or a timedelta"
        raise error(f"{job_name}: expires is {expires!r}; allowed: {allowed}")
    # NaN is refused, too: no comparison holds for it.
    if not 0 < seconds <= LONGEST_EXPIRY_SECONDS:
        limit = f"{LONGEST_EXPIRY_SECONDS:.0f} seconds"
        raise error(f"{job_name}: expires is {expires!r}; allowed: more than 0, up to {limit}")
    return float(seconds)


def of_call(job_name: str, expires: object, run_at: datetime | None) -> tuple[float | None, datetime | None]:
    """What one call says: seconds from when it is due, or an instant, or neither. Raises OptionError."""
    if expires is None:
        return None, None
    if not isinstance(expires, datetime):
        return checked_seconds(job_name, expires, OptionError), None
    if expires.utcoffset() is None:
        raise OptionError(
            f"{job_name}: expires is {expires!r}, which has no time zone; "
            f"use an aware one, such as datetime.now(timezone.utc) + timedelta(hours=1), or seconds"
        )
    if run_at is not None and expires <= run_at:
        raise OptionError(f"{job_name}: expires is {expires}, and the job is not due before {run_at}")
    return None, expires
