"""The rig's other half: a machine made of files, a host with its updater, and what goes wrong with them."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from mmap import mmap
from pathlib import Path
from typing import Any

import msgspec

from tests.unit.test_update_rig import MIB, SECONDS, Repository, plain
from vmm.audit.client import Actor, Entry
from vmm.audit.events import EVENTS
from vmm.audit.throttle import Throttle
from vmm.config import gpt
from vmm.config.devices import Device
from vmm.update import base, esp, slots
from vmm.update.addition import Addition
from vmm.update.environment import Environment, How
from vmm.update.errors import Refused
from vmm.update.esp import BootEntry
from vmm.update.floor import FileFloor
from vmm.update.host import Running
from vmm.update.job import Job
from vmm.update.records import Caller, Recorder
from vmm.update.source import DirectorySource
from vmm.update.state import Store
from vmm.update.system import Definitions
from vmm.update.trusted import Foreseen
from vmm.update.types import Phase
from vmm.update.work import Work


class Unreliable(DirectorySource):
    """A source that ends, fails or answers otherwise where a test wants it to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "unreliable")
        self.hook: Callable[[str, int], None] = lambda path, offset: None
        self.chunk = 20_000
        self.asked: list[tuple[str, int]] = []
        self.served = 0

    def read(self, path: str, *, limit: int, offset: int = 0) -> Iterator[bytes]:
        self.asked.append((path, offset))
        for piece in super().read(path, limit=limit, offset=offset):
            for start in range(0, len(piece), self.chunk):
                self.hook(path, offset + start)
                part = piece[start : start + self.chunk]
                self.served += len(part)
                yield part


