-- What core knows for good. Version 1; the version stands in PRAGMA user_version, changes in files of their own.
CREATE TABLE volumes (
    id      TEXT PRIMARY KEY,
    name    TEXT NOT NULL UNIQUE COLLATE NOCASE,
    size    INTEGER NOT NULL CHECK (size > 0),
    -- 'creating' and 'deleting' rows are undone at the next start after a crash.
    state   TEXT NOT NULL CHECK (state IN ('creating', 'ready', 'deleting')),
    created TEXT NOT NULL
) STRICT;

CREATE TABLE machines (
    id      TEXT PRIMARY KEY,
    name    TEXT NOT NULL UNIQUE COLLATE NOCASE,
    spec    TEXT NOT NULL CHECK (json_valid(spec)),
    uid     INTEGER NOT NULL UNIQUE CHECK (uid BETWEEN 70000 AND 79999),
    created TEXT NOT NULL
) STRICT;

-- A volume belongs to one machine only.
CREATE TABLE disks (
    machine_id TEXT NOT NULL REFERENCES machines (id) ON DELETE CASCADE,
    position   INTEGER NOT NULL,
    volume_id  TEXT NOT NULL UNIQUE REFERENCES volumes (id) ON DELETE RESTRICT,
    PRIMARY KEY (machine_id, position)
) STRICT;

-- Where the search for the next machine's uid begins; one row.
CREATE TABLE uid_ring (
    next INTEGER NOT NULL CHECK (next BETWEEN 70000 AND 79999)
) STRICT;
INSERT INTO uid_ring (next) VALUES (70000);
