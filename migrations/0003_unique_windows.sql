-- Why: unique keys that are taken for a time, whatever becomes of the job: @job(unique=True, until=3600).
--
-- Locks: none that matters, for the table is new. The previous release runs on with it, and opens no windows; a job that
-- it cancels or discards leaves its window open until the end.

CREATE TABLE background_unique_windows (
    unique_key TEXT PRIMARY KEY,
    job_id BIGINT NOT NULL,        -- the job that opened it, which may be long done
    ends_at TIMESTAMPTZ NOT NULL
);

-- To end the window of a job that is cancelled or discarded.
CREATE INDEX background_unique_windows_job
    ON background_unique_windows (job_id);

-- To delete those that are over.
CREATE INDEX background_unique_windows_end
    ON background_unique_windows (ends_at);
