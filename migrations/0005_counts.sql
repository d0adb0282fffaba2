-- Why: how many jobs of each type ended how, by minute and queue, when their own rows are long gone.
--
-- Every runner adds what it counted to the rows of the minute. It may have to write the same once more when a
-- connection broke before the answer; `counted` is the number of its last writing, by which that is told.
--
-- Locks: ACCESS EXCLUSIVE on the register of runners, for a moment: a column with a constant default rewrites nothing.
-- The previous release runs on with it, and counts nothing.

CREATE TABLE background_counts (
    minute TIMESTAMPTZ NOT NULL,        -- its beginning
    queue TEXT NOT NULL,
    job_type TEXT NOT NULL,
    done BIGINT NOT NULL DEFAULT 0,
    retried BIGINT NOT NULL DEFAULT 0,
    failed BIGINT NOT NULL DEFAULT 0,   -- for good
    discarded BIGINT NOT NULL DEFAULT 0,
    cancelled BIGINT NOT NULL DEFAULT 0,
    snoozed BIGINT NOT NULL DEFAULT 0,
    run_seconds DOUBLE PRECISION NOT NULL DEFAULT 0,     -- of all those attempts together
    waited_seconds DOUBLE PRECISION NOT NULL DEFAULT 0,  -- from when they were due until they were claimed
    PRIMARY KEY (minute, queue, job_type)
);

ALTER TABLE background_runners
    ADD COLUMN counted INTEGER NOT NULL DEFAULT 0;
