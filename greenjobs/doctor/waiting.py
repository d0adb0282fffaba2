"""Checks of the jobs that wait: whether somebody will run them, and can."""

from __future__ import annotations

import re
import time
from collections import Counter

from greenjobs import inspection
from greenjobs.doctor.case import Case, Check
from greenjobs.doctor.finding import Verdict, fail, ok, several, warn
from greenjobs.errors import PayloadMismatch
from greenjobs.inspection import fitness
from greenjobs.version import __version__

_SAMPLE_SECONDS = 3.0
_SAMPLE_BYTES = 16 * 2**20

# A schedule's tick is looked at within a second.
_OVERDUE_SECONDS = 60.0

# A step of a path that quotes a key of the payload, and so what somebody stored.
_QUOTED_KEY = re.compile(r"\[(?!\d+\]).*?(?:\]|$)")


def runners(case: Case) -> Verdict:
    """Who runs jobs at this moment."""
    live = inspection.live_runners(case.connection())
    if not live:
        waiting = sum(queue.available for queue in inspection.queue_statuses(case.connection()))
        if waiting:
            return warn(f"none lives, and {waiting:,} jobs wait that could run now", "start one: `greenjobs run`")
        return ok("none lives, and no job waits for one")
    versions = Counter(runner.version for runner in live)
    told = ", ".join(f"{count} of release {version}" for version, count in sorted(versions.items()))
    remark = "" if set(versions) == {__version__} else f"; this is {__version__}"
    return ok(f"{len(live)} live: {told}{remark}")


def job_types(case: Case) -> Verdict:
    """Whether jobs wait that nobody knows."""
    known = case.application.names
    unknown = [each for each in inspection.unknown_job_types(case.connection()) if each.job_type not in known]
    if unknown:
        return warn(
            "waiting, and known neither to a live runner nor to this application: "
            + several([f"{each.job_type} ({each.count:,})" for each in unknown], case.limits),
            "start a runner that knows them; give a renamed job its former name, @job(aliases=[…]); or cancel them, as "
            f"in `greenjobs jobs cancel --type {unknown[0].job_type}`",
        )
    return ok("somebody knows every type that waits")


def queues(case: Case) -> Verdict:
    """Whether jobs wait in queues that nobody serves, or that are paused."""
    own = {job.queue for job in case.application.jobs.values()}
    found = inspection.queues(case.connection())
    with_work = [queue for queue in found if queue.waiting + queue.scheduled]
    unserved = [queue for queue in with_work if not queue.servers and queue.name not in own]
    if unserved:
        return warn(
            "jobs wait, and neither a live runner nor a job of this application has the queue: "
            + several([f"{queue.name} ({queue.waiting + queue.scheduled:,})" for queue in unserved], case.limits),
            "serve it, as in `greenjobs run --queue " + unserved[0].name + "`",
        )
    paused = [queue for queue in with_work if queue.paused]
    if paused:
        return warn(
            "paused while jobs wait: "
            + several([f"{queue.name} ({queue.waiting + queue.scheduled:,})" for queue in paused], case.limits),
            f"`greenjobs queues resume {paused[0].name}`, when it is time",
        )
    return ok("every queue in which jobs wait is served, or one of this application's")


def payloads(case: Case) -> Verdict:
    """Whether the arguments of jobs that wait still fit the functions that are to take them."""
    known, reached, limits = case.application.names, case.connection(), case.limits
    deadline = time.monotonic() + _SAMPLE_SECONDS
    misfits, decoded, left = list[str](), 0, list[str]()
    for job_type in fitness.waiting_types(reached):
        if job_type not in known:
            continue
        if time.monotonic() > deadline:
            left.append(job_type)
            continue
        rows = fitness.waiting_payloads(reached, job_type, limit=limits.sampled_payloads, max_bytes=_SAMPLE_BYTES)
        decoded += len(rows)
        for id, data in rows:
            try:
                known[job_type].codec.decode(data)
            except Exception as error:  # of a dataclass of the application's, it may be any
                # Where it does not fit, but not what stands there, which messages may quote.
                path = error.path if isinstance(error, PayloadMismatch) else ""
                misfits.append(f"{job_type} {id}{_at(path)}")
    unseen = f"; there was no time for {several(left, limits)}" if left else ""
    if misfits:
        return fail(
            f"{len(misfits):,} of {decoded:,} no longer fit their job: {several(misfits, limits)}{unseen}",
            "let the function take them as they are, with defaults for what they lack, or cancel them; "
            "else they fail for good as soon as they start",
        )
    return ok(f"all {decoded:,} that were looked at fit their jobs{unseen}")


def schedules(case: Case) -> Verdict:
    """Whether somebody enqueues what the clock asks for, and knows it."""
    reached, known = case.connection(), case.application.names
    found = [each for each in inspection.schedules(reached) if not each.paused]
    unknown = [f"{each.name} ({each.job_type})" for each in found if not each.is_known and each.job_type not in known]
    if unknown:
        return warn(
            f"for job types that neither a live runner nor this application knows: {several(unknown, case.limits)}",
            "start a runner that knows them, or `greenjobs schedules remove` them",
        )
    overdue = fitness.overdue_schedules(reached, age_seconds=_OVERDUE_SECONDS)
    if overdue:
        return warn(
            f"overdue by more than a minute: {several(overdue, case.limits)}", "start a runner that knows their jobs"
        )
    return ok(f"{len(found)} are active, and none is overdue")


def failed_jobs(case: Case) -> Verdict:
    """Whether jobs failed for good, and wait for somebody."""
    failed = sum(queue.failed for queue in inspection.queue_statuses(case.connection()))
    if failed:
        return warn(
            f"{failed:,} failed for good, and are kept",
            "`greenjobs jobs list --state failed` shows why; then retry or discard them",
        )
    return ok("none is kept")


def waiting(case: Case) -> Verdict:
    """Whether what could run waits for long, although it is served."""
    reached = case.connection()
    served = {queue.name: queue for queue in inspection.queues(reached) if queue.servers and not queue.paused}
    late = []
    for status in inspection.queue_statuses(reached):
        seconds = status.oldest_waiting_seconds
        if status.queue in served and seconds is not None and seconds > case.limits.waiting_seconds:
            late.append(f"{status.queue} ({status.available:,}, the oldest for {seconds:,.0f} s)")
    if late:
        return warn(
            f"jobs wait long in queues that are served: {several(late, case.limits)}",
            "a larger --pool or more --processes, if the machine has room; else see where the running ones stand, by "
            "`kill -QUIT` of a runner",
        )
    return ok("nothing waits long in a queue that is served" if served else "no queue is served at this moment")


CHECKS = (
    Check("runners", runners, needs=("schema",)),
    Check("job types", job_types, needs=("schema",)),
    Check("queues", queues, needs=("schema",)),
    Check("payloads", payloads, needs=("schema", "application")),
    Check("schedules", schedules, needs=("schema",)),
    Check("failed jobs", failed_jobs, needs=("schema",)),
    Check("waiting", waiting, needs=("schema",)),
)


def _at(path: str) -> str:
    return f" (at {_QUOTED_KEY.sub('[…]', path)})" if path else " (as a whole)"
