-- Why: schedules, which enqueue jobs by the clock.
--
-- Locks: none that matters, for the table is new. The previous release runs on with it, and enqueues no ticks.

CREATE TABLE background_schedules (
    name TEXT PRIMARY KEY,
    job_type TEXT NOT NULL,
    cron TEXT NOT NULL,
    timezone TEXT NOT NULL,
    data JSONB NOT NULL DEFAULT '{}',
    queue TEXT,                         -- NULL: that of the job
    priority SMALLINT,                  -- NULL: that of the job
    catch_up TEXT NOT NULL DEFAULT 'last',
    overlap BOOLEAN NOT NULL DEFAULT true,
    source TEXT NOT NULL,               -- 'code' and 'settings' belong to the runners that declare them
    declared_by INTEGER,                -- the runner that did so last
    paused BOOLEAN NOT NULL DEFAULT false,
    next_tick_at TIMESTAMPTZ NOT NULL,  -- the first tick that nobody has looked at; who moves it enqueues the job
    last_tick_at TIMESTAMPTZ,           -- the last tick that a job was enqueued for
    last_job_id BIGINT,                 -- that job
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    CONSTRAINT background_schedules_catch_up CHECK (catch_up IN ('none', 'last', 'all')),
    CONSTRAINT background_schedules_source CHECK (source IN ('code', 'settings', 'api')),
    CONSTRAINT background_schedules_owner CHECK ((source = 'api') = (declared_by IS NULL)),
    CONSTRAINT background_schedules_data CHECK (jsonb_typeof(data) = 'object'),
    CONSTRAINT background_schedules_priority CHECK (priority > -32768)
);

CREATE INDEX background_schedules_due
    ON background_schedules (next_tick_at)
    WHERE NOT paused;
