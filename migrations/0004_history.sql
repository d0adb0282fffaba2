-- Why: finished jobs that their job asks to keep, with how they ended, how long they took, and what they returned.
--
-- Locks: none that matters, for the table is new. The previous release runs on with it, and keeps nothing.

CREATE TABLE background_history (
    id BIGINT PRIMARY KEY,          -- that of the row of background_jobs, which was deleted in the same statement
    job_type TEXT NOT NULL,
    queue TEXT,
    data JSONB NOT NULL,
    priority SMALLINT NOT NULL,
    attempt INTEGER NOT NULL,       -- counts claims
    retries INTEGER NOT NULL,
    crashes SMALLINT NOT NULL,
    outcome TEXT NOT NULL,
    result JSONB,                   -- what it returned; NULL: not kept, which JSON's own null is not
    errors JSONB,                   -- an array, newest last
    progress JSONB,
    log JSONB,
    created_at TIMESTAMPTZ NOT NULL,
    started_at TIMESTAMPTZ,         -- of the last attempt; NULL: it was ended while it waited
    ended_at TIMESTAMPTZ NOT NULL,
    run_seconds FLOAT8,             -- of the last attempt
    waited_seconds FLOAT8,          -- before the last attempt, since it was due
    runner TEXT,                    -- host:pid
    keep_until TIMESTAMPTZ NOT NULL,
    CONSTRAINT background_history_outcome CHECK (outcome IN ('done', 'discarded', 'cancelled', 'expired'))
);

CREATE INDEX background_history_keep_until
    ON background_history (keep_until);

-- As many rows are deleted as are inserted: vacuum comes as early as it does to background_jobs.
ALTER TABLE background_history SET (
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_scale_factor = 0.02
);
