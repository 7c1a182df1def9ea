"""Fetching and unpacking a release's parts: differences, interrupted downloads, and what is wrong with what comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zstandard

from tests.unit.test_update_machine import Machine, Unreliable
from tests.unit.test_update_rig import SECONDS, Repository, flip, plain
from vmm.errors import Unavailable, UserError
from vmm.update import staging as module
from vmm.update import trust
from vmm.update.base import erofs_size, verity_size
from vmm.update.clock import Moment
from vmm.update.errors import Cancelled, Refused
from vmm.update.job import Job
from vmm.update.staging import Brought, Origin, Staging, names
from vmm.update.types import Part
from vmm.update.unpack import unpack


class Setting:
    """A staging folder in front of a repository with 1.1.0 and its differences to 1.0.0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = Repository(folder / "repository")
        self.machine = Machine(folder / "machine")
        self.staging = Staging(folder / "staging")
        self.release = self.repository.add("1.1.0", base="1.0.0")
        self.source = Unreliable(self.repository.folder)

    def bring(self, job: Job | None = None) -> list[Brought]:
        self.repository.publish()
        moment = Moment(SECONDS, "clock")
        memory = self.folder / "memory"
        trusted = trust.refresh(self.source, self.repository.root_json, memory, moment)
        self.source.asked.clear()
        self.source.served = 0
        origin = Origin(self.source, trusted.targets, "1.0.0", self.machine.base)
        return self.staging.bring(self.release, origin, job or Job())

    def check(self) -> None:
        for part, content in plain("1.1.0").parts().items():
            assert self.staging.path(self.release, part).read_bytes() == content
        assert self.staging.staged() == self.release
        assert {p.name for p in self.staging.folder.iterdir()} == {*names(self.release).values(), "release.json"}


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)
    return Setting(tmp_path)


def bases(brought: list[Brought]) -> dict[str, str]:
    return {part.part: part.base for part in brought}


def test_differences_are_taken_where_they_help(setting: Setting) -> None:
    seen: list[tuple[int, int]] = []
    brought = setting.bring(Job(lambda done, total: seen.append((done, total))))
    assert bases(brought)["root"] == "1.0.0" and bases(brought)["signature"] == ""
    setting.check()
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0
    assert setting.source.served < 60_000 < len(plain("1.1.0").root)
    # What is here already is not fetched again.
    assert setting.bring() == [] and setting.source.served == 0
    setting.check()


def target(setting: Setting, name: str) -> Path:
    return setting.repository.stored(f"holdfast_1.1.0/{name}")


def damaged_base(setting: Setting) -> None:
    flip(setting.machine.folder / "p1", 100)


def no_base(setting: Setting) -> None:
    (setting.machine.folder / "p1").unlink()


def damaged_delta(setting: Setting) -> None:
    flip(target(setting, "root.from-1.0.0.zst"))


def missing_delta(setting: Setting) -> None:
    target(setting, "root.from-1.0.0.zst").unlink()


def withdrawn_delta(setting: Setting) -> None:
    del setting.repository.targets["holdfast_1.1.0/root.from-1.0.0.zst"]


def delta_of_something_else(setting: Setting) -> None:
    setting.repository.put("holdfast_1.1.0/root.from-1.0.0.zst", zstandard.compress(b"something else" * 100))


def delta_that_is_a_bomb(setting: Setting) -> None:
    setting.repository.put("holdfast_1.1.0/root.from-1.0.0.zst", zstandard.compress(bytes(50 << 20)))


@pytest.mark.parametrize(
    "spoil",
    [
        damaged_base,
        no_base,
        damaged_delta,
        missing_delta,
        withdrawn_delta,
        delta_of_something_else,
        delta_that_is_a_bomb,
    ],
)
def test_without_a_usable_difference_the_whole_part_comes(setting: Setting, spoil: Callable[[Setting], None]) -> None:
    spoil(setting)
    assert bases(setting.bring())["root"] == ""
    setting.check()


