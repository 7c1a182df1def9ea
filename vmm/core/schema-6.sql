-- Version 6: identities that were enrolled while the host runs; those of the configuration are not here.
-- A release of version 5 knows none of these: their certificates fail in its handshake.
CREATE TABLE identities (
    -- SHA-256 of the certificate, which is what a caller is known by.
    fingerprint TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    role        TEXT NOT NULL CHECK (role IN ('admin', 'auditor', 'operator', 'user')),
    certificate TEXT NOT NULL,
    enrolled    TEXT NOT NULL,
    enrolled_by TEXT NOT NULL
) STRICT;

-- Which machines an identity of the role user has. By id: a machine of the same name made later is another one.
CREATE TABLE scopes (
    fingerprint TEXT NOT NULL REFERENCES identities (fingerprint) ON DELETE CASCADE,
    machine_id  TEXT NOT NULL REFERENCES machines (id) ON DELETE CASCADE,
    PRIMARY KEY (fingerprint, machine_id)
) STRICT;
CREATE INDEX scopes_machine ON scopes (machine_id);
