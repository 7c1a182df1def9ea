"""The first boot, which partitions, encrypts and configures, survives that the power goes at any point of it."""

from __future__ import annotations

import json
import time

from tests.harness.host import Host
from tests.harness.image import Files
from tests.harness.seed import Identity
from vmm.audit.verify import Chain

CUTS = (6, 10, 13, 16, 20, 25, 30)
"""Seconds from the start of the kernel: where the power goes, one position a boot, all on one machine."""

_TAIL = 1500


def test_the_host_comes_back_after_power_cuts_during_its_first_boot(
    fresh_disk: Files, seed: str, clients: dict[str, Identity]
) -> None:
    """After cuts at ever later points an undisturbed boot gives a whole host: gapless audit trail, recovery keys."""
    with Host(fresh_disk, smbios=[seed], faulty_disk=True) as host:
        for seconds in CUTS:
            host.serial.expect("EFI stub: UEFI Secure Boot is enabled", 15)
            time.sleep(seconds)
            host.power_cut()
            serial = (fresh_disk.directory / "serial.log").read_text(errors="replace")
            print(f"cut after {seconds} s, the serial console ended with: {serial[-_TAIL:]!r}")
            host.power_on()
        host.wait_api()
        admin = host.api(clients["admin"])
        checks = {check["name"]: check for check in admin.call("GET", "/v1/health")["checks"]}
        assert checks["audit"]["ok"], checks["audit"]
        keys = admin.call("POST", "/v1/recovery-keys/fetch")["keys"]
        assert set(keys) == {"data", "audit"}
        assert all(keys.values()), {name: bool(key) for name, key in keys.items()}
        chain = Chain(seq=1)
        after: int | None = 0
        while after is not None:
            page = admin.call("GET", f"/v1/audit?after={after}&limit=1000")
            for record in page["records"]:
                line = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
                chain.follow(line.encode() + b"\n")
            after = page["next"]
