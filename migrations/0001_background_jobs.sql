-- Why: the table of jobs, the register of runners, and the list of who waits for work.
--
-- A table `background_jobs` that the Rust crate made is adopted: every row stays, with its id. The crate's timestamps
-- have no time zone; they were written as CURRENT_TIMESTAMP of sessions in the database's time zone and are read back
-- the same way. Every column that is new has a default, so that the crate, plain SQL and triggers go on inserting
-- (job_type, data, priority).
--
-- Locks: on a new database none that matters. On an adopted table ACCESS EXCLUSIVE until the end, for one rewrite of
-- the table and its indexes: about a second for 100,000 waiting jobs. The crate's own runners work on after it.

CREATE TABLE IF NOT EXISTS background_jobs (
    id BIGSERIAL PRIMARY KEY,
    job_type TEXT NOT NULL,
    data JSONB NOT NULL,
    retries INTEGER NOT NULL DEFAULT 0,
    last_retry TIMESTAMPTZ NOT NULL DEFAULT '1970-01-01 00:00:00+00',
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    priority SMALLINT NOT NULL DEFAULT 0
);

-- The claim orders by (-priority), and the negation of the smallest of all smallints is not one.
UPDATE background_jobs
SET priority = -32767
WHERE priority = -32768;

ALTER TABLE background_jobs
    ALTER COLUMN last_retry DROP DEFAULT,
    ALTER COLUMN last_retry TYPE TIMESTAMPTZ,
    ALTER COLUMN last_retry SET DEFAULT '1970-01-01 00:00:00+00',
    ALTER COLUMN created_at DROP DEFAULT,
    ALTER COLUMN created_at TYPE TIMESTAMPTZ,
    ALTER COLUMN created_at SET DEFAULT now(),
    ADD COLUMN queue TEXT,                           -- NULL: where a runner has the job type registered
    ADD COLUMN state TEXT NOT NULL DEFAULT 'available',
    ADD COLUMN run_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    ADD COLUMN attempt INTEGER NOT NULL DEFAULT 0,   -- counts claims; with claimed_by it fences every change
    ADD COLUMN crashes SMALLINT NOT NULL DEFAULT 0,  -- counts deaths of the runner that held it
    ADD COLUMN claimed_by INTEGER,
    ADD COLUMN claimed_at TIMESTAMPTZ,
    ADD COLUMN unique_key TEXT,
    ADD COLUMN errors JSONB,                         -- an array, newest last
    ADD COLUMN options JSONB,                        -- what one call says otherwise than its job
    ADD COLUMN cancel_asked_at TIMESTAMPTZ,
    ADD COLUMN expires_at TIMESTAMPTZ,               -- what has not started by then is discarded
    ADD COLUMN exclusive_key TEXT,                   -- of all jobs with the same one, one runs at a time
    ADD COLUMN unique_until_finished BOOLEAN NOT NULL DEFAULT false,  -- else the unique key is free once it starts
    ADD COLUMN is_watched BOOLEAN NOT NULL DEFAULT false,             -- who ends it notifies
    ADD COLUMN progress JSONB,                       -- {"done": 3, "total": 10, "message": "…", "at": "…"}
    ADD COLUMN log JSONB,                            -- what it said of itself: an array, newest last
    ADD CONSTRAINT background_jobs_priority CHECK (priority > -32768),
    ADD CONSTRAINT background_jobs_state CHECK (state IN ('scheduled', 'available', 'running', 'failed')),
    ADD CONSTRAINT background_jobs_progress CHECK (jsonb_typeof(progress) = 'object'),
    ADD CONSTRAINT background_jobs_log CHECK (jsonb_typeof(log) = 'array'),
    ADD CONSTRAINT background_jobs_owner CHECK ((state = 'running') = (claimed_by IS NOT NULL));

-- Only jobs that may start now are in the index that the claim reads: two hundred thousand jobs for tomorrow cost it
-- nothing, and a claim that begins behind a known row skips the dead entries before it.
CREATE INDEX background_jobs_available
    ON background_jobs (queue, (-priority), id)
    WHERE state = 'available' AND crashes = 0 AND exclusive_key IS NULL;

