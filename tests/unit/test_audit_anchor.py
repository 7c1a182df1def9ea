"""The anchors and their proofs: in a real TPM (emulated), in files, and over the service's socket."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_update_floor import needs_tpm, tcti
from vmm import wire
from vmm.audit import proof
from vmm.audit.anchor import INDEX, Anchor, Service, SoftwareAnchor, TpmAnchor, open_anchor
from vmm.audit.anchoring import AnchorClient
from vmm.audit.checkpoint import Checkpoint, Proof, Statement
from vmm.errors import NotFound, Unavailable, UserError
from vmm.process import run

__all__ = ["tcti"]

STATEMENT = Statement(7, "a" * 96, 1)


class Managed(TpmAnchor):
    """The kernel's resource manager forgets what a program had loaded; the emulated TPM has none."""

    def __init__(self, tcti: str) -> None:
        super().__init__(tcti)
        self._tools = {"TPM2TOOLS_TCTI": tcti}

    def certify(self, digest: str, past: int) -> Proof:
        made = super().certify(digest, past)
        run(["tpm2_flushcontext", "-t"], env=self._tools)
        return made


def anchored(anchor: Anchor, past: int = 0) -> Checkpoint:
    made = anchor.certify(STATEMENT.digest(), past)
    return Checkpoint(STATEMENT.covers, STATEMENT.head, STATEMENT.segment, made)


def counts(anchor: Anchor) -> None:
    """No number is left out and none comes twice, whatever the daemon does not get to."""
    first = anchored(anchor)
    proof.check(first)
    number = first.proof.counter
    # Never stored: the number is free still.
    assert anchored(anchor).proof.counter == number
    # Stored, and the daemon killed before or after it had the counter advanced.
    assert anchored(anchor, number).proof.counter == number + 1
    anchor.advance(number + 1)
    anchor.advance(number + 1)
    last = anchored(anchor, number + 1)
    assert last.proof.counter == number + 2 and last.proof.key == first.proof.key
    proof.check(last)


def forgeries(good: Checkpoint) -> list[Checkpoint]:
    """What differs from a good checkpoint in one thing."""
    replace = msgspec.structs.replace
    signature = bytearray(base64.b64decode(good.proof.signature))
    signature[-1] ^= 1
    proofs = [
        replace(good.proof, counter=good.proof.counter + 1),
        replace(good.proof, signature=base64.b64encode(signature).decode()),
        replace(good.proof, signature="!"),
        replace(good.proof, key=base64.b64encode(b"no key").decode()),
        replace(good.proof, anchor="tpm" if good.proof.anchor == "software" else "software"),
    ]
    return [
        replace(good, covers=good.covers + 1),
        replace(good, head="b" * 96),
        replace(good, segment=2),
        *(replace(good, proof=forged) for forged in proofs),
    ]


@needs_tpm
@pytest.mark.sfr("FAU_STG.1")
def test_in_a_tpm(tcti: str) -> None:
    anchor = Managed(tcti)
    counts(anchor)
    good = anchored(anchor)
    proof.check(good)
    for forged in forgeries(good):
        with pytest.raises(ValueError, match="its "):
            proof.check(forged)
    # Who makes the index anew does not get old numbers.
    tools = {"TPM2TOOLS_TCTI": tcti}
    run(["tpm2_nvundefine", "-C", "o", hex(INDEX)], env=tools)
    assert anchored(Managed(tcti)).proof.counter > good.proof.counter
    # An index of another kind, which could be set to any number, is no counter.
    run(["tpm2_nvundefine", "-C", "o", hex(INDEX)], env=tools)
    run(["tpm2_nvdefine", "-C", "o", "-s", "8", "-a", "ownerread|ownerwrite|authread|no_da", hex(INDEX)], env=tools)
    number = Path(tcti.removeprefix("swtpm:path=")).with_name("number")
    number.write_bytes((5).to_bytes(8))
    run(["tpm2_nvwrite", "-C", "o", "-i", number, hex(INDEX)], env=tools)
    with pytest.raises(ValueError, match="another index"):
        proof.check(anchored(Managed(tcti)))


@pytest.mark.sfr("FAU_STG.1")
def test_in_files(tmp_path: Path) -> None:
    anchor = open_anchor(tmp_path, tmp_path / "no-tpm")
    counts(anchor)
    good = anchored(open_anchor(tmp_path, tmp_path / "no-tpm"))
    proof.check(good)
    assert good.proof.anchor == "software" and (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    for forged in forgeries(good):
        with pytest.raises(ValueError, match="its "):
            proof.check(forged)
    for name in ("counter", "key"):
        (tmp_path / name).write_text("x")
        with pytest.raises(Unavailable, match="software anchor"):
            anchor.certify(STATEMENT.digest(), 0)
        (tmp_path / name).unlink()


def test_a_tpm_that_does_not_answer_anchors_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="TPM does not answer|not installed"):
        TpmAnchor(f"swtpm:path={tmp_path}/none").certify(STATEMENT.digest(), 0)
    (tmp_path / "tpm").touch()
    assert isinstance(open_anchor(tmp_path, tmp_path / "tpm"), TpmAnchor)


def test_the_service_takes_a_hash_and_nothing_else(tmp_path: Path) -> None:
    async def ask() -> None:
        server = await wire.serve(tmp_path / "s", Service(SoftwareAnchor(tmp_path)).handle)
        client = AnchorClient(tmp_path / "s")
        made = await client.certify(STATEMENT.digest(), 0)
        await client.advance(made.counter)
        assert (await client.certify(STATEMENT.digest(), made.counter)).counter == made.counter + 1
        for method, params in (
            ("certify", {"digest": "a" * 63, "past": 0}),
            ("certify", {"digest": "--help".ljust(64, "x"), "past": 0}),
            ("certify", {"digest": "a" * 64, "past": -1}),
            ("certify", {"digest": "a" * 64, "past": 0, "index": 1}),
            ("advance", {}),
        ):
            with pytest.raises(UserError, match="anchor: "):
                await wire.call(tmp_path / "s", method, params)
        with pytest.raises(NotFound):
            await wire.call(tmp_path / "s", "sign")
        server.close()
        with pytest.raises(Unavailable):
            await AnchorClient(tmp_path / "nobody").advance(1)

    asyncio.run(ask())
