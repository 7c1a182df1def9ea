"""The way from any Debian or Ubuntu machine into the tools tree.

Only this module runs on the machine as it is; everything else (mkosi, QEMU, the tests) runs
inside build/tools, a Debian trixie made from image/tools.packages, and so behaves alike everywhere.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from image.builder.layout import Layout, digest
from vmm.errors import die
from vmm.process import Argument, run

_PROGRAMS = {"mmdebstrap": "mmdebstrap", "bwrap": "bubblewrap", "newuidmap": "uidmap"}
_APT = Path("/etc/apt")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SUITES = {"debian": "trixie trixie-updates", "debian-security": "trixie-security"}
_COMPONENTS = ("main", "non-free-firmware")


def say(text: str) -> None:
    """Tell the person who waits what happens now."""
    print(f"» {text}", file=sys.stderr, flush=True)


def become_root() -> None:
    """Restart inside a user namespace when not root, so that one way serves both.

    Raises: UserError where unprivileged user namespaces or subordinate uids are not to be had.
    """
    if os.geteuid() == 0:
        return
    _install_missing()
    command = ["unshare", "--user", "--map-root-user", "--map-auto", "--mount", "--setuid=0", "--setgid=0"]
    if run([*command, "true"], check=False).returncode != 0:
        die(
            "this account can use no user namespace with subordinate user ids",
            hint="allow them (sysctl kernel.unprivileged_userns_clone=1 and "
            "kernel.apparmor_restrict_unprivileged_userns=0, a line for you in /etc/subuid and /etc/subgid) or be root",
        )
    os.execvp(command[0], [*command, sys.executable, "-m", "image.builder", *sys.argv[1:]])


def _install_missing() -> None:
    packages = [package for program, package in _PROGRAMS.items() if not shutil.which(program)]
    if not _KEYRING.exists():
        packages.append("debian-archive-keyring")
    if not packages:
        return
    if os.geteuid() != 0:
        die(
            f"not installed: {' '.join(packages)}",
            hint=f"sudo apt-get install --no-install-recommends {' '.join(packages)}",
        )
    if not shutil.which("apt-get"):
        die(f"not installed: {' '.join(packages)}", hint="install them with this system's package manager")
    say(f"installing {' '.join(packages)}")
    run(["apt-get", "update"], check=False)
    run(
        ["apt-get", "install", "--yes", "--no-install-recommends", *packages],
        env={"DEBIAN_FRONTEND": "noninteractive"},
    )


def apt_sources(layout: Layout, etc: Path = _APT) -> str:
    """The apt sources of the build, deb822: from MIRROR, else from the machine's own in ``etc``.

    Empty on a machine without Debian sources: then mmdebstrap's default applies, and no host name
    of a mirror has to stand in this repository.
    """
    found: dict[str, str] = {}
    if layout.mirror:
        found = {"debian": layout.mirror, "debian-security": f"{layout.mirror.removesuffix('/debian')}/debian-security"}
    else:
        for file in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
            if file.suffix not in (".list", ".sources") or not file.is_file():
                continue
            lines = (line.partition("#")[0] for line in file.read_text(errors="replace").splitlines())
            for word in " ".join(lines).split():
                uri = word.rstrip("/")
                if uri.startswith(("http://", "https://")) and uri.endswith(("/debian", "/debian-security")):
                    found.setdefault(uri.rsplit("/", 1)[1], uri)
    if set(found) != set(_SUITES):
        return ""
    return "\n".join(
        f"Types: deb\nURIs: {found[name]}\nSuites: {suites}\n"
        f"Components: {' '.join(_COMPONENTS)}\nSigned-By: {_KEYRING}\n"
        for name, suites in _SUITES.items()
    )


def make_tools(layout: Layout) -> None:
    """Make the tools tree if it is missing or its package list or mirror changed.

    It is built beside its final place and renamed, so an interrupted run leaves nothing half-made.
    Raises: UserError when the archive cannot be reached or its signature does not verify.
    """
    packages = layout.repository / "image/tools.packages"
    sources = apt_sources(layout)
    wanted = digest([packages], sources)
    stamp = layout.tools / "etc/holdfast-tools"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    _install_missing()
    say("making the tools tree (Debian trixie; once, about a minute)")
    fresh = layout.build / "tools.new"
    for old in (fresh, layout.tools):
        _remove(old)
    layout.build.mkdir(exist_ok=True)
    listed = [line.strip() for line in packages.read_text().splitlines() if line.strip() and line[0] != "#"]
    sources_file = layout.build / "trixie.sources"
    sources_file.write_text(sources)
    run(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=apt",
            f"--include={','.join(listed)}",
            '--aptopt=APT::Install-Recommends "false"',
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            f"--components={','.join(_COMPONENTS)}",
            # On Ubuntu mmdebstrap would not look there by itself.
            f"--keyring={_KEYRING}",
            "trixie",
            fresh,
            *([sources_file] if sources else []),
        ]
    )
    (fresh / "etc/holdfast-tools").write_text(wanted)
    fresh.rename(layout.tools)


def clean(layout: Layout) -> None:
    """Delete everything under build/ but the keys, without which nothing installed before would take an update."""
    for path in layout.build.iterdir() if layout.build.exists() else ():
        if path != layout.keys:
            _remove(path) if path.is_dir() else path.unlink()


def _remove(path: Path) -> None:
    # A tree made by a killed mmdebstrap may still have its /dev and /proc mounted; never delete through those.
    if path.exists():
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            point = line.split()[1]
            if point.startswith(f"{path}/"):
                run(["umount", "--lazy", point])
        shutil.rmtree(path)


def _keys(layout: Layout) -> list[Argument]:
    """What shows a key set that lies elsewhere; a release only reads it. Raises: UserError when there is none."""
    if layout.keys.is_relative_to(layout.repository):
        return []
    if not layout.keys.is_dir():
        die(f"there is no key set in {layout.keys}", hint="KEYS=folder names one; docs/key-ceremony.md makes it")
    return ["--ro-bind" if layout.release else "--bind", layout.keys, layout.keys]


def inside_tools(layout: Layout, command: list[Argument]) -> list[Argument]:
    """The command that runs ``command`` inside the tools tree, in the repository's folder."""
    resolv = Path("/etc/resolv.conf").resolve()
    return [
        "bwrap",
        *("--bind", layout.tools, "/"),
        *("--dev-bind", "/dev", "/dev"),
        *("--proc", "/proc"),
        *("--ro-bind-try", "/sys", "/sys"),
        *("--tmpfs", "/run"),
        *("--tmpfs", "/tmp"),  # noqa: S108 - the sandbox's own
        *("--ro-bind-try", resolv, "/etc/resolv.conf"),
        *("--bind", layout.repository, layout.repository),
        *_keys(layout),
        *("--chdir", layout.repository),
        *("--cap-add", "ALL"),
        *("--die-with-parent",),
        *("--setenv", "PATH", "/usr/bin:/usr/sbin"),
        *("--setenv", "PYTHONPATH", layout.repository),
        *("--setenv", "PYTHONDONTWRITEBYTECODE", "1"),
        *("--setenv", "HOME", "/root"),
        *("--setenv", "LC_ALL", "C.UTF-8"),
        *command,
    ]