-- Jobs whose runner died are claimed one at a time, so that the one that kills its runner convicts itself alone.
CREATE INDEX background_jobs_suspects
    ON background_jobs (queue, (-priority), id)
    WHERE state = 'available' AND crashes > 0;

CREATE INDEX background_jobs_scheduled
    ON background_jobs (run_at)
    WHERE state = 'scheduled';

CREATE INDEX background_jobs_running
    ON background_jobs (claimed_by)
    WHERE state = 'running';

CREATE INDEX background_jobs_failed
    ON background_jobs (last_retry)
    WHERE state = 'failed';

CREATE INDEX background_jobs_cancelled
    ON background_jobs (claimed_by)
    WHERE cancel_asked_at IS NOT NULL;

CREATE INDEX background_jobs_without_queue
    ON background_jobs (job_type)
    WHERE queue IS NULL;

-- Of jobs with the same exclusive key one runs at a time, whoever claims them. The others are claimed apart: in the order
-- of all jobs, or key by key, where the first of each is next in line, suspects included. Whoever asks for the one that
-- runs says `claimed_by IS NOT NULL`, which comes to the same as `state = 'running'`, and lets the planner use no other
-- index: while its statistics know of few running jobs it would rather read all of those.
CREATE UNIQUE INDEX background_jobs_exclusive_running
    ON background_jobs (exclusive_key)
    WHERE claimed_by IS NOT NULL AND exclusive_key IS NOT NULL;

CREATE INDEX background_jobs_exclusive
    ON background_jobs (queue, (-priority), id)
    WHERE state = 'available' AND crashes = 0 AND exclusive_key IS NOT NULL;

CREATE INDEX background_jobs_lines
    ON background_jobs (queue, exclusive_key, (-priority), id)
    WHERE state = 'available' AND exclusive_key IS NOT NULL;

-- One job of a key that has not started: the index forgets a row when its state becomes 'running'.
CREATE UNIQUE INDEX background_jobs_unique
    ON background_jobs (unique_key)
    WHERE unique_key IS NOT NULL AND state IN ('scheduled', 'available');

-- Of jobs that keep their key until they are finished, one in all. It goes on having the key from claim to retry, so that
-- none of these changes ever meets another of its kind here.
CREATE UNIQUE INDEX background_jobs_unique_until_finished
    ON background_jobs (unique_key)
    WHERE unique_until_finished AND unique_key IS NOT NULL AND state IN ('scheduled', 'available', 'running');

-- A runner is alive exactly while its session holds the advisory lock (this table's oid, its id); one that has a lease
-- instead, because a pooler allows no session, until that runs out.
CREATE TABLE background_runners (
    id SERIAL PRIMARY KEY,
    hostname TEXT NOT NULL,
    pid INTEGER NOT NULL,
    version TEXT NOT NULL,
    queues JSONB NOT NULL,      -- {"emails": {"pool": 20, "poll_interval": 1.0}, …}
    job_types TEXT[] NOT NULL,
    started_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    leased_until TIMESTAMPTZ,
    memory_bytes BIGINT,        -- of the process, looked at now and then
    ended_at TIMESTAMPTZ        -- when it left in good order, or was found dead
);

-- Workers with room and nothing to do. Unlogged: after a crash of the server every runner registers again anyway.
CREATE UNLOGGED TABLE background_waiting (
    queue TEXT NOT NULL,
    runner INTEGER NOT NULL,
    PRIMARY KEY (queue, runner)
);

-- A queue is all turnover: every job leaves two dead rows behind. The defaults wait for a fifth of the table, which is a
-- million dead rows when five million wait; here vacuum comes at ten thousand and a hundredth, and does not pause to spare
-- a disk that the claims would then read through dead rows. fillfactor stays as it is: a claim changes what is indexed, so
-- that the new row needs new index entries whether it fits beside the old one or not.
ALTER TABLE background_jobs SET (
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_analyze_threshold = 10000,
    autovacuum_analyze_scale_factor = 0.05,
    autovacuum_vacuum_cost_delay = 0
);
