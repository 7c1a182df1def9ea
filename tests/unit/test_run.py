"""What `make run` reads off the host's serial console fits what the host writes there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.harness.seed import configuration, make_identity
from tests.harness.workstation import FINGERPRINT
from vmm.cli.client import normal_fingerprint
from vmm.config import load
from vmm.console.__main__ import drawing
from vmm.console.facts import Facts
from vmm.console.screen import compose


def test_the_fingerprint_is_found_on_the_status_screen(tmp_path: Path) -> None:
    document = configuration([make_identity(tmp_path, "admin")])
    facts = Facts(
        version="1.2.3",
        slot="a",
        configuration=load.decode(json.dumps(document).encode()),
        failure=None,
        addresses=("10.0.2.15",),
        fingerprint="0123456789abcdef" * 4,
        health=None,
    )
    match = re.search(FINGERPRINT, drawing(compose(facts), clears=False).decode())
    assert match
    assert normal_fingerprint(match[1] + match[2]) == facts.fingerprint
