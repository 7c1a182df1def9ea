"""One bit of a slot turned around, by somebody who has got at the disk of a running host."""

from __future__ import annotations

from tests.harness.host import Host

# Read from the disk itself, as names of a new slot come late to /dev/disk.
_ALTER = """
import os, time
from pathlib import Path
from vmm.config import gpt
own = Path("/sys/class/block", os.path.basename(os.path.realpath("/dev/disk/by-partlabel/esp")))
disk = "/dev/" + own.resolve().parent.name
deadline = time.monotonic() + argument["seconds"]
result = ""
while not result and time.monotonic() < deadline:
    try:
        with open(disk, "rb") as file:
            table = gpt.read(file)
    except Exception:
        continue  # it is being written
    for partition in table.partitions:
        if partition.name == argument["name"]:
            result = disk + str(partition.number)
            descriptor = os.open(result, os.O_RDWR)
            byte = os.pread(descriptor, 1, argument["offset"])
            os.pwrite(descriptor, bytes([byte[0] ^ 1]), argument["offset"])
            os.fsync(descriptor)
            os.close(descriptor)
    time.sleep(0.005)
"""


def alter(host: Host, partition: str, offset: int, seconds: float = 60) -> None:
    """Turn around the last bit of the byte at ``offset`` as soon as there is a partition of that name.

    Raises: AssertionError when there is none within ``seconds`` (scaled); AgentError.
    """
    wanted = {"name": partition, "offset": offset, "seconds": seconds * host.acceleration.scale}
    assert host.agent.python(_ALTER, wanted, seconds=seconds + 10), f"there is no partition {partition} to alter"
