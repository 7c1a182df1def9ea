"""The types of records that are made of the kernel's audit events: what processes tried, and what libvirt did."""

from __future__ import annotations

from vmm.audit.registry import Event, Field, Serves, Unit
from vmm.audit.rows import ACTION

_KERNEL: tuple[Unit, ...] = ("holdfast-kernel",)

_POLICY = Serves("FDP_PPR_EXT.1", "Security policy violated")
_NETWORK = Serves("FDP_VNC_EXT.1", "Security policy violated")

_EVENT = {
    "at": Field("text", "when it happened, as the kernel says (UTC)"),
    "serial": Field("integer", "the kernel's number of it, in this boot"),
    "suppressed": Field("integer", "how many records of this kind were left out before this one"),
    "uid": Field("integer", "the process's uid"),
    "pid": Field("integer", "its id"),
    "profile": Field("text", "its AppArmor profile"),
}
_PROCESS = {
    **_EVENT,
    "program": Field("text", "the file that it runs"),
    "process": Field("text", "what it calls itself"),
}
_CALL = {
    **_PROCESS,
    "call": Field("text", "the system call"),
    "error": Field("text", "why it failed"),
}
_NETWORKED = Field("text", "the address, or the family and type of the socket, where it is about the network")
_LIBVIRT = {
    **_EVENT,
    "operation": Field("text", "what it did: start, stop, or the change of a resource"),
    "cause": Field("text", "why, as libvirt says"),
    "vm_pid": Field("integer", "the process id of the guest's QEMU"),
    "resources": Field("texts", "disks, networks, memory and so on, as libvirt names them"),
}

