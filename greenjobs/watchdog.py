"""Notices when something holds the event loop: says which job, and where it stood; and measures the loop's lag.

A timer of the event loop notes the time, a few times a second. A native thread looks at that note when it would be too
old: where no newer one has come, the loop is being held, and the thread looks at the stack of the loop's own thread.
What no thread of Python's can see, C code that keeps the interpreter lock meanwhile, the timer finds out afterwards.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import gevent
from gevent.hub import Hub
from gevent.monkey import get_original

from greenjobs import events

if TYPE_CHECKING:
    from greenjobs.current import Attempt

logger = logging.getLogger(__name__)

# The loop notes the time so many times in `max_blocking`, and at least this often: eight times a second by default.
_TURNS = 4
_LONGEST_INTERVAL_SECONDS = 0.25

# More often it would cost more than it is worth.
_SHORTEST_INTERVAL_SECONDS = 0.005

# The largest lag of so long is remembered.
_LAG_MEMORY_SECONDS = 60.0

# Of the same job type there is one report in this time; the next says how many were left out.
_QUIET_SECONDS = 60.0

Find = Callable[[FrameType], "tuple[Attempt, FrameType] | None"]
"""The attempt that a stack is of, by its innermost frame, and the frame that called its function."""


@dataclass(slots=True, eq=False)
class Held:
    """An occurrence: who holds the loop, since when, and where it stood. No attempt: none, or it cannot be said."""

    attempt: Attempt | None
    began: float
    stack: str
    seen: float = 0.0
    """When it was seen to hold it last."""
    is_told: bool = False

    @property
    def job_type(self) -> str | None:
        """The type of the job at fault."""
        return None if self.attempt is None else self.attempt.row.job_type

    def log_keys(self, seconds: float) -> dict[str, Any]:
        """The keys of a log line."""
        keys: dict[str, Any] = {"held_ms": round(seconds * 1000)}
        if self.attempt is not None:
            row, place = self.attempt.row, self.attempt.place
            keys |= {"job_id": row.id, "job_type": row.job_type, "queue": place.queue, "attempt": self.attempt.number}
        return keys


class Watchdog:
    """Watches the event loop of the thread that starts it. With `max_blocking` of 0 it only measures.

    `on_held` is called in the loop, with the job type, when an occurrence is over, after the handlers of LoopHeld.
    """

    def __init__(self, max_blocking: float, *, find: Find, on_held: Callable[[str], None]) -> None:
        self.max_blocking = max_blocking
        self.held: Counter[str | None] = Counter()
        """How often jobs of a type have held the loop for longer than that; None: something else, or it is unknown."""
        self._find = find
        self._on_held = on_held
        interval = min(max_blocking / _TURNS or _LONGEST_INTERVAL_SECONDS, _LONGEST_INTERVAL_SECONDS)
        self._interval = max(interval, _SHORTEST_INTERVAL_SECONDS)
        self._beat = 0.0
        self._lag = 0.0
        self._peaks: deque[tuple[float, float]] = deque()
        self._open: list[Held] = []
        """Who has held the loop since its last turn, one after the other."""
        self._looks = 0
        """How often the thread has looked since then."""
        self._quiet: dict[str | None, tuple[float, int]] = {}
        self._lock = get_original("_thread", "allocate_lock")()
        self._timer: Any = None
        self._loop_thread = 0

    def start(self) -> None:
        """Begin to watch the loop of this thread."""
        self._beat = time.perf_counter()
        self._loop_thread = get_original("_thread", "get_ident")()
        # It keeps no loop alive that has nothing else to do.
        self._timer = gevent.get_hub().loop.timer(self._interval, self._interval, ref=False)
        self._timer.start(self._note_turn)
        if self.max_blocking:
            get_original("_thread", "start_new_thread")(self._look_until_stopped, (self._timer,))

    def stop(self) -> None:
        """Watch no longer; returns at once."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    @property
    def lag(self) -> float:
        """By how many seconds the loop is late with what is due. For any thread, and while it is held, too."""
        if self._timer is None:
            return 0.0
        return max(self._lag, time.perf_counter() - self._beat - self._interval)

    @property
    def max_lag(self) -> float:
        """The largest lag of the last minute, in seconds."""
        since = time.perf_counter() - _LAG_MEMORY_SECONDS
        return max((lag for at, lag in tuple(self._peaks) if at >= since), default=0.0)

    # --- in the loop --------------------------------------------------------------------------------------------------

    def _note_turn(self) -> None:
        now = time.perf_counter()
        with self._lock:
            beat, self._beat = self._beat, now
            over, self._open = self._open, []
            looks, self._looks = self._looks, 0
        self._lag = lag = max(now - beat - self._interval, 0.0)
        self._note_peak(now, lag)
        # Well beyond it: just then the thread may have been about to look.
        if not over and self.max_blocking and lag > self.max_blocking + self._interval:
            over = [Held(None, beat + self._interval, "")]
        for held, following in zip(over, [*over[1:], None], strict=False):
            end = now if following is None else following.began
            # Not here: handlers may wait.
            gevent.spawn(self._report_end, held, end - held.began, was_seen=looks > 0)

    def _note_peak(self, now: float, lag: float) -> None:
        peaks = self._peaks
        while peaks and (peaks[-1][1] <= lag or len(peaks) == 1 and peaks[0][0] < now - _LAG_MEMORY_SECONDS):
            peaks.pop()
        while peaks and peaks[0][0] < now - _LAG_MEMORY_SECONDS:
            peaks.popleft()
        peaks.append((now, lag))

    def _report_end(self, held: Held, seconds: float, *, was_seen: bool) -> None:
        attempt, job_type = held.attempt, held.job_type
        self.held[job_type] += 1
        if not held.stack and self._may_tell(None):
            why = (
                "several jobs one after the other, none of which held it for that long"
                if was_seen
                else "C code that lets no thread of Python's run, or the whole process was stopped, or had no processor"
            )
            logger.warning(
                "the event loop was held for %.1f s, and it cannot be said by which job: %s%s",
                *(seconds, why, self._left_out(None)),
                extra=held.log_keys(seconds),
            )
        elif held.is_told and attempt is not None:
            logger.warning(
                "job %s (%s) let go of the event loop after %.1f s",
                *(attempt.row.id, job_type, seconds),
                extra=held.log_keys(seconds),
            )
        elif held.is_told:
            logger.warning("the event loop goes on after %.1f s", seconds, extra=held.log_keys(seconds))
        events.publish(
            events.LoopHeld(
                job_type=job_type,
                id=None if attempt is None else attempt.row.id,
                queue=None if attempt is None else attempt.place.queue,
                seconds=seconds,
                stack=held.stack,
            )
        )
        if job_type is not None:
            self._on_held(job_type)

    # --- in a native thread -------------------------------------------------------------------------------------------

    def _look_until_stopped(self, timer: Any) -> None:
        sleep = get_original("time", "sleep")
        while self._timer is timer:
            beat, now = self._beat, time.perf_counter()
            pause = beat + self._interval + self.max_blocking - now
            if pause <= 0:
                pause = self._interval
                self._look(beat)
            sleep(pause)
            # Who overslept, because the machine is busy or the process was stopped, cannot blame the loop for the same.
            if time.perf_counter() - now - pause > self.max_blocking / 2:
                sleep(self._interval)

    def _look(self, beat: float) -> None:
        frame = sys._current_frames().get(self._loop_thread)
        # In the loop itself it waits for the processor, and nobody holds it.
        if frame is None or frame.f_code is Hub.run.__code__:
            return
        self._looks += 1
        attempt, outermost, began = None, None, beat + self._interval
        found = self._find(frame)
        if found is not None:
            attempt, outermost = found
            # It has run on its own since it started, or let others run until about the last turn.
            began = max(attempt.started, beat)
        known, now = self._open[-1] if self._open else None, time.perf_counter()
        if known is not None:
            if known.attempt is attempt:
                known.seen = now
                return
            began = max(began, known.seen)
        # Several jobs may have had their turn since the loop's last one: it takes one that holds it by itself.
        if now - began < self.max_blocking:
            return
        held = Held(attempt, began, _stack_below(outermost, frame), now)
        del frame, outermost, found
        with self._lock:
            if self._beat != beat:  # it went on meanwhile
                return
            self._open.append(held)
            held.is_told = self._may_tell(held.job_type)
        if held.is_told:
            try:
                self._tell(held)
            except Exception:  # a filter or a handler of the application's
                sys.stderr.write(f"the event loop is held (job type {held.job_type}); logging it failed\n")

    def _tell(self, held: Held) -> None:
        seconds = time.perf_counter() - held.began
        left_out = self._left_out(held.job_type)
        if held.attempt is None:
            logger.warning(
                "the event loop has been held for %.1f s, by no job%s; it stands in\n%s",
                *(seconds, left_out, held.stack),
                extra=held.log_keys(seconds),
            )
            return
        logger.warning(
            "job %s (%s) has held the event loop for %.1f s, while no other job here goes on%s; it stands in\n%s",
            *(held.attempt.row.id, held.job_type, seconds, left_out, held.stack),
            extra=held.log_keys(seconds),
        )

    # --- not too often ------------------------------------------------------------------------------------------------

    def _may_tell(self, job_type: str | None) -> bool:
        quiet_until, left_out = self._quiet.get(job_type, (0.0, 0))
        if time.perf_counter() < quiet_until:
            self._quiet[job_type] = quiet_until, left_out + 1
            return False
        self._quiet[job_type] = time.perf_counter() + _QUIET_SECONDS, left_out
        return True

    def _left_out(self, job_type: str | None) -> str:
        """How many reports of this job type were left out since the last one, as a part of the next."""
        quiet_until, left_out = self._quiet[job_type]
        self._quiet[job_type] = quiet_until, 0
        return f" ({left_out} more times since the last line like this)" if left_out else ""


def _stack_below(outermost: FrameType | None, innermost: FrameType) -> str:
    """The stack as text, as far as it is below that frame; of that one itself, when it calls C code."""
    frames: list[tuple[FrameType, int]] = []
    for frame, line in traceback.walk_stack(innermost):
        if frame is not outermost or not frames:
            frames.append((frame, line))
        if frame is outermost:
            break
    return "".join(traceback.StackSummary.extract(iter(reversed(frames))).format()).rstrip()
