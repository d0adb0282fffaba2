"""What the doctor finds of a database, in the test process."""

from __future__ import annotations

from typing import Any

from greenjobs import config
from greenjobs.doctor import Application, Finding, Limits, examine
from greenjobs.job import registered_jobs


def findings(
    *only: str, url: str | None = None, limits: Limits | None = None, jobs: bool = False, **settings: Any
) -> dict[str, Finding]:
    """Those of these checks and what they need, or of all; `jobs` says that the declared ones are the application's."""
    given = {"database_url": url or config.current().database_url, **settings}
    application = Application("app", registered_jobs()) if jobs else None
    found = examine(config.load(**given), application, only=only, limits=limits)
    return {finding.name: finding for finding in found}


def finding(name: str, **arguments: Any) -> Finding:
    """That of one check."""
    return findings(name, **arguments)[name]
