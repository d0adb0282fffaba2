"""What running jobs say of themselves, on their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from greenjobs.statement import Statement
from greenjobs.storage.fence import int_array

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


# Lines of this claim that are there already are replaced, so that writing the same once more changes nothing; those of
# former claims stay, as far as there is room. An attempt that was interrupted has the number of the next one, so it is
# the claim that tells them apart.
_REPORT = """
WITH held AS (
    SELECT job.id, report.progress, report.lines, report.kept
    FROM jsonb_to_recordset(%(reports)s)
        AS report (id bigint, attempt int, progress jsonb, lines jsonb, kept int)
    JOIN background_jobs AS job ON job.id = report.id
    WHERE job.attempt = report.attempt
        AND job.claimed_by = ANY(%(runners)s)
    FOR UPDATE OF job {busy}
)
UPDATE background_jobs AS job
SET
    progress = coalesce(held.progress, job.progress),
    log = CASE
        WHEN held.lines IS NULL THEN job.log
        ELSE (
            SELECT jsonb_agg(kept.line ORDER BY kept.place)
            FROM (
                SELECT line, place
                FROM jsonb_array_elements(coalesce(job.log, '[]') || held.lines)
                    WITH ORDINALITY AS every (line, place)
                WHERE place > jsonb_array_length(coalesce(job.log, '[]'))
                    OR line ->> 'claim' IS DISTINCT FROM job.attempt::text
                ORDER BY place DESC
                LIMIT held.kept
            ) AS kept
        )
    END
FROM held
WHERE job.id = held.id
RETURNING job.id
"""

_TYPES = {"reports": "jsonb", "runners": "int[]"}

_REPORT_IF_FREE = Statement("report_if_free", _REPORT.format(busy="SKIP LOCKED"), **_TYPES)
_REPORT_LAST = Statement("report_last", _REPORT.format(busy=""), **_TYPES)


def report(
    connection: Connection, runners: Sequence[int], reports: Sequence[Mapping[str, Any]], *, skip_locked: bool
) -> set[int]:
    """Write progress and log lines of jobs that a process holds under these ids; returns the ids of those written.

    A report has `id` and `attempt`, as a fence, and `progress`, an object, or `lines`, all of that claim, and of how
    many lines at most are `kept`. With `skip_locked`, a row that somebody else changes just now is left out.
    """
    documents = sorted(reports, key=lambda report: report["id"])  # one order of locks for all who take several
    parameters = {"reports": orjson.dumps(documents).decode(), "runners": int_array(runners)}
    with connection.cursor() as cursor:
        (_REPORT_IF_FREE if skip_locked else _REPORT_LAST).run(cursor, parameters)
        return {row[0] for row in cursor.fetchall()}


_LAST_PROGRESS = """
SELECT progress
FROM background_jobs
WHERE id = %(id)s
"""


def last_progress(connection: Connection, id: int) -> Any:
    """What the row says of how far the job is; None when it says nothing, or is gone."""
    with connection.cursor() as cursor:
        cursor.execute(_LAST_PROGRESS, {"id": id})
        row = cursor.fetchone()
        return None if row is None else row[0]
