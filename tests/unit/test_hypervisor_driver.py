"""What libvirt is asked for, with a pretended connection."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any
from uuid import UUID

import libvirt
import pytest

from vmm.errors import Conflict, Unavailable, UserError
from vmm.hypervisor.driver import LibvirtHypervisor


class Connection:
    """The part of libvirt's connection and domain that saving and restoring use."""

    def __init__(self, *, ends: bool) -> None:
        self.aborted = threading.Event()
        self.calls: list[tuple[Any, ...]] = []
        if ends:
            self.aborted.set()
        self.ends = ends
        self.of = UUID(int=1)

    def lookupByUUID(self, _raw: bytes) -> Connection:
        return self

    def saveFlags(self, path: str, xml: None, flags: int) -> None:
        self.calls.append(("save", path, flags))
        self.aborted.wait(10)
        if not self.ends:
            raise libvirt.libvirtError("operation aborted")

    def abortJob(self) -> None:
        self.calls.append(("abort",))
        self.aborted.set()

    def saveImageGetXMLDesc(self, _path: str) -> str:
        return f"<domain><uuid>{self.of}</uuid></domain>"

    def restoreFlags(self, path: str, xml: None, flags: int) -> None:
        self.calls.append(("restore", path, flags))
        if not self.ends:
            raise libvirt.libvirtError("cannot be restored")


def test_saving_and_restoring() -> None:
    async def call() -> None:
        hypervisor = LibvirtHypervisor()
        asked = hypervisor._connection = Connection(ends=True)
        path, id = Path("/saved/x.new"), UUID(int=1)
        await hypervisor.save(id, path, 5)
        await hypervisor.restore(id, path, 5)
        assert asked.calls == [
            ("save", str(path), libvirt.VIR_DOMAIN_SAVE_RUNNING),
            ("restore", str(path), libvirt.VIR_DOMAIN_SAVE_PAUSED),
        ]
        asked.of = UUID(int=2)
        with pytest.raises(Conflict, match="another machine"):
            await hypervisor.restore(id, path, 5)
        assert len(asked.calls) == 2
        asked = hypervisor._connection = Connection(ends=False)
        with pytest.raises(Unavailable, match="not saved in time"):
            await hypervisor.save(id, path, 0.05)
        assert [call[0] for call in asked.calls] == ["save", "abort"]
        with pytest.raises(Conflict, match="libvirt cannot restore it"):
            await hypervisor.restore(id, path, 5)
        hypervisor._connection = None
        with pytest.raises(UserError, match="does not answer"):
            await hypervisor.save(id, path, 5)

    asyncio.run(call())
