"""The EFI system partition of a running host, which the updater alone mounts, seen and changed by the test agent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.harness.agent import Agent

_MOUNT = """
import ctypes, os, shutil, subprocess
folder = "/run/test-esp"
linux = folder + "/EFI/Linux"
os.makedirs(folder, exist_ok=True)
if not os.path.ismount(folder):
    subprocess.run(["mount", "-t", "vfat", "/dev/disk/by-partlabel/esp", folder], check=True)
"""
_UMOUNT = """
subprocess.run(["umount", folder], check=True)
"""
_LIST = "result = sorted((e.name, e.stat().st_size) for e in os.scandir(linux))"
_COPY = "shutil.copyfile(linux + '/' + argument[0], linux + '/' + argument[1])"
_REMOVE = "os.unlink(linux + '/' + argument)"
# Beyond the end of the file, as there it need not be filled with zeros; that lasts as long as it is open.
_FILL = """
result = os.open(folder + "/filler", os.O_RDWR | os.O_CREAT)
found = os.fstatvfs(result)
size = ctypes.c_long(found.f_bavail * found.f_frsize - argument)
if ctypes.CDLL(None).fallocate(result, 1, ctypes.c_long(0), size):
    raise OSError("fallocate")
"""
_FREE = """
os.close(argument)
os.unlink(folder + "/filler")
"""


def entries(agent: Agent) -> list[tuple[str, int]]:
    """Names and sizes of the boot entries. Raises: AgentError."""
    return [(name, size) for name, size in agent.python(_MOUNT + _LIST + _UMOUNT)]


def copy(agent: Agent, name: str, other: str) -> None:
    """Copy a boot entry. Raises: AgentError."""
    agent.python(_MOUNT + _COPY + _UMOUNT, [name, other])


def remove(agent: Agent, name: str) -> None:
    """Remove a boot entry. Raises: AgentError."""
    agent.python(_MOUNT + _REMOVE + _UMOUNT, name)


@contextmanager
def full(agent: Agent, left: int) -> Iterator[None]:
    """Have about ``left`` bytes free. Raises: AgentError."""
    descriptor = agent.python(_MOUNT + _FILL, left, seconds=60)
    yield
    agent.python(_MOUNT + _FREE + _UMOUNT, descriptor, seconds=60)
