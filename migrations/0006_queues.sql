-- Why: what was said of queues while runners serve them: which are paused, and which have another pool.
--
-- Locks: none that matters, for the table is new. The previous release runs on with it, and pauses and resizes nothing.

-- A queue of which nothing was said has no row. Runners read it when they start, when they are told that something has
-- changed, and every second.
CREATE TABLE background_queues (
    name TEXT PRIMARY KEY,
    paused BOOLEAN NOT NULL DEFAULT false,
    pool INTEGER,                                   -- NULL: what each runner was started with
    changed_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    CONSTRAINT background_queues_pool CHECK (pool > 0)
);
