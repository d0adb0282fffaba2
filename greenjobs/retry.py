"""When a failed job runs again: pure arithmetic, in seconds."""

from __future__ import annotations

import random

FIRST_DELAY_SECONDS = 60.0
LONGEST_DELAY_SECONDS = 24 * 60 * 60.0
JITTER = 0.1  # so that a thousand jobs that failed together do not come back together


def exponential_delay(retries: int) -> float:
    """Seconds until the next attempt of a job that has failed `retries` times, the last failure included.

    The rule of crates.io's jobs: 1 minute × 2^retries. Varied by up to a tenth either way, and never above a day.
    """
    # Beyond 2^11 minutes the bound holds anyway; the exponent is capped so that no count can overflow a float.
    delay = FIRST_DELAY_SECONDS * 2.0 ** min(retries, 11)
    return min(delay * random.uniform(1 - JITTER, 1 + JITTER), LONGEST_DELAY_SECONDS)
