"""Runs mkosi: packages and our files become one tree, build/mkosi/root."""

from __future__ import annotations

import shutil
from pathlib import Path

from image.builder.host import say
from image.builder.initrd import policy_key_id
from image.builder.layout import SOURCE_DATE_EPOCH, Layout
from image.builder.probe import build_probe_disk
from signing.keys import KeySet
from vmm.process import CommandFailed, run


def make_tree(layout: Layout, keys: KeySet) -> None:
    """Install the tree anew (packages come from mkosi's cache when their list did not change).

    Raises: CommandFailed with mkosi's last lines; its whole output is in build/mkosi.log.
    """
    say("installing packages and files (mkosi)")
    cache = layout.build / "mkosi.cache"
    cache.mkdir(parents=True, exist_ok=True)
    options = (f"--cache-directory={cache}", f"--image-version={layout.version}")
    run_mkosi(layout, layout.repository, layout.mkosi_output, *options)
    share = layout.root / "usr/share/holdfast"
    # The guest by which a host that starts a new system for the first time shows that it can run guests.
    build_probe_disk(share / "probe.raw")
    # Whom the updater believes; everything else that it reads has to follow from this file.
    shutil.copyfile(keys.root, share / "root.json")
    # To which policy key the first boot seals the volumes (repart.d), and which seals the updater keeps.
    shutil.copyfile(keys.public("pcr"), share / "pcr.pem")
    for volume in ("audit", "data"):
        mark = share / "sealed" / f"{policy_key_id(keys.public('pcr'))}.{volume}"
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
    # In the UKI too, as .osrel: so the epoch of an installed system can be read without starting it.
    with (layout.root / "usr/lib/os-release").open("a") as release:
        release.write(f"HOLDFAST_EPOCH={layout.epoch}\nHOLDFAST_BUILT={layout.built}\n")


def run_mkosi(layout: Layout, definition: Path, output: Path, *options: str) -> None:
    """Build the mkosi.conf in the folder ``definition`` with this build's apt sources and downloaded packages.

    Raises: CommandFailed with mkosi's last lines; its whole output is beside the folder ``output``, in a file .log.
    """
    sandbox = layout.build / "mkosi.sandbox"
    _write_apt_sources(sandbox)
    packages, work = layout.build / "mkosi.packages", layout.build / "mkosi.work"
    for folder in (packages, work, output):
        folder.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".log")
    with file.open("w") as log:
        result = run(
            [
                "mkosi",
                f"--directory={definition}",
                f"--sandbox-tree={sandbox}",
                f"--package-cache-directory={packages}",
                f"--workspace-directory={work}",
                f"--output-directory={output}",
                f"--source-date-epoch={SOURCE_DATE_EPOCH}",
                *options,
                "--force",
                "build",
            ],
            check=False,
            output=log,
        )
    if result.returncode != 0:
        raise CommandFailed(["mkosi"], result.returncode, file.read_text())


def _write_apt_sources(sandbox: Path) -> None:
    # A file of this very name keeps mkosi from adding suites that mirrors lack (debian-debug); we are inside
    # the tools tree here, whose own sources are the ones that were chosen for this build.
    lines = []
    for file in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.list"))]:
        if file.exists():
            lines += [line for line in file.read_text().splitlines() if line.startswith("deb ")]
    deb822 = [file.read_text() for file in sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))]
    for line in lines:
        words = [word for word in line.split() if not word.startswith("[") and not word.endswith("]")]
        deb822.append(
            f"Types: deb\nURIs: {words[1]}\nSuites: {words[2]}\nComponents: {' '.join(words[3:])}\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        )
    target = sandbox / "etc/apt/sources.list.d/mkosi.sources"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(deb822))
