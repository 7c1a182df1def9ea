"""Where everything lies on the host; tests move it all under another root by HOLDFAST_ROOT."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(os.environ.get("HOLDFAST_ROOT", "/"))

RUN = ROOT / "run/holdfast"
AUDIT_SOCKET = RUN / "audit/audit.sock"
CORE_SOCKET = RUN / "core/core.sock"
PINS = RUN / "core/pins.json"
IMPORT_SOCKET = RUN / "import.sock"
FETCH_SOCKET = RUN / "fetch.sock"
ANCHOR_SOCKET = RUN / "anchor.sock"
UPDATE_SOCKET = RUN / "update/update.sock"
KERNEL_STATUS = RUN / "kernel/status.json"
GUARD_STATUS = RUN / "guard/status.json"
EXPORT_SETTINGS = RUN / "export.json"
EXPORT_STATUS = RUN / "export/status.json"
UPDATE_NOTICE = RUN / "update/notice.json"
APPLIED_CONFIG = RUN / "config.json"
CONFIG_ERROR = RUN / "config-error.json"

STATE = ROOT / "var/lib/holdfast"
STORED_CONFIG = STATE / "config/current.json"
CORE_STATE = STATE / "core"
API_STATE = STATE / "api"
RECOVERY_KEYS = STATE / "recovery"
UPDATE_STATE = STATE / "update"
ANCHOR_STATE = STATE / "anchor"
GUARD_STATE = STATE / "guard"
EXPORT_STATE = STATE / "export"
AUDIT_STORE = ROOT / "var/lib/holdfast-audit"