def changed(setting: Setting, part: str, **fields: object) -> None:
    """Have the release say something else of a part."""
    described: Part = msgspec.structs.replace(getattr(setting.release.parts, part), deltas={}, **fields)
    parts = msgspec.structs.replace(setting.release.parts, **{part: described})
    setting.release = msgspec.structs.replace(setting.release, parts=parts)


def whole_only(setting: Setting) -> None:
    setting.machine.running = "0.9.0"
    for path in [p for p in setting.repository.targets if ".from-" in p]:
        del setting.repository.targets[path]


@pytest.mark.parametrize("part", ["root", "verity", "signature", "uki"])
def test_a_bit_of_any_part(setting: Setting, part: str) -> None:
    whole_only(setting)
    path = target(setting, f"{part}.zst")
    kept = path.read_bytes()
    flip(path)
    with pytest.raises(Refused, match=f"TUF target: holdfast_1.1.0/{part}.zst is not the file that was signed"):
        setting.bring()
    assert setting.staging.staged() is None
    path.write_bytes(kept)
    setting.bring()
    setting.check()


def test_shorter_and_longer_parts(setting: Setting) -> None:
    whole_only(setting)
    path = target(setting, "root.zst")
    kept = path.read_bytes()
    path.write_bytes(kept[:-1])
    with pytest.raises(Refused, match="TUF target: .* has [0-9]+ bytes, not the"):
        setting.bring()
    path.write_bytes(kept + b"x")
    with pytest.raises(Refused, match="length"):
        setting.bring()


@pytest.mark.parametrize("change", [-1, +1])
def test_parts_that_unpack_to_another_size(setting: Setting, change: int) -> None:
    changed(setting, "root", size=setting.release.parts.root.size + change)
    with pytest.raises(Refused, match="unpacking: .*(to more than|bytes, not) the"):
        setting.bring()
    assert setting.staging.staged() is None


def test_parts_that_unpack_to_something_else(setting: Setting) -> None:
    changed(setting, "root", sha384="0" * 96)
    with pytest.raises(Refused, match="unpacking: .* something else than the release says"):
        setting.bring()


@pytest.mark.parametrize(
    "packed",
    [
        zstandard.compress(bytes(200 << 20)),
        b"no zstd at all",
        b"",
        zstandard.compress(b"x" * 1000)[:-3],
        zstandard.compress(b"x" * 1000) * 300,
    ],
    ids=["bomb", "nonsense", "empty", "truncated", "many"],
)
def test_bombs_and_nonsense_for_zstd(tmp_path: Path, packed: bytes) -> None:
    path, out = tmp_path / "x.part", tmp_path / "out"
    path.write_bytes(packed)
    with pytest.raises(Refused, match="unpacking"):
        unpack(path, out, 100_000, tick=lambda count: None)
    assert not out.exists() or out.stat().st_size == 100_000


