"""What a task knows of the call that it carries out: `self.request`, and `current_task`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenjobs.contrib.celery.exceptions import Retry
    from greenjobs.contrib.celery.task import Task


# What a message of Celery's has besides.
_OF_MESSAGES = frozenset(
    [
        *("argsrepr", "callbacks", "chain", "chord", "errbacks", "group_index", "ignore_result", "kwargsrepr", "lang"),
        *("origin", "properties", "replaced_task_nesting", "reply_to", "shadow", "stamps", "timelimit", "utc"),
    ]
)


@dataclass(slots=True)
class Request:
    """One call of a task. Of one that runs in a runner, `id` is that of the job, as a text, and all arguments are in
    `kwargs`, by name, but for those that can only be passed by position. Headers are attributes, too, as in Celery.
    """

    id: str | None = None
    task: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 0
    is_eager: bool = False
    called_directly: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)
    delivery_info: Mapping[str, Any] = field(default_factory=dict)
    hostname: str | None = None
    root_id: str | None = None
    parent_id: str | None = None
    eta: None = None
    expires: None = None
    group: None = None
    pending_retry: Retry | None = None
    is_entered: bool = False

    @property
    def correlation_id(self) -> str | None:
        """The id."""
        return self.id

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            if name in self.headers:
                return self.headers[name]
            if name in _OF_MESSAGES:
                return None
        raise AttributeError(f"the request of a task has no {name!r}")

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute, or the header, of that name."""
        return getattr(self, name, default)


_frames: ContextVar[tuple[tuple[Task, Request], ...]] = ContextVar("greenjobs_celery_frames", default=())


def request_of(task: Task) -> Request:
    """That of the innermost call of this task that goes on here; an empty one when there is none."""
    for each, request in reversed(_frames.get()):
        if each is task:
            return request
    return Request()


def innermost() -> Task | None:
    """The task whose call goes on here; None when there is none."""
    frames = _frames.get()
    return frames[-1][0] if frames else None


def attempt_here() -> Request | None:
    """The call that a runner makes here; None outside of one."""
    for _, request in _frames.get():
        if not request.called_directly and not request.is_eager:
            return request
    return None


@contextlib.contextmanager
def entered(task: Task, request: Request) -> Iterator[None]:
    """Inside the block it is the innermost call."""
    token = _frames.set((*_frames.get(), (task, request)))
    try:
        yield
    finally:
        _frames.reset(token)


class CurrentTask:
    """The task that runs here, as far as it is one; false outside of any."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return innermost() is not None

    def __getattr__(self, name: str) -> Any:
        return getattr(innermost(), name)

    def __eq__(self, other: object) -> bool:
        return innermost() is other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(innermost())


current_task = CurrentTask()
