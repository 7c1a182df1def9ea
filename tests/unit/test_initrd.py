"""The initrd changes key slots of genuine volumes only: what its units ask of the volumes before, and power cuts."""

from __future__ import annotations

import re
import shlex
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from image.builder import initrd
from vmm.config import gpt
from vmm.errors import UserError
from vmm.process import run

REPOSITORY = Path(__file__).resolve().parents[2]
INITRD = REPOSITORY / "image/initrd"
UNITS = INITRD / "rootfs/usr/lib/systemd/system"
DEFINITIONS = REPOSITORY / "image/rootfs/usr/lib/repart.d"
OWN, OTHER = "5c7c9a1e-0000-4000-8000-000000000001\n", "5c7c9a1e-0000-4000-8000-000000000002\n"


def settings(name: str) -> Mapping[str, list[str]]:
    """All values of a unit's settings, in order."""
    found = defaultdict(list)
    for line in (UNITS / name).read_text().splitlines():
        if re.match(r"[A-Z]\w+=", line):
            key, _, value = line.partition("=")
            found[key].append(value)
    return found


def commands(name: str) -> list[list[str]]:
    """What a unit runs, in order."""
    unit = settings(name)
    return [shlex.split(line) for key in ("ExecStartPre", "ExecStart", "ExecStartPost") for line in unit[key]]


def words(values: Sequence[str]) -> set[str]:
    """The units that a dependency names."""
    return set(" ".join(values).split())


# -- the secret that both volumes hold -----------------------------------------------------------------------------


class PowerCut(Exception):
    """The next command is not run any more."""


class Volumes:
    """The two volumes, mounted under a folder in place of /sysroot, and the units that look at their secrets."""

    def __init__(self, folder: Path) -> None:
        self.data, self.audit = folder / "var/lib/holdfast", folder / "var/lib/holdfast-audit"
        self._folder = folder
        for place in (self.data, self.audit):
            place.mkdir(parents=True)

    def start(self, cut: int | None = None) -> str:
        """Start the host. Returns: the unit that failed, or "". Raises: PowerCut before the command of that number."""
        left = cut
        for name in ("holdfast-pair-make.service", "holdfast-pair-keep.service", "holdfast-pair.service"):
            unit = {key: [self._placed(value) for value in values] for key, values in settings(name).items()}
            if not self._holds(unit, "Condition"):
                continue
            if not self._holds(unit, "Assert"):
                return name
            for command in unit["ExecStart"]:
                if left == 0:
                    raise PowerCut
                left = left and left - 1
                if run(shlex.split(command), check=False, timeout=10).returncode != 0:
                    return name
        return ""

    def _placed(self, text: str) -> str:
        return text.replace("/sysroot", str(self._folder))

    def _holds(self, unit: Mapping[str, list[str]], kind: str) -> bool:
        checks = [f"{key}={value}" for key, values in unit.items() if key.startswith(kind) for value in values]
        return not checks or run(["systemd-analyze", "condition", *checks], check=False).returncode == 0

    @property
    def secrets(self) -> tuple[str, str]:
        """What the volumes hold, "" where there is none."""
        return (read(self.data / "pair"), read(self.audit / "pair"))


def read(path: Path) -> str:
    """A file's content; "" where there is none."""
    return path.read_text() if path.exists() else ""


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    """Volumes without secrets, as releases made them that knew none."""
    return Volumes(tmp_path / "sysroot")


def test_volumes_without_secrets_get_one_over_a_power_cut_at_any_point(volumes: Volumes) -> None:
    """Cut twice before any command, the next start is a good one, and what was valid once stays as it is."""
    for cut in range(len([c for unit in ("make", "keep") for c in commands(f"holdfast-pair-{unit}.service")]) + 1):
        for place in (volumes.data, volumes.audit):
            shutil.rmtree(place)
            place.mkdir()
        for _ in range(2):
            before = volumes.secrets
            try:
                assert volumes.start(cut) == ""
            except PowerCut:
                assert all(now == then for now, then in zip(volumes.secrets, before, strict=True) if then)
        left, valid = read(volumes.data / "pair.new"), read(volumes.audit / "pair")
        assert volumes.start() == ""
        data, audit = volumes.secrets
        assert re.fullmatch(r"[0-9a-f-]{36}\n", data)
        assert data == audit
        assert valid in ("", data), "the audit volume took another secret"
        assert valid or data != left, "a secret was made of what a power cut had left"
        for place in (volumes.data, volumes.audit):
            assert [entry.name for entry in place.iterdir()] == ["pair"]
            assert (place / "pair").stat().st_mode & 0o777 == 0o600


