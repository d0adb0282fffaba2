"""The examination: every check in order, each with a deadline, none of which keeps the others from being made."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence

import gevent
import psycopg2

from greenjobs.config import Settings
from greenjobs.doctor import process, server, upkeep, waiting
from greenjobs.doctor.case import Application, Case, Check
from greenjobs.doctor.finding import Finding, Limits, Verdict, fail, skipped
from greenjobs.errors import GreenjobsError, OptionError

AREAS: dict[str, tuple[Check, ...]] = {
    "process": process.CHECKS,
    "database": (*server.CHECKS, *upkeep.CHECKS),
    "jobs": waiting.CHECKS,
}
"""All checks by what they look at, in the order in which they are made."""


def examine(
    settings: Settings,
    application: Application | None = None,
    *,
    only: Collection[str] = (),
    limits: Limits | None = None,
) -> Iterator[Finding]:
    """Make every check, or those of these names and what they need; what one found comes as soon as it is known.

    Raises OptionError for a name that no check has, and nothing for what is broken.
    """
    chosen = _with_needs(only)
    case = Case(settings, application or Application(), limits or Limits())
    return _examine(case, [(area, check) for area, checks in AREAS.items() for check in checks if check.name in chosen])


def at_start(settings: Settings, application: Application) -> list[Finding]:
    """What the checks found that take no time to speak of, where it is not well."""
    case = Case(settings, application, Limits())
    found = [(check, _look(check, case)) for check in process.CHECKS if check.name in process.AT_START]
    return [
        Finding(check.name, "process", verdict.level, verdict.message, verdict.remedy)
        for check, verdict in found
        if verdict.level in ("warn", "fail")
    ]


def _with_needs(only: Collection[str]) -> set[str]:
    checks = {check.name: check for area in AREAS.values() for check in area}
    if not only:
        return set(checks)
    chosen, left = set[str](), list(only)
    while left:
        name = left.pop()
        if name not in checks:
            raise OptionError(f"there is no check {name!r}; the names are {', '.join(checks)}")
        chosen.add(name)
        left += checks[name].needs
    return chosen


def _examine(case: Case, checks: Sequence[tuple[str, Check]]) -> Iterator[Finding]:
    ends_at = time.monotonic() + case.limits.total_seconds
    blamed: dict[str, str] = {}  # of checks that do not hold, the one where it all began
    try:
        for area, check in checks:
            cause = next((blamed[need] for need in check.needs if need in blamed), None)
            if cause is not None:
                verdict = skipped(f"see {cause!r}")
            elif case.is_cut_off:
                verdict = skipped("the database does not answer any more")
            elif time.monotonic() > ends_at:
                verdict = skipped(f"the examination has taken {case.limits.total_seconds:g} s already")
            else:
                verdict = _look(check, case)
            if verdict.level in ("fail", "skipped"):
                blamed[check.name] = cause or check.name
            yield Finding(check.name, area, verdict.level, verdict.message, verdict.remedy)
    finally:
        case.close()


def _look(check: Check, case: Case) -> Verdict:
    deadline = gevent.Timeout.start_new(check.seconds)
    try:
        return check.look(case)
    except gevent.Timeout as raised:
        if raised is not deadline:
            raise
        return fail(
            f"did not end within {check.seconds:g} s", "look at the load of the machine, the network and the server"
        )
    except GreenjobsError as error:
        return fail(str(error))
    except psycopg2.Error as error:
        return fail(f"the database says: {str(error).strip() or type(error).__name__}")
    except Exception as error:
        return fail(f"could not be looked at: {type(error).__name__}: {error}", "please report this, it is a defect")
    finally:
        deadline.close()
