-- Version 4: machines that start with the host, that are changed while they run, and that crash.
-- A release of version 3 starts what is to be started, in the order of names, and takes a machine that was changed while
-- it runs for an unknown domain.
-- Whether 'resume' is because the machine starts with the host, not because it ran when the host stopped.
ALTER TABLE machines ADD COLUMN autostarting INTEGER NOT NULL DEFAULT 0;
-- The hardware that it was started with last; as in spec where it is NULL.
ALTER TABLE machines ADD COLUMN started TEXT CHECK (started IS NULL OR json_valid(started));

-- The crashes that count against starting a machine again by itself; when, in seconds since 1970.
CREATE TABLE crashes (
    machine_id TEXT NOT NULL REFERENCES machines (id) ON DELETE CASCADE,
    time       REAL NOT NULL
) STRICT;