def test_a_rename_follows_a_sync_and_is_synced() -> None:
    """Otherwise a power cut could leave a name without its content."""
    for unit, other in (("make", "data"), ("keep", "")):
        steps = [(Path(program).name, *arguments) for program, *arguments in commands(f"holdfast-pair-{unit}.service")]
        (number,) = (number for number, step in enumerate(steps) if step[0] == "mv")
        source, target = steps[number][1:]
        assert steps[number + 1] == ("sync", str(Path(target).parent))
        # What keep renames, make has synced together with its own.
        assert not other or {"sync", source, "/sysroot/var/lib/holdfast/pair.new"} == set(steps[number - 1])


def test_volumes_of_one_host_start(volumes: Volumes) -> None:
    """And nothing is written to them."""
    for place in (volumes.data, volumes.audit):
        (place / "pair").write_text(OWN)
    assert volumes.start(cut=1) == ""
    assert volumes.secrets == (OWN, OWN)


@pytest.mark.parametrize(
    ("data", "audit"),
    [
        ({"pair": OTHER}, {"pair": OWN}),
        ({"pair": OTHER}, {}),
        ({"pair": OTHER}, {"pair.new": OTHER}),
        ({}, {"pair": OWN}),
        ({"pair.new": OTHER}, {"pair": OWN}),
        ({"pair": ""}, {"pair": ""}),
        ({"pair": ""}, {"pair": OWN}),
        ({"pair": "-> ../holdfast-audit/pair"}, {"pair": OWN}),
        ({"pair.new": "-> ../holdfast-audit/pair"}, {"pair": OWN}),
        ({"": "-> holdfast-audit"}, {"pair": OWN}),
        ({"pair": OWN}, {"pair": "-> ../holdfast/pair"}),
        ({"pair.new": OWN}, {"pair": "-> ../holdfast/pair.new"}),
        ({"pair": "-> /proc/version"}, {"pair": "-> /proc/version"}),
    ],
)
def test_volumes_of_two_hosts_are_refused(volumes: Volumes, data: dict[str, str], audit: dict[str, str]) -> None:
    """However somebody made the other one: no secret is given to a volume that has one, or taken from it."""
    for place, files in ((volumes.data, data), (volumes.audit, audit)):
        for name, content in files.items():
            if not name:
                place.rmdir()
            if content.startswith("-> "):
                (place / name if name else place).symlink_to(content.removeprefix("-> "))
            else:
                (place / name).write_text(content)
    for _ in range(2):
        assert volumes.start().startswith("holdfast-pair")
        for place, files in ((volumes.data, data), (volumes.audit, audit)):
            secret = place / "pair"
            if not secret.is_symlink() and not place.is_symlink():
                assert read(secret) == files.get("pair", ""), "a volume took a secret"


# -- what the units are --------------------------------------------------------------------------------------------


def test_key_slots_are_changed_behind_the_checks_and_on_the_open_partition() -> None:
    """By its own node, since a label may lead elsewhere by then; and by no environment that a volume holds."""
    changing = [unit.name for unit in UNITS.glob("*.service") if "systemd-cryptenroll" in unit.read_text()]
    assert {"holdfast-recovery@.service", "holdfast-reseal@.service", "holdfast-ahead@.service"} <= set(changing)
    for name in changing:
        unit = settings(name)
        assert "holdfast-pair.service" in words(unit["Requires"]) & words(unit["After"]), name
        for command in commands(name):
            assert command[-1] == "/dev/holdfast-%i", name
            assert not unit["EnvironmentFile"] or command[:2] == ["/usr/bin/env", "-i"], name
    opened = [command for command in commands("holdfast-unlock@.service") if "/dev/holdfast-%i" in command]
    assert [Path(command[0]).name for command in opened] == ["cp", "systemd-cryptsetup"]


