"""From staging to a system that starts: checked, written, read back, and only then made known to the boot loader.

    check    staged parts once more; what the UKI says; whether the firmware would start it; whether all fits
    write    the boot entry of the version that is overwritten goes first, then systemd-sysupdate fills the slot
    verify   caches dropped; every block against the root hash in the new UKI; the signature partition by its hash
    finish   systemd-sysupdate puts the UKI on the ESP with three tries; it is read back too

A kill at any point leaves the running system as it was, and the next run begins again at the top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmm.errors import UserError
from vmm.update import files, pe, slots
from vmm.update.choice import parts
from vmm.update.errors import Refused
from vmm.update.job import Job
from vmm.update.staging import Staging
from vmm.update.system import System
from vmm.update.types import Phase, Release

READ_BACK = "read-back"
_ESP_RESERVE = 1 << 20


@dataclass(frozen=True)
class Installed:
    """What an audit record says of a written system."""

    slot: str
    signer: str
    uki: Path


def check_room(release: Release, system: System, running: str) -> None:
    """Whether slot and ESP hold the release. Raises: NoRoom with figures; Refused; OSError."""
    places = slots.inactive(system.table(), running)
    for name, part in parts(release):
        if name in places:
            files.need(f"the partition {name} of the other slot", part.size, places[name].size)
    own = [entry for entry in system.entries() if entry.uki is not None and entry.uki.root_hash == running]
    others = [entry for entry in system.entries() if entry not in own]
    room = system.esp_free() + sum(entry.path.stat().st_size for entry in others)
    files.need("the EFI system partition", release.parts.uki.size + _ESP_RESERVE, room)


def check_uki(path: Path, release: Release) -> pe.Uki:
    """Whether a UKI starts the system that the release describes. Raises: Refused; OSError."""
    uki = pe.describe(path)
    for what, says, expected in (
        ("root hash", uki.root_hash, release.root_hash),
        ("version", uki.version, release.version),
        ("epoch", str(uki.epoch), str(release.epoch)),
    ):
        if says != expected:
            raise Refused("UKI", f"it says {what} {says or 'nothing'}, the release says {expected}")
    return uki


def install(
    release: Release,
    staging: Staging,
    system: System,
    running: str,
    job: Job,
    enter: Callable[[Phase], None],
    ready: Callable[[Path], None],
    commit: Callable[[bool], None],
) -> Installed:
    """Run the whole sequence.

    Arguments: ``running`` is the running system's root hash; ``enter`` is told of each phase; ``ready`` may refuse the
    staged UKI for reasons of its own, before anything is written; ``commit`` is called with True just before the boot
    loader is told of the version, and with False when that did not work.
    Raises: Refused; NoRoom; Cancelled; CommandFailed; OSError. The other slot is emptied when it was found wrong.
    """
    check_room(release, system, running)
    staging.verify(release, job)
    staged = staging.path(release, "uki")
    uki = check_uki(staged, release)
    vouched = system.check_signer(staged)
    ready(staged)
    job.check()
    enter("writing")
    # A boot entry must never lead to a slot that is being overwritten.
    system.clear("uki")
    system.write("slot", release.version)
    job.check()
    enter("verifying")
    try:
        place = _read_back(release, uki, system, job)
        job.check()
    except UserError:
        # Under its name systemd-sysupdate would take it for done, now and in every later run.
        system.clear("slot")
        raise
    enter("finishing")
    commit(True)
    try:
        system.write("uki", release.version)
        final = _check_entry(release, system)
    except BaseException:
        system.clear("uki")
        commit(False)
        raise
    return Installed(place, vouched, final)


def _read_back(release: Release, uki: pe.Uki, system: System, job: Job) -> str:
    """Compare the slot with the UKI that will start it. Returns: the slot's name. Raises: Refused; Cancelled."""
    table = system.table()
    written = slots.find(table, release.version)
    if written is None:
        raise Refused(READ_BACK, f"the disk does not hold the three partitions of {release.version}")
    if not slots.belongs(written, uki.root_hash):
        raise Refused(READ_BACK, "the partitions' UUIDs are not the halves of the UKI's root hash")
    data, tree, signature = (system.device(p) for p in (written.root, written.verity, written.signature))
    system.drop_caches((data, tree, signature))
    expected = release.parts.signature
    if files.sha384(signature, size=expected.size) != expected.sha384:
        raise Refused(READ_BACK, "the signature partition is not what was written to it")
    job.check()
    system.verify(data, tree, uki.root_hash)
    roots = sorted(p.number for p in table.partitions if p.type == slots.ROOT_TYPE)
    return "ab"[roots.index(written.root.number)] if len(roots) == 2 else ""


def _check_entry(release: Release, system: System) -> Path:
    found = [entry for entry in system.entries() if entry.version == release.version]
    if len(found) != 1 or found[0].bad or found[0].blessed:
        raise Refused(READ_BACK, f"the ESP does not hold one UKI of {release.version} with tries")
    system.drop_caches((found[0].path,))
    if files.sha384(found[0].path) != release.parts.uki.sha384:
        raise Refused(READ_BACK, "the UKI on the ESP is not what was written to it")
    return found[0].path
