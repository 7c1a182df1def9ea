"""The epoch floor: it rises and never falls, in a real TPM (emulated) and in a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_update_rig import tools
from vmm.process import run, spawn
from vmm.update.errors import Refused
from vmm.update.floor import INDEX, Both, FileFloor, TpmFloor, open_floor

needs_tpm = pytest.mark.skipif(not tools("swtpm", "tpm2_nvread"), reason="needs the tools tree")


@pytest.fixture
def tcti(tmp_path: Path) -> Iterator[str]:
    """A TPM that was never used."""
    state, socket = tmp_path / "tpm", tmp_path / "socket"
    state.mkdir()
    process = spawn(
        [
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--flags", "not-need-init,startup-clear"),
            *("--server", f"type=unixio,path={socket}", "--ctrl", f"type=unixio,path={socket}.ctrl"),
        ],
        output=-3,
    )
    try:
        limit = time.monotonic() + 10
        while not (socket.exists() and Path(f"{socket}.ctrl").exists()):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        yield f"swtpm:path={socket}"
    finally:
        process.kill()
        process.wait()


@needs_tpm
def test_in_a_tpm(tcti: str) -> None:
    floor = TpmFloor(tcti)
    assert floor.read() == 0
    for epoch, expected in ((1, 1), (1, 1), (3, 3), (2, 3), (0, 3), (64, 64), (1000, 64)):
        floor.raise_to(epoch)
        assert floor.read() == expected == TpmFloor(tcti).read()
    # Not even somebody who owns the TPM can take bits away without deleting the index as a whole.
    environment = {"TPM2TOOLS_TCTI": tcti}
    zeros = Path(tcti.removeprefix("swtpm:path=")).with_name("zeros")
    zeros.write_bytes(bytes(8))
    written = run(["tpm2_nvwrite", "-C", "o", "-i", zeros, INDEX], env=environment, check=False)
    assert written.returncode != 0 and floor.read() == 64


@needs_tpm
def test_both_remember_for_each_other(tcti: str, tmp_path: Path) -> None:
    file, tpm = FileFloor(tmp_path / "floor"), TpmFloor(tcti)
    both = Both(tpm, file)
    both.raise_to(4)
    (tmp_path / "floor").unlink()
    assert both.read() == 4 and both.source == "tpm"
    both.raise_to(5)
    run(["tpm2_nvundefine", "-C", "o", INDEX], env={"TPM2TOOLS_TCTI": tcti})
    assert both.read() == 5
    both.raise_to(5)
    assert tpm.read() == 5


def test_a_tpm_that_does_not_answer_is_no_floor_of_zero(tmp_path: Path) -> None:
    floor = TpmFloor(f"swtpm:path={tmp_path}/none")
    with pytest.raises((Refused, Exception), match="TPM does not answer|not installed"):
        floor.read()


def test_in_a_file(tmp_path: Path) -> None:
    floor = open_floor(tmp_path, tmp_path / "no-tpm")
    assert (floor.read(), floor.source) == (0, "file")
    floor.raise_to(3)
    floor.raise_to(2)
    assert open_floor(tmp_path, tmp_path / "no-tpm").read() == 3
    for content in (b"", b"x", b"-1", b"1" * 40):
        (tmp_path / "floor").write_bytes(content)
        if content.isdigit():
            continue
        with pytest.raises(Refused, match="epoch floor: .*holds no number"):
            floor.read()