def test_nothing_is_mounted_or_started_before_the_checks() -> None:
    """Mounts need the volume's own label, the secrets need both mounts, and the way into the root needs them."""
    needs = {
        "holdfast-label@.service": "holdfast-unlock@%i.service",
        "sysroot-var.mount": "holdfast-label@data.service",
        "sysroot-var-lib-holdfast\\x2daudit.mount": "holdfast-label@audit.service",
        "holdfast-pair.service": "sysroot-var-lib-holdfast\\x2daudit.mount",
    }
    for name, needed in needs.items():
        unit = settings(name)
        assert needed in words(unit["Requires"]) & words(unit["After"]), name
        assert unit["OnFailure"] == ["emergency.target"], name
    assert (UNITS / "initrd-fs.target.requires/holdfast-pair.service").resolve() == UNITS / "holdfast-pair.service"


def test_the_initrd_has_the_programs_that_its_units_run() -> None:
    """Each is named in image/initrd/files."""
    listed = (INITRD / "files").read_text().split()
    for unit in UNITS.glob("holdfast-*.service"):
        for command in commands(unit.name):
            programs = [command[0], *(command[2:3] if command[:2] == ["/usr/bin/env", "-i"] else [])]
            assert {program.removeprefix("/") for program in programs} <= set(listed), unit.name


def test_an_initrd_with_the_null_cipher_is_not_built(tmp_path: Path) -> None:
    """Neither as a module that another one wants, nor in the kernel."""
    base = tmp_path / "root/usr/lib/modules/6"
    (base / "kernel").mkdir(parents=True)
    (base / "kernel/dm-crypt.ko").touch()
    (base / "kernel/crypto_null.ko").touch()
    for depends, builtin in (("kernel/crypto_null.ko", ""), ("", "kernel/crypto/crypto_null.ko\n")):
        (base / "modules.dep").write_text(f"kernel/dm-crypt.ko: {depends}\nkernel/crypto_null.ko:\n")
        (base / "modules.builtin").write_text(builtin)
        with pytest.raises(UserError, match="null cipher"):
            initrd._copy_modules(tmp_path / "root", ["dm-crypt.*"], tmp_path / "tree")


# -- what the first boot makes -------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    """The file systems of both volumes, by the release's definitions; smaller, and not encrypted."""
    (tmp_path / "sysroot/usr/share/holdfast/sealed").mkdir(parents=True)
    (tmp_path / "definitions").mkdir()
    for name in ("40-audit.conf", "50-data.conf"):
        text = re.sub(r"^(Encrypt|Size\w+)=.*\n", "", (DEFINITIONS / name).read_text(), flags=re.MULTILINE)
        text = text.replace("=/tmp/", f"={tmp_path}/").replace("=/sysroot/", f"={tmp_path}/sysroot/")
        (tmp_path / "definitions" / name).write_text(f"{text}SizeMinBytes=32M\nSizeMaxBytes=32M\n")
    prepare, repart = commands("holdfast-partitions.service")
    run([*prepare[:-1], tmp_path / "pair"])
    assert prepare[-1] == "/tmp/pair"  # noqa: S108 - the initrd's own
    disk = tmp_path / "disk.raw"
    options = ["--offline=yes", "--empty=create", "--size=80M", "--dry-run=no", f"--definitions={tmp_path}/definitions"]
    copied = [option for option in repart if option.startswith("--copy-source=")]
    run(["systemd-repart", f"--root={tmp_path}/sysroot", *copied, *options, disk])
    with disk.open("rb") as file:
        table = gpt.read(file)
    found = {}
    for partition in table.partitions:
        found[partition.name] = tmp_path / partition.name
        found[partition.name].write_bytes(gpt.read_partition(disk, partition, partition.size))
    return found


def test_the_first_boot_makes_volumes_that_pass_the_checks(made: dict[str, Path]) -> None:
    """Each file system carries its own label, not the other's, and both hold one secret, which only root reads."""
    (check,) = commands("holdfast-label@.service")
    for name in ("data", "audit"):
        for other in ("data", "audit"):
            command = [word.replace("%i", name) for word in check[:-1]]
            passed = run([*command, made[f"holdfast-{other}"]], check=False)
            assert passed.returncode == (0 if other == name else 2), passed
    secrets = set()
    for volume, place in (("data", "/lib/holdfast/pair"), ("audit", "/pair")):
        status = run(["debugfs", "-R", f"stat {place}", made[f"holdfast-{volume}"]]).stdout
        assert re.search(r"Type: regular\s+Mode:\s+0600", status), status
        assert re.search(r"User:\s+0\b", status), status
        secrets.add(run(["debugfs", "-R", f"cat {place}", made[f"holdfast-{volume}"]]).stdout)
    (secret,) = secrets
    assert re.fullmatch(r"[0-9a-f-]{36}\n", secret)
