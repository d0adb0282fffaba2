"""The limit of PostgreSQL: UPDATE a hundred jobs, DELETE them, one after the other on one connection, no job run."""

from __future__ import annotations

import psycopg2

from benchmarks.programs import protocol
from benchmarks.programs.tally import tally

_BATCH = 100

# With `after`, each claim begins behind the last job of the one before: what a held snapshot would make expensive, the
# dead index entries of all jobs claimed so far, is not read again.
_CLAIM = """
UPDATE bare_jobs
SET
    claimed_by = 7,
    last_retry = now()
WHERE id = ANY(ARRAY(
    SELECT id
    FROM bare_jobs
    WHERE queue = 'default'
        AND priority = 0
        AND claimed_by IS NULL
        AND id > %(after)s
    ORDER BY id
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
RETURNING id, job_type, data
"""

_DELETE = """
DELETE FROM bare_jobs
WHERE id = ANY(%(ids)s)
    AND claimed_by = 7
"""


def main() -> None:
    """Drain the table."""
    order = protocol.receive_order()
    tally.open(order["tally"], mark_every=order["mark_every"])
    connection = psycopg2.connect(order["database_url"])
    connection.autocommit = True
    cursor = connection.cursor()
    protocol.wait_for_go()
    tally.begin()
    after = 0
    while True:
        cursor.execute(_CLAIM, {"after": after, "limit": _BATCH})
        ids = [row[0] for row in cursor.fetchall()]
        if not ids:
            break
        after = max(ids)
        cursor.execute(_DELETE, {"ids": ids})
        tally.count(len(ids))
    report = tally.report()
    protocol.next_command()
    protocol.send_report(report)


if __name__ == "__main__":
    main()
