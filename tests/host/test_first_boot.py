"""The first boot, which partitions, encrypts and configures, survives that the power goes at any point of it."""

from __future__ import annotations

import json
import random
import time

import pytest

from tests.harness.host import Host
from tests.harness.image import Files
from tests.harness.seed import Identity
from vmm.audit.verify import Chain

FIRST_S, SPAN_S = 0.5, 3.5
"""The cuts fall into the ``SPAN_S`` seconds that begin ``FIRST_S`` seconds after the start of the kernel, on a machine
with KVM: one into each equal part of them, in order, as later steps are reached only when earlier ones are done."""

_TAIL = 1500


@pytest.mark.parametrize("cuts", [2, pytest.param(6, marks=pytest.mark.long)])
def test_the_host_comes_back_after_power_cuts_during_its_first_boot(
    fresh_disk: Files, seed: str, clients: dict[str, Identity], cuts: int
) -> None:
    """After cuts at ever later points an undisturbed boot gives a whole host: gapless audit trail, recovery keys."""
    with Host(fresh_disk, smbios=[seed], faulty_disk=True) as host:
        seed_of_moments = random.SystemRandom().randrange(1 << 32)
        print(f"moments of the cuts from seed {seed_of_moments}")
        moments = random.Random(seed_of_moments)  # noqa: S311 - no secret
        for number in range(cuts):
            seconds = host.acceleration.scale * (FIRST_S + SPAN_S / cuts * (number + moments.random()))
            host.serial.expect("EFI stub: UEFI Secure Boot is enabled", 15)
            time.sleep(seconds)
            host.power_cut()
            serial = (fresh_disk.directory / "serial.log").read_text(errors="replace")
            print(f"cut after {seconds:.2f} s, the serial console ended with: {serial[-_TAIL:]!r}")
            host.power_on()
        host.wait_ready(clients["admin"])
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
