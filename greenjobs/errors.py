"""Every error that greenjobs raises on purpose: one root, a subclass for each thing a caller can do differently.

Messages name the object and the way out; what a handler may want to compute with is an attribute.
"""

from __future__ import annotations


class GreenjobsError(Exception):
    """The root of all errors raised by greenjobs."""


class ConfigError(GreenjobsError):
    """A setting is missing or wrong; the message names the option, the value, and what is allowed."""


class JobDefinitionError(GreenjobsError):
    """A `@job` cannot work as it is declared; raised when its module is imported."""


class PayloadError(GreenjobsError, ValueError):
    """An argument cannot be stored as JSON; raised by `.delay`, nothing was enqueued.

    `path` leads to the value, as in `to[2].name`; it is empty when the payload as a whole is at fault.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class PayloadMismatch(GreenjobsError):
    """A stored payload does not fit the job's signature any more, so that no retry can help.

    `path` names the argument or field that does not fit.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class DatabaseUnavailable(GreenjobsError):
    """The database cannot be used: it does not answer in time, refuses, is too old, or all connections are busy."""


class SchemaError(GreenjobsError):
    """The tables are missing, older than this release, or not what a migration left behind; says what to type."""


class AccessDenied(GreenjobsError):
    """The role of the database may not do what was asked of it; says which right it lacks."""


class EmbeddedServerError(GreenjobsError):
    """The embedded PostgreSQL server cannot be found or started."""


class NotPatched(GreenjobsError):
    """A runner was started in a process that gevent has not patched, where jobs would wait one after the other."""


class OptionError(GreenjobsError, ValueError):
    """An option of one `.options(...)` call is wrong; nothing was enqueued."""


class UniquenessError(GreenjobsError, ValueError):
    """The unique key of a call, or its merger with the job that waits, could not be made; nothing was enqueued."""


class NoCurrentJob(GreenjobsError, RuntimeError):
    """`current_job` was asked outside a job."""


class UnknownJob(GreenjobsError):
    """A name under which no job is registered in this process."""


class JobsFailed(GreenjobsError):
    """There are jobs that failed at least once; `count` says how many."""

    def __init__(self, message: str, *, count: int) -> None:
        super().__init__(message)
        self.count = count


class JobTimeout(GreenjobsError, TimeoutError):
    """Raised in a job that has run for its `timeout`. It may catch it to end well; else the attempt has failed."""


class JobProcessDied(GreenjobsError):
    """The process in which a job ran has ended under it, or did not start; the attempt has failed.

    `status` is its exit status, negative for the number of the signal that ended it; None when it is not known.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class JobProcessError(GreenjobsError):
    """Stands for an error that a job raised in its own process, where the class of that is not known in this one."""


class JobNotEnded(GreenjobsError, TimeoutError):
    """A job did not end while somebody waited for it; it goes on. `status` is what it was at the end of the wait."""

    def __init__(self, message: str, *, id: int, status: str) -> None:
        super().__init__(message)
        self.id = id
        self.status = status


class JobNotCommitted(GreenjobsError):
    """Somebody waits for a job in the transaction that enqueued it, which has to be committed before it can run."""

    def __init__(self, message: str, *, id: int) -> None:
        super().__init__(message)
        self.id = id


class JobHeld(GreenjobsError):
    """The handle of a job was asked for what a job has when it is enqueued, and this one is held until later."""


class JobFailed(GreenjobsError):
    """A job whose result was asked for failed for good. `error` is the class of its last error, `message` its text."""

    def __init__(self, text: str, *, id: int, error: str | None, message: str | None) -> None:
        super().__init__(text)
        self.id = id
        self.error = error
        self.message = message


class NoResult(GreenjobsError, LookupError):
    """A job whose result was asked for has none: it was not kept, or the job ended otherwise; `outcome` says how."""

    def __init__(self, message: str, *, id: int, outcome: str) -> None:
        super().__init__(message)
        self.id = id
        self.outcome = outcome


class JobControl(BaseException):
    """The root of what a job raises, or has raised in it, to say how it ends.

    No Exception, so that a job's own `except Exception` lets them pass.
    """


class JobInterrupted(JobControl):
    """Raised in a running job whose runner cannot wait for it any longer; the job is given back and runs again.

    A job may catch it to tidy up, for a few seconds, and should raise it again: one that returns counts as done.
    """


class JobHardTimeout(JobControl):
    """Raised in a job that has run for its `hard_timeout`; the attempt has failed, whatever the job does about it."""


class JobCancelled(JobControl):
    """Raised in a running job that somebody cancelled; it does not run again, whatever the job does about it."""


class JobExpired(JobControl):
    """Never raised in a job: the `error` of the event that tells of a job that had not started when it expired."""


class JobLost(JobControl):
    """The job is no longer this runner's, so that it cannot complete: its transaction was rolled back.

    Somebody else runs it, or it is gone. Raised at the end of a block of `current_job.transaction()`.
    """


class CompletionError(GreenjobsError, RuntimeError):
    """`current_job.transaction()` was used in a way in which the job cannot complete; the block is rolled back."""


class UnknownSchedule(GreenjobsError):
    """A name that no schedule in the database has."""


class UnknownQueue(GreenjobsError):
    """A name of a queue that nobody serves, that has no jobs, and of which nothing was said: a typo, most likely."""
