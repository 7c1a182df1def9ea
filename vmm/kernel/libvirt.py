"""What libvirt does to guests, as it tells the kernel itself, and which of it nobody asked for through the service."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from vmm.audit.client import Actor, Entry, Object
from vmm.clock import rfc3339
from vmm.kernel.joining import Event
from vmm.kernel.judge import UUID, Machines
from vmm.kernel.parse import Line, number, plain, text

CONTROL, RESOURCE, MACHINE_ID = 2500, 2501, 2502
TYPES = frozenset({CONTROL, RESOURCE, MACHINE_ID})

_STOPS = ("host.stop-guests", "host.reboot", "host.shutdown")
ASKED: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("start", "booted"): ("machine.start", "gate.probe"),
    ("start", "restored"): ("machine.start",),
    ("stop", "saved"): ("machine.suspend", *_STOPS),
    # A start that fails on the way ends what it has begun.
    ("stop", "destroyed"): ("machine.stop", "machine.force-off", "machine.start", "gate.probe", *_STOPS),
}
"""What libvirt did, and why it says so → the calls of which that is a part."""
_BY_ITSELF = frozenset({"shutdown", "failed", "crashed"})
"""Ends for which nobody needs to ask: the guest shut down, or its QEMU died."""
_OF_A_START = frozenset({"start", "open", "allow", "deny"})
"""Reasons of resources that a start brings along; all others are changes of a guest that runs, which we never make."""
_QUIET = frozenset({"cgroup"})
"""Resources that say the same at each start: the devices that qemu.conf lets guests open."""

_LABEL = re.compile(r"\+?(\d{1,6})(?::.*)?")
_BEHIND_NAME = re.compile(rf"_{UUID.pattern}\Z")
"""What libvirt's names of domains have behind those of their machines (vmm.hypervisor.domain)."""
_LIBVIRT = "libvirtd"
_MOST_GUESTS = 256
_MOST_RESOURCES = 24
_MOST_WORDS = 200


class Change(NamedTuple):
    """A record to be, and the types of calls that may have asked for it; None where nobody needs to."""

    entry: Entry
    time: int
    asked: tuple[str, ...] | None


class Gatherer:
    """Makes changes of libvirt's messages. What a start says of resources goes with the start."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._resources: dict[str, list[str]] = {}

    def take(self, event: Event) -> list[Change]:
        """What one event says."""
        made = [self._one(type_, event, line) for type_, line in event.records if type_ in TYPES]
        return [change for change in made if change is not None]

    def _one(self, type_: int, event: Event, line: Line) -> Change | None:
        said = line.said
        uuid = said.get("uuid", "")
        uuid = uuid if UUID.fullmatch(uuid) else ""
        if self._is_foreign(line):
            return self._change("libvirt.unasked", event, line, uuid, {}, (), "another process spoke in libvirt's name")
        if type_ == MACHINE_ID:
            label = _LABEL.fullmatch(text(said.get("vm-ctx")))
            if uuid and said.get("model") == "dac" and label:
                self._machines.learn(int(label[1]), uuid)
            return None
        if type_ == RESOURCE:
            return self._resource(event, line, uuid)
        what = (plain(said.get("op", "")), plain(said.get("reason", "")))
        extra: dict[str, Any] = {"operation": what[0], "cause": what[1], "vm_pid": number(said.get("vm-pid"))}
        if what[0] == "start":
            extra["resources"] = self._resources.pop(uuid, [])
        asked = None if what[0] == "stop" and what[1] in _BY_ITSELF else ASKED.get(what, ())
        return self._change("libvirt.control", event, line, uuid, extra, asked)

    def _resource(self, event: Event, line: Line, uuid: str) -> Change | None:
        said = line.said
        kind, reason = plain(said.get("resrc", "")), plain(said.get("reason", ""))
        words = " ".join(
            # Amounts are digits, which would be hex for something else.
            f"{name}={value if value.isdecimal() else text(value) or '?'}"
            for name, value in said.items()
            if name.startswith(("old-", "new-"))
        )
        if reason not in _OF_A_START:
            extra = {"operation": reason, "resources": [f"{kind} {words}"[:_MOST_WORDS]]}
            return self._change("libvirt.resource", event, line, uuid, extra, ())
        if kind not in _QUIET and reason == "start":
            if uuid not in self._resources and len(self._resources) >= _MOST_GUESTS:
                self._resources.pop(next(iter(self._resources)))
            gathered = self._resources.setdefault(uuid, [])
            if len(gathered) < _MOST_RESOURCES:
                gathered.append(f"{kind} {words}"[:_MOST_WORDS])
        return None

    @staticmethod
    def _is_foreign(line: Line) -> bool:
        """Whoever has CAP_AUDIT_WRITE can write such messages; the kernel says who did."""
        profile = text(line.fields.get("subj"))
        return line.fields.get("uid") != "0" or profile not in ("", _LIBVIRT)

    @staticmethod
    def _change(
        type: Literal["libvirt.control", "libvirt.resource", "libvirt.unasked"],
        event: Event,
        line: Line,
        uuid: str,
        extra: dict[str, Any],
        asked: tuple[str, ...] | None,
        reason: str = "",
    ) -> Change:
        failed = bool(reason) or line.said.get("res") != "success"
        known = {
            "at": rfc3339(event.time / 1000),
            "serial": event.serial,
            "uid": number(line.fields.get("uid")),
            "pid": number(line.fields.get("pid")),
            "profile": text(line.fields.get("subj")),
            **extra,
        }
        entry = Entry(
            type=type,
            actor=Actor(id="libvirtd") if not reason else Actor(id=f"uid {known['uid']}"),
            object=Object(kind="machine", id=uuid, name=_BEHIND_NAME.sub("", text(line.said.get("vm")))[:63]),
            outcome="failure" if failed else "success",
            reason=reason,
            extra={name: value for name, value in known.items() if value not in (None, "", [])},
        )
        return Change(entry, event.time, asked)
