-- Version 5: what the guard, or an administrator, did to whom; and what was changed of the guard's rules.
-- A release of version 4 does not look here: it lets what is held or locked out go on.
CREATE TABLE holds (
    machine_id TEXT PRIMARY KEY REFERENCES machines (id) ON DELETE CASCADE,
    held_since TEXT NOT NULL,
    held_by    TEXT NOT NULL,
    held_why   TEXT NOT NULL
) STRICT;

-- Who may not log in; times in seconds since 1970.
CREATE TABLE locks (
    kind  TEXT NOT NULL CHECK (kind IN ('source', 'certificate')),
    value TEXT NOT NULL,
    since REAL NOT NULL,
    until REAL NOT NULL,
    by    TEXT NOT NULL,
    why   TEXT NOT NULL,
    PRIMARY KEY (kind, value)
) STRICT;

CREATE TABLE guard_rules (
    name     TEXT PRIMARY KEY,
    settings TEXT NOT NULL CHECK (json_valid(settings))
) STRICT;