@dataclass
class Machine:
    """A System made of files: partitions, an ESP, and a systemd-sysupdate that can be killed half way."""

    folder: Path
    running: str = "1.0.0"
    table_: gpt.Table = field(init=False)
    free: int = 1 << 30
    steps: Callable[[str], None] = lambda step: None
    signer: str = "CN=db in db"
    seals_renewed: int = 0
    seals_error: str = ""
    sticks_: list[Device] = field(default_factory=list)
    db_: bytes = b"the firmware's db"
    firmware_appends: Callable[[bytes], bytes] = lambda content: content
    other_signer: bytes = b""
    sealed: set[bytes] = field(default_factory=set)
    rooms: list[tuple[tuple[bytes, ...], tuple[bytes, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.linux = self.folder / "efi/EFI/Linux"
        self.linux.mkdir(parents=True)
        self.staging = self.folder / "staging"
        content = plain(self.running)
        (self.linux / f"holdfast_{self.running}.efi").write_bytes(content.uki)
        halves = slots.uuids(content.root_hash)
        partitions = []
        first = 2048
        for number, (part, size) in enumerate((("root", MIB), ("verity", MIB), ("signature", 16384)) * 2, 1):
            own = number <= 3
            id_ = halves[("root", "verity").index(part)] if own and part != "signature" else uuid.uuid4()
            name = slots.label(self.running, part) if own else slots.EMPTY
            partitions.append(gpt.Partition(number, slots.TYPES[part], id_, first, first + size // 512 - 1, 0, name))
            first += size // 512
            stored = content.parts()[part] if own else b""
            (self.folder / f"p{number}").write_bytes(stored + bytes(size - len(stored)))
        self.table_ = gpt.Table(uuid.uuid4(), 34, 128, tuple(partitions))

    def table(self) -> gpt.Table:
        return self.table_

    def device(self, partition: gpt.Partition) -> Path:
        return self.folder / f"p{partition.number}"

    def entries(self) -> list[BootEntry]:
        return esp.entries(self.linux)

    def esp_free(self) -> int:
        return self.free

    def write(self, definitions: Definitions, version: str) -> None:
        self.steps(f"write {definitions}")
        if definitions == "uki":
            if not any(entry.version == version for entry in self.entries()):
                hidden = self.linux / ".#sysupdate"
                shutil.copyfile(self.staging / f"holdfast_{version}.efi", hidden)
                self.steps("uki copied")
                hidden.replace(self.linux / f"holdfast_{version}+3-0.efi")
            return
        if slots.find(self.table_, version) is not None:
            return
        self.clear("slot")
        for part in ("signature", "verity", "root"):
            (path,) = self.staging.glob(f"holdfast_{version}_*.{part}.raw")
            target = next(p for p in self.table_.partitions if p.type == slots.TYPES[part] and p.name == slots.EMPTY)
            content = path.read_bytes()
            device = self.device(target)
            device.write_bytes(content[: len(content) // 2])
            self.steps(f"half of {part}")
            device.write_bytes(content + bytes(target.size - len(content)))
            id_ = uuid.UUID(path.name.split("_")[2].split(".")[0])
            self.steps(f"label {part}")
            self._set(target.number, slots.label(version, part), id_)

    def clear(self, definitions: Definitions) -> None:
        self.steps(f"clear {definitions}")
        if definitions == "uki":
            for entry in self.entries():
                if entry.version != self.running:
                    entry.path.unlink()
            return
        for partition in self.table_.partitions:
            if partition.name not in {slots.label(self.running, part) for part in slots.TYPES}:
                self._set(partition.number, slots.EMPTY, partition.id)

    def _set(self, number: int, name: str, id_: uuid.UUID) -> None:
        changed = [replace(p, name=name, id=id_) if p.number == number else p for p in self.table_.partitions]
        self.table_ = replace(self.table_, partitions=tuple(changed))

    def verify(self, data: Path, tree: Path, root_hash: str) -> None:
        self.steps("verify")
        (size,) = struct.unpack_from("<Q", tree.read_bytes(), 8)
        if hashlib.sha256(data.read_bytes()[:size]).hexdigest() != root_hash:
            raise Refused("read-back", f"{data} does not verify")

    def drop_caches(self, paths: Iterable[Path]) -> None:
        self.steps("drop caches")

    def renew_seals(self) -> list[str]:
        if self.seals_error:
            raise Refused("seals", self.seals_error)
        self.seals_renewed += 1
        return ["data: token 0"]

    def sticks(self) -> list[Device]:
        return self.sticks_

    def foresee(self, uki: Path, addition: Addition | None) -> Foreseen | None:
        if addition is not None:
            after = self.db_ if addition.list in self.db_ else self.db_ + addition.list
            return Foreseen((digest(after), digest(after + b"next")), after, addition.certificate)
        return Foreseen((digest(self.other_signer),) * 2, self.db_, self.other_signer) if self.other_signer else None

    def unsealed(self, pcr7: Iterable[bytes]) -> list[str]:
        return [] if set(pcr7) <= self.sealed else ["data", "audit"]

    def make_room(self, coming: Sequence[bytes], former: Sequence[bytes]) -> None:
        self.rooms.append((tuple(coming), tuple(former)))

    def db(self) -> bytes:
        return self.db_

    def extend_db(self, addition: Addition) -> None:
        self.steps("db")
        self.db_ += self.firmware_appends(addition.list)
        self.steps("db extended")

    def initrd(self, ahead: Path) -> None:
        """What holdfast-ahead@.service does at a start."""
        if ahead.exists():
            self.sealed |= {bytes.fromhex(line.partition("=")[2]) for line in ahead.read_text().splitlines()}

    def check_signer(self, uki: Path) -> str:
        self.steps("signer")
        if not self.signer:
            raise Refused("UKI signer", "nobody")
        return self.signer

    @contextmanager
    def base(self, part: str, size: int | None) -> Iterator[mmap]:
        number = {"root": 1, "verity": 2}.get(part)
        path = self.folder / f"p{number}" if number else self.linux / f"holdfast_{self.running}.efi"
        with base.mapped(path, size or len(plain(self.running).parts()[part])) as content:
            yield content


def digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@dataclass
class World:
    """A host with its updater, and the repository that it looks at (as an imported bundle)."""

    folder: Path
    repository: Repository
    machine: Machine
    env: Environment
    records: list[Entry]
    clock: list[float]
    left: list[How] = field(default_factory=list)

    @property
    def work(self) -> Work:
        return Work(self.env)

    def offer(self) -> None:
        """Show the repository as it is now."""
        self.repository.publish()
        shutil.rmtree(self.env.bundle, ignore_errors=True)
        self.repository.copy(self.env.bundle)

    def restarted(self, **running: Any) -> None:
        """The host was restarted: another boot, and perhaps another system."""
        boot = str(uuid.uuid4())
        current = msgspec.structs.replace(self.env.running, boot=boot, **running)
        self.machine.running = current.version
        self.env = replace(self.env, running=current, store=Store(self.env.folder))
        recorder = Recorder(self.append, self.env.store, lambda: self.clock[0])
        self.env = replace(self.env, recorder=recorder)

    def append(self, entry: Entry) -> int:
        # As it comes out of the frame on its way to the audit daemon.
        EVENTS.check(msgspec.convert(msgspec.to_builtins(entry), Entry), "holdfast-host")
        self.records.append(entry)
        return len(self.records)

    def strangers(self) -> Throttle:
        """What calls of others are recorded by."""

        async def append(entry: Entry) -> int:
            return self.append(entry)

        return Throttle(append, "update")

    def trail(self) -> list[tuple[str, str, str]]:
        return [(entry.type, entry.phase, entry.outcome) for entry in self.records]


def make_world(folder: Path, *, version: str = "1.0.0", epoch: int = 1) -> World:
    """A host that runs a version, with a repository that offers the next."""
    repository = Repository(folder / "repository")
    machine = Machine(folder / "machine", version)
    state = folder / "state"
    state.mkdir()
    machine.staging = state / "staging"
    running_ = Running(version, epoch, plain(version).root_hash, SECONDS - 86400, "a" * 32, "boot-1")
    store = Store(state)
    clock: list[float] = [float(SECONDS)]
    world = World(folder, repository, machine, None, [], clock)  # type: ignore[arg-type]  # filled in below
    world.env = Environment(
        folder=state,
        running=running_,
        system=machine,
        floor=FileFloor(state / "floor"),
        store=store,
        recorder=Recorder(world.append, store, lambda: clock[0]),
        configuration=lambda: None,
        root_metadata=lambda: repository.root_json,
        now=lambda: clock[0],
        leave=world.left.append,
    )
    return world


class Killed(BaseException):
    """The machine lost its power here."""


class Power:
    """Cuts the power at the n-th call of what makes changes durable; after that nothing changes any more."""

    def __init__(self, after: int, monkeypatch: Any, names: Iterable[str] = ("fsync", "replace", "unlink")) -> None:
        self.left = after
        self.calls = 0
        for name in names:
            monkeypatch.setattr(os, name, self._cutting(getattr(os, name)))

    def _cutting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.step()
            return real(*arguments, **named)

        return call

    def step(self, _: str = "") -> None:
        self.calls += 1
        if self.left <= 0:
            raise Killed
        self.left -= 1


ALICE = Caller(Actor(id="alice", role="admin", origin="192.0.2.1"), "core-1")


def check(world: World, *, override: bool = False) -> None:
    world.work.check(Job(), ALICE, lambda phase: None, source=None, override_expiry=override)


def download(world: World, version: str = "", *, retry: bool = False, job: Job | None = None) -> None:
    enter: Callable[[Phase], None] = lambda phase: None  # noqa: E731
    world.work.download(job or Job(), ALICE, enter, version=version, retry_failed=retry, override_expiry=False)


def apply(world: World, phases: list[str] | None = None, job: Job | None = None) -> None:
    world.work.apply(job or Job(), ALICE, (phases if phases is not None else []).append)


def names(world: World) -> list[str]:
    return sorted(path.name for path in world.machine.linux.iterdir())


def bless(world: World) -> None:
    """What systemd-bless-boot does once the gate is passed."""
    entry = next(e for e in world.machine.entries() if e.version == world.env.running.version)
    entry.path.rename(entry.path.with_name(f"holdfast_{entry.version}.efi"))


def boot(world: World, version: str, epoch: int = 1) -> None:
    world.restarted(version=version, root_hash=plain(version, epoch).root_hash, epoch=epoch)


def install(world: World) -> None:
    download(world)
    apply(world)
