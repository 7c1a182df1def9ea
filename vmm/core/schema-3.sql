-- Version 3: what a guest had in memory may be saved when the host stops; it goes on from there once at most.
-- A release of version 2 does not look here: it starts such a machine cold. It changes host.boot, which shows.
CREATE TABLE saved (
    machine_id TEXT PRIMARY KEY REFERENCES machines (id) ON DELETE CASCADE,
    -- Only 'saved' may be resumed. 'resuming' is put down before the guest's processors run.
    phase      TEXT NOT NULL CHECK (phase IN ('saving', 'saved', 'resuming', 'resumed', 'lost')),
    -- host.boot as it was when the state was saved, carried on by each boot that knows this table.
    boot       TEXT NOT NULL,
    since      TEXT NOT NULL,
    -- What the file takes; 0 but for 'saved'.
    size       INTEGER NOT NULL DEFAULT 0,
    -- Hashes of the domain that this machine was, and of the state of its disks' files.
    domain     TEXT NOT NULL,
    disks      TEXT NOT NULL DEFAULT '',
    -- Why it was lost, and whether that is in the audit trail.
    reason     TEXT NOT NULL DEFAULT '',
    told       INTEGER NOT NULL DEFAULT 0
) STRICT;