def test_a_frame_that_asks_for_too_much_memory(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "x.part"
    path.write_bytes(compressor.compress(b"x" * 1000) + compressor.flush())
    with pytest.raises(Refused, match="unpacking"):
        unpack(path, tmp_path / "out", 1000, tick=lambda count: None)


def interrupt_at(setting: Setting, offset: int, *names: str) -> None:
    def hook(path: str, at: int) -> None:
        if path.endswith(names or ("root.zst",)) and at >= offset:
            raise Unavailable("the line is dead")

    setting.source.hook = hook


def test_an_interrupted_download_goes_on_where_it_was(setting: Setting) -> None:
    whole_only(setting)
    interrupt_at(setting, 100_000)
    with pytest.raises(Unavailable, match="the line is dead"):
        setting.bring()
    (partial,) = setting.staging.folder.glob("root.zst.*.part")
    assert partial.stat().st_size == 100_000
    setting.source.hook = lambda path, offset: None
    setting.bring()
    setting.check()
    assert [offset for path, offset in setting.source.asked if path.endswith("root.zst")] == [100_000]


def test_an_interrupted_difference_goes_on_where_it_was(setting: Setting) -> None:
    """The server goes away for differences and whole parts alike; what has come of the difference is kept."""
    difference = target(setting, "root.from-1.0.0.zst")
    half = difference.stat().st_size // 2
    setting.source.chunk = half
    interrupt_at(setting, half, "root.zst", "root.from-1.0.0.zst")
    with pytest.raises(Unavailable, match="the line is dead"):
        setting.bring()
    setting.source.hook = lambda path, offset: None
    assert bases(setting.bring())["root"] == "1.0.0"
    setting.check()
    assert [offset for path, offset in setting.source.asked if path.endswith(difference.name)] == [half]


def test_short_breaks_are_waited_out(setting: Setting) -> None:
    whole_only(setting)
    broken: list[int] = []

    def hook(path: str, at: int) -> None:
        if path.endswith("root.zst") and at >= 40_000 * (len(broken) + 1) and len(broken) < 4:
            broken.append(at)
            raise Unavailable("the line is dead")

    setting.source.hook = hook
    setting.bring()
    setting.check()
    assert len(broken) == 4


@pytest.mark.parametrize("spoil", ["flipped", "longer", "link"])
def test_a_partial_file_is_not_trusted(setting: Setting, spoil: str) -> None:
    whole_only(setting)
    interrupt_at(setting, 100_000)
    with pytest.raises(Unavailable):
        setting.bring()
    (partial,) = setting.staging.folder.glob("root.zst.*.part")
    if spoil == "flipped":
        flip(partial)
    elif spoil == "longer":
        partial.write_bytes(bytes(10 << 20))
    else:
        partial.unlink()
        partial.symlink_to("/etc/hostname")
    setting.source.hook = lambda path, offset: None
    setting.bring()
    setting.check()


def test_a_new_release_removes_what_is_left_of_another(setting: Setting) -> None:
    setting.bring()
    setting.release = setting.repository.add("1.2.0")
    interrupt_at(setting, 0)
    with pytest.raises(UserError):
        setting.bring()
    assert setting.staging.staged() is None
    assert not list(setting.staging.folder.glob("holdfast_1.1.0*"))


def test_cancelled_within_a_part(setting: Setting) -> None:
    whole_only(setting)
    job = Job()
    setting.source.hook = lambda path, offset: job.cancel() if offset >= 60_000 else None
    with pytest.raises(Cancelled):
        setting.bring(job)
    setting.source.hook = lambda path, offset: None
    setting.bring()
    setting.check()


def test_staging_is_for_the_updater_alone(setting: Setting) -> None:
    setting.staging.folder.mkdir(mode=0o755)
    with pytest.raises(Refused, match="only the updater can enter"):
        setting.bring()


def test_a_target_that_nobody_vouches_for(setting: Setting) -> None:
    del setting.repository.targets["holdfast_1.1.0/verity.zst"]
    with pytest.raises(Refused, match="TUF targets: the release needs holdfast_1.1.0/verity.zst"):
        setting.bring()


def test_sizes_from_superblocks(tmp_path: Path) -> None:
    erofs = bytearray(4096)
    erofs[1024:1028] = (0xE0F5E1E2).to_bytes(4, "little")
    erofs[1024 + 12] = 12
    erofs[1024 + 36 : 1024 + 40] = (39364).to_bytes(4, "little")
    path = tmp_path / "superblock"
    path.write_bytes(erofs)
    assert erofs_size(path) == 39364 * 4096
    for wrong in (b"", bytes(2000), bytes(erofs[:1100])):
        path.write_bytes(wrong)
        with pytest.raises(Refused, match="base"):
            erofs_size(path)
        with pytest.raises(Refused, match="base"):
            verity_size(path)


def test_staged_release_is_read_with_suspicion(setting: Setting) -> None:
    setting.bring()
    path = setting.staging.folder / "release.json"
    for content in (b"", b"[]", b"{}", b'{"version": 1}', b'{"version": "9.9.9"}', b"\xff"):
        path.write_bytes(content)
        assert setting.staging.staged() is None
