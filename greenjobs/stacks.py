"""Where code stands, for people who ask a runner what it does."""

from __future__ import annotations

import traceback
from types import FrameType


def lines_of(frame: FrameType | None) -> list[str]:
    """The innermost last: file, line and function, and nothing of what is in them."""
    walked = list(traceback.walk_stack(frame)) if frame is not None else []
    return [f"{each.f_code.co_filename}:{line} {each.f_code.co_name}" for each, line in reversed(walked)]