KERNEL_EVENTS = (
    Event(
        type="kernel.start",
        title="read kernel audit",
        meaning="The kernel's audit events are read and its rules locked from here on; or that could not be done.",
        producers=_KERNEL,
        fields={
            "rules": Field("integer", "how many rules say what the kernel records"),
            "again": Field("boolean", "whether events were read before in this boot; the kernel kept those in between"),
            "suppressed": _EVENT["suppressed"],
        },
        serves=(Serves("FAU_GEN.1", "Audit functions started"),),
    ),
    Event(
        type="kernel.stop",
        title="read no more kernel audit",
        meaning="The reader of the kernel's audit events ends in order.",
        producers=_KERNEL,
        serves=(Serves("FAU_GEN.1", "Audit functions stopped"),),
    ),
    Event(
        type="kernel.lost",
        title="kernel events lost",
        meaning="Events of the kernel's are not in this trail, or at most so many.",
        producers=_KERNEL,
        fields={
            "where": Field("text", "who lost them: kernel, reader, or audit, which took no records"),
            "count": Field("integer", "how many"),
            "suppressed": _EVENT["suppressed"],
        },
        serves=(Serves("FAU_STG_EXT.1", "Logging function failed (recorded when it starts again)"),),
    ),
    Event(
        type="kernel.config",
        title="change kernel audit",
        meaning="A process wanted to change rules or reader of the kernel's audit; success means that it did.",
        producers=_KERNEL,
        fields={**_PROCESS, "change": Field("text", "what it wanted, as the kernel says")},
    ),
    Event(
        type="kernel.denied",
        title="AppArmor denied",
        meaning="A confined process tried what its AppArmor profile does not allow.",
        producers=_KERNEL,
        object="machine",
        fields={
            **_PROCESS,
            "policy": Field("text", "the policy that was violated"),
            "operation": Field("text", "what it tried"),
            "path": Field("text", "on which file"),
            "denied": Field("text", "which kind of access, or which capability"),
            "peer": Field("text", "which other process's profile it was about"),
            "network_component": _NETWORKED,
            "denials": Field("integer", "how many denials the one system call met"),
        },
        serves=(_POLICY, _NETWORK),
    ),
    Event(
        type="kernel.packet",
        title="packet of a guest's process rejected",
        meaning="A process with a machine's uid sent a packet from the host itself.",
        producers=_KERNEL,
        object="machine",
        fields={
            "at": _EVENT["at"],
            "serial": _EVENT["serial"],
            "suppressed": _EVENT["suppressed"],
            "uid": _EVENT["uid"],
            "policy": Field("text", "the policy that was violated"),
            "network_component": _NETWORKED,
            "source": Field("text", "the address that it was sent from"),
            "protocol": Field("integer", "its IP protocol"),
        },
        serves=(_NETWORK,),
    ),
    Event(
        type="kernel.open",
        title="open refused",
        meaning="A process tried to open a file that it has no right to.",
        producers=_KERNEL,
        object="machine",
        fields={**_CALL, "path": Field("text", "the file; not from the root on if the process named it in a folder")},
        serves=(_POLICY,),
    ),
    Event(
        type="kernel.module",
        title="load or remove kernel module",
        meaning="A process loaded or removed a kernel module, or tried to.",
        producers=_KERNEL,
        object="machine",
        fields={**_CALL, "module": Field("text", "its name, where the kernel got to know it")},
    ),
    Event(
        type="kernel.exec",
        title="guest's process ran a program",
        meaning="A process with a machine's uid ran, or tried to run, something else than QEMU.",
        producers=_KERNEL,
        object="machine",
        fields={
            **_CALL,
            "path": Field("text", "the program"),
            "arguments": Field("texts", "the first arguments that it was given"),
        },
        serves=(_POLICY,),
    ),
    Event(
        type="kernel.identity",
        title="change of user",
        meaning="A process without the right to it tried to change its user or group, or a program became root.",
        producers=_KERNEL,
        object="machine",
        fields={
            **_CALL,
            "effective_uid": Field("integer", "the uid that counts for its rights"),
            "arguments": Field("texts", "the call's arguments, in hex"),
        },
        serves=(_POLICY,),
    ),
    Event(
        type="kernel.seccomp",
        title="system call filter",
        meaning="A process made a system call for which its filter ends it.",
        producers=_KERNEL,
        object="machine",
        fields={
            **_PROCESS,
            "policy": Field("text", "the policy that was violated"),
            "call": _CALL["call"],
            "signal": Field("integer", "the signal that it got"),
        },
        serves=(_POLICY,),
    ),
    Event(
        type="kernel.crash",
        title="process crashed",
        meaning="A process ended by a signal that means a fault of its own.",
        producers=_KERNEL,
        object="machine",
        fields={**_PROCESS, "signal": Field("integer", "the signal")},
    ),
    Event(
        type="kernel.time",
        title="set clock",
        meaning="A process set the clock or how fast it runs, or tried to; not the steering by time servers.",
        producers=_KERNEL,
        object="machine",
        fields={
            **_CALL,
            "seconds": Field("integer", "by how much the clock was set, with nanoseconds"),
            "nanoseconds": Field("integer", "the rest of it"),
            "changes": Field("texts", "what was changed of its steering"),
        },
        serves=(ACTION,),
    ),
    Event(
        type="libvirt.control",
        title="libvirt: start or end of guest",
        meaning="libvirt started or ended a guest, for the call whose request this has; or the guest ended by itself.",
        producers=_KERNEL,
        object="machine",
        fields=_LIBVIRT,
    ),
    Event(
        type="libvirt.resource",
        title="libvirt: change of guest",
        meaning="libvirt changed what a running guest has, for the call whose request this has.",
        producers=_KERNEL,
        object="machine",
        fields=_LIBVIRT,
    ),
    Event(
        type="libvirt.unasked",
        title="guest changed behind the service",
        meaning="libvirt did something to a guest for which no call of the service was under way; or something else "
        "claimed so in its name.",
        producers=_KERNEL,
        object="machine",
        fields=_LIBVIRT,
        serves=(ACTION,),
    ),
)
