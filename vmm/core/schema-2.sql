-- Version 2: guests that ran when the host stopped, with or without warning, are started again.
-- 'on' is a machine that runs as far as is known, 'resume' one that is to be started because the host stopped under it.
ALTER TABLE machines ADD COLUMN power TEXT NOT NULL DEFAULT 'off' CHECK (power IN ('off', 'on', 'resume'));
-- How often it was tried; counted before each try, so that a guest whose start ends the host is not tried for ever.
ALTER TABLE machines ADD COLUMN tries INTEGER NOT NULL DEFAULT 0;

-- One row.
CREATE TABLE host (
    -- The kernel's id of the boot in which core last began; another one means that the host stopped in between.
    boot   TEXT NOT NULL,
    -- The oldest version that can still use this file, for a host may fall back to an older release. A later version
    -- that only adds what has a default leaves it alone.
    oldest INTEGER NOT NULL
) STRICT;
INSERT INTO host (boot, oldest) VALUES ('', 2);
