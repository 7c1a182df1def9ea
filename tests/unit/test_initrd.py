"""The initrd changes key slots of genuine volumes only: what its units ask of the volumes before."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from image.builder import initrd
from image.builder.layout import Layout
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


class Volumes:
    """The two volumes, mounted under a folder in place of /sysroot, and the unit that looks at their secrets."""

    def __init__(self, folder: Path) -> None:
        self.data, self.audit = folder / "var/lib/holdfast", folder / "var/lib/holdfast-audit"
        self._folder = folder
        for place in (self.data, self.audit):
            place.mkdir(parents=True)

    def start(self) -> bool:
        """Start the host. Returns: whether the unit lets it go on."""
        unit = {
            key: [value.replace("/sysroot", str(self._folder)) for value in values]
            for key, values in settings("holdfast-pair.service").items()
        }
        assert not any(key.startswith("Condition") for key in unit), "a check that may be left out"
        asserted = [f"{key}={value}" for key, values in unit.items() if key.startswith("Assert") for value in values]
        if run(["systemd-analyze", "condition", *asserted], check=False).returncode != 0:
            return False
        return all(run(shlex.split(command), check=False, timeout=10).returncode == 0 for command in unit["ExecStart"])


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    """Volumes without secrets."""
    return Volumes(tmp_path / "sysroot")


def test_volumes_of_one_host_start(volumes: Volumes) -> None:
    """And nothing is written to them."""
    for place in (volumes.data, volumes.audit):
        (place / "pair").write_text(OWN)
    assert volumes.start()
    assert [entry.read_text() for place in (volumes.data, volumes.audit) for entry in place.iterdir()] == [OWN, OWN]


@pytest.mark.parametrize(
    ("data", "audit"),
    [
        ({"pair": OTHER}, {"pair": OWN}),
        ({"pair": OTHER}, {}),
        ({}, {"pair": OWN}),
        ({}, {}),
        ({"pair": ""}, {"pair": ""}),
        ({"pair": ""}, {"pair": OWN}),
        ({"pair": "-> ../holdfast-audit/pair"}, {"pair": OWN}),
        ({"": "-> holdfast-audit"}, {"pair": OWN}),
        ({"pair": OWN}, {"pair": "-> ../holdfast/pair"}),
        ({"pair": "-> /proc/version"}, {"pair": "-> /proc/version"}),
    ],
)
def test_volumes_of_two_hosts_are_refused(volumes: Volumes, data: dict[str, str], audit: dict[str, str]) -> None:
    """However somebody made the other one; also volumes without a secret, which nobody made together."""
    for place, files in ((volumes.data, data), (volumes.audit, audit)):
        for name, content in files.items():
            if not name:
                place.rmdir()
            if content.startswith("-> "):
                (place / name if name else place).symlink_to(content.removeprefix("-> "))
            else:
                (place / name).write_text(content)
    assert not volumes.start()


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
        (tmp_path / "definitions" / name).write_text(f"{text}SizeMinBytes=32M\nSizeMaxBytes=32M\n")
    prepare, repart = commands("holdfast-partitions.service")
    assert "--copy-source=/" in repart
    secret = tmp_path / prepare[-1].removeprefix("/")
    # What systemd-repart does not copy, where it is the root's own.
    assert secret.relative_to(tmp_path).parts[0] not in ("dev", "proc", "run", "sys", "tmp", "var")
    run([*prepare[:-1], secret])
    disk = tmp_path / "disk.raw"
    options = ["--offline=yes", "--empty=create", "--size=80M", "--dry-run=no", f"--definitions={tmp_path}/definitions"]
    (variable,) = settings("holdfast-partitions.service")["Environment"]
    environment = dict([variable.strip('"').split("=", 1)])
    run(["systemd-repart", f"--root={tmp_path}/sysroot", f"--copy-source={tmp_path}", *options, disk], env=environment)
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


@pytest.mark.sfr("FAU_STG.1")
def test_the_audit_volume_can_seal_what_is_in_it(made: dict[str, Path]) -> None:
    """fs-verity is a feature of the file system, with which it has to be made; pages and blocks are of one size."""
    shown = run(["dumpe2fs", "-h", made["holdfast-audit"]]).stdout
    features = next(line for line in shown.splitlines() if line.startswith("Filesystem features:")).split()
    assert {"verity", "extent", "has_journal", "metadata_csum"} <= set(features)
    assert re.search(r"^Block size:\s+4096$", shown, re.MULTILINE)


def test_what_the_initrd_takes_decides_whether_it_is_made_anew(tmp_path: Path) -> None:
    """Users of services come and go without any package; a link that points elsewhere counts as well."""
    layout = Layout(repository=tmp_path)
    (tmp_path / "image/initrd").mkdir(parents=True)
    (tmp_path / "image/initrd/files").write_text("etc/passwd usr/lib/some*  # and a comment\n")
    layout.mkosi_output.mkdir(parents=True)
    (layout.mkosi_output / "root.manifest").write_text('{"packages": [{"name": "a", "version": "1"}]}')
    (layout.root / "etc").mkdir(parents=True)
    (layout.root / "usr/lib/something").mkdir(parents=True)
    seen = {initrd.contents(layout)}
    for path, text in (("etc/passwd", "a"), ("etc/passwd", "b"), ("usr/lib/something/file", "a")):
        (layout.root / path).write_text(text)
        seen.add(initrd.contents(layout))
    for target in ("file", "other"):
        (layout.root / "usr/lib/some.link").unlink(missing_ok=True)
        (layout.root / "usr/lib/some.link").symlink_to(target)
        seen.add(initrd.contents(layout))
    assert len(seen) == 6
    (layout.root / "etc/other").write_text("is not taken")
    assert initrd.contents(layout) in seen
