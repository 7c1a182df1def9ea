"""`holdfast vm`: virtual machines."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from vmm.cli import audit, terminal
from vmm.cli.client import Api, decoded, segment
from vmm.cli.command import Commands, add, group, remotely
from vmm.cli.output import human_size, parse_size, print_fields, print_json, print_table

_STOP_TIMEOUT_S = 60
_HOST_STOP_TIMEOUT_S = 120


class _Disk(msgspec.Struct, frozen=True):
    volume: str


class _Interface(msgspec.Struct, frozen=True):
    network: str


class _Saved(msgspec.Struct, frozen=True):
    state: str
    since: str = ""
    size: int = 0
    reason: str = ""


class _Pending(msgspec.Struct, frozen=True):
    cpus: int | None = None
    memory: int | None = None
    networks: tuple[_Interface, ...] | None = None


class _Traffic(msgspec.Struct, frozen=True):
    name: str
    read_bytes: int
    read_count: int
    written_bytes: int
    written_count: int


class _Held(msgspec.Struct, frozen=True):
    since: str = ""
    by: str = ""
    reason: str = ""


class Stats(msgspec.Struct, frozen=True):
    """What is shown of what a machine uses."""

    name: str
    state: str
    cpu_seconds: float
    memory: int
    disks: tuple[_Traffic, ...] = ()
    networks: tuple[_Traffic, ...] = ()


class Machine(msgspec.Struct, frozen=True):
    """What the tables show of a machine; newer hosts may send more."""

    name: str
    uuid: str
    state: str
    cpus: int
    memory: int
    disks: tuple[_Disk, ...] = ()
    networks: tuple[_Interface, ...] = ()
    description: str = ""
    created: str = ""
    stop_timeout: int = _HOST_STOP_TIMEOUT_S
    host_stop: str = "shut-down"
    tags: tuple[str, ...] = ()
    autostart: int | None = None
    on_crash: str = "stop"
    saved: _Saved | None = None
    pending: _Pending | None = None
    held: _Held | None = None


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    verbs = group(commands, "vm", "manage virtual machines")
    parser = add(verbs, "create", "define a virtual machine; it is not started", remotely(_create))
    parser.add_argument("name")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="virtual processors (default: 1)")
    parser.add_argument("--memory", default="512M", metavar="SIZE", help="as 512M or 4G (default: 512M)")
    parser.add_argument(
        "--disk", action="append", default=[], metavar="VOLUME", help="may be repeated; boots from the first"
    )
    parser.add_argument(
        "--network", action="append", default=[], metavar="NAME", help="operational network; may be repeated"
    )
    parser.add_argument("--description", default="", metavar="TEXT")
    parser.add_argument("--tag", action="append", default=[], metavar="TAG", help="may be repeated")
    _add_behaviour(parser)
    parser = add(verbs, "list", "list the virtual machines", remotely(_list))
    parser.add_argument("--tag", metavar="TAG", help="only those that have it")
    add(verbs, "show", "show a virtual machine", remotely(_show)).add_argument("name")
    add(verbs, "start", "start a virtual machine", remotely(_start)).add_argument("name")
    parser = add(verbs, "stop", "ask a virtual machine to shut down, and wait for it", remotely(_stop))
    parser.add_argument("name")
    parser.add_argument(
        "--force", action="store_true", help="switch it off at once, as by pulling the plug; a saved state is discarded"
    )
    parser.add_argument(
        "--timeout",
        type=int,
        default=_STOP_TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long to wait (default: {_STOP_TIMEOUT_S})",
    )
    for verb, help in (
        ("pause", "let a running virtual machine stand still, with all it has in memory"),
        ("resume", "let a paused virtual machine go on"),
        ("reset", "press a virtual machine's reset button: its system starts anew, unprepared"),
        ("release", "hold a virtual machine no more; it stays paused, or off, as it is"),
        ("suspend", "save what a virtual machine has in memory, and end it; its next start goes on from there"),
    ):
        parser = add(verbs, verb, help, remotely(_operate))
        parser.add_argument("name")
        parser.set_defaults(verb=verb)
    parser = add(verbs, "hold", "let a virtual machine stand still until it is released", remotely(_hold))
    parser.add_argument("name")
    parser.add_argument("--reason", required=True, metavar="TEXT")
    add(verbs, "stats", "show what a virtual machine has used since its start", remotely(_stats)).add_argument("name")
    parser = add(verbs, "events", "print audit records about a virtual machine as they come", remotely(audit.follow))
    parser.add_argument("machine", metavar="name")
    audit.add_machine_follow(parser)
    parser = add(verbs, "rename", "give a virtual machine another name, even while it runs", remotely(_rename))
    parser.add_argument("name")
    parser.add_argument("to", metavar="NEW-NAME")
    parser = add(verbs, "describe", "change a virtual machine's description or tags", remotely(_describe))
    parser.add_argument("name")
    parser.add_argument("--description", metavar="TEXT")
    tags = parser.add_mutually_exclusive_group()
    tags.add_argument("--tag", action="append", metavar="TAG", help="instead of those that it has; may be repeated")
    tags.add_argument("--no-tags", action="store_true")
    parser = add(
        verbs,
        "change",
        "change a virtual machine; processors, memory and networks of one that runs change with its next start",
        remotely(_change),
    )
    parser.add_argument("name")
    parser.add_argument("--cpus", type=int, metavar="N", help="virtual processors")
    parser.add_argument("--memory", metavar="SIZE", help="as 512M or 4G")
    networks = parser.add_mutually_exclusive_group()
    networks.add_argument("--network", action="append", metavar="NAME", help="instead of its own; may be repeated")
    networks.add_argument("--no-networks", action="store_true")
    _add_behaviour(parser).add_argument("--no-autostart", action="store_true", help="do not start it with the host")
    parser = add(
        verbs,
        "console",
        "connect to a virtual machine's serial console; Ctrl-] ends it",
        remotely(_console, banner=True),
    )
    parser.add_argument("name")
    parser.add_argument("--log-only", action="store_true", help="only print what the machine writes; send nothing")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="end after this time")
    add(verbs, "delete", "delete a stopped virtual machine; its volumes stay", remotely(_delete)).add_argument("name")


def _add_behaviour(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """The options for what a machine does by itself; returns the group of those on autostart."""
    parser.add_argument(
        "--host-stop",
        choices=("shut-down", "save"),
        help="when the host stops: press its power button, or save its memory and resume it after (default: shut-down)",
    )
    parser.add_argument(
        "--stop-timeout",
        type=int,
        metavar="SECONDS",
        help="when the host stops: time to be saved, before it is shut down; and to shut down, before it is switched "
        f"off (default: {_HOST_STOP_TIMEOUT_S})",
    )
    parser.add_argument(
        "--on-crash",
        choices=("stop", "restart"),
        help="when its QEMU dies or its system panics: leave it off, or start it again, at most three times within "
        "ten minutes (default: stop)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--autostart", type=int, metavar="ORDER", help="start it with the host, lower numbers first")
    return group


def _behaviour(args: argparse.Namespace) -> dict[str, Any]:
    named = ("host_stop", "stop_timeout", "on_crash", "autostart")
    return {name: getattr(args, name) for name in named if getattr(args, name) is not None}


async def _create(api: Api, args: argparse.Namespace) -> None:
    spec = {
        "name": args.name,
        "cpus": args.cpus,
        "memory": parse_size(args.memory),
        "disks": [{"volume": volume} for volume in args.disk],
        "networks": [{"network": network} for network in args.network],
        "description": args.description,
    }
    if args.tag:
        spec["tags"] = args.tag
    spec.update(_behaviour(args))
    _print(await api.request("POST", "/v1/machines", body=spec), args)


async def _list(api: Api, args: argparse.Namespace) -> None:
    raw, machines = await api.get("/v1/machines", tuple[Machine, ...])
    if args.tag is not None:
        # With all their fields, also those that are not known here.
        whole = msgspec.json.decode(raw)
        raw = msgspec.json.encode([one for one in whole if args.tag in one.get("tags", ())]) + b"\n"
        machines = tuple(machine for machine in machines if args.tag in machine.tags)
    if args.json:
        print_json(raw)
        return
    print_table(
        ("NAME", "STATE", "CPUS", "MEMORY", "NETWORKS", "UUID"),
        [
            (
                *(m.name, f"{m.state}, held" if m.held else m.state, str(m.cpus), human_size(m.memory)),
                *(",".join(n.network for n in m.networks) or "-", m.uuid),
            )
            for m in machines
        ],
    )


async def _show(api: Api, args: argparse.Namespace) -> None:
    _print(await api.request("GET", _path(args)), args)


async def _start(api: Api, args: argparse.Namespace) -> None:
    _print(await api.request("POST", f"{_path(args)}/start"), args)


async def _stop(api: Api, args: argparse.Namespace) -> None:
    if args.force:
        raw = await api.request("POST", f"{_path(args)}/force-off")
    else:
        raw = await api.request("POST", f"{_path(args)}/stop", query={"timeout": args.timeout})
    _print(raw, args)


async def _operate(api: Api, args: argparse.Namespace) -> None:
    _print(await api.request("POST", f"{_path(args)}/{args.verb}"), args)


async def _hold(api: Api, args: argparse.Namespace) -> None:
    _print(await api.request("POST", f"{_path(args)}/hold", body={"reason": args.reason}), args)


async def _stats(api: Api, args: argparse.Namespace) -> None:
    raw = await api.request("GET", f"{_path(args)}/stats")
    if args.json:
        print_json(raw)
        return
    stats = decoded(raw, Stats)
    print_fields(
        [
            ("Name", stats.name),
            ("State", stats.state),
            ("CPU time", f"{stats.cpu_seconds:.1f} s"),
            ("Memory of the host", human_size(stats.memory)),
            *((f"Disk {one.name}", _traffic(one, "read", "written")) for one in stats.disks),
            *((f"Network {one.name}", _traffic(one, "received", "sent")) for one in stats.networks),
        ]
    )


def _traffic(one: _Traffic, read: str, written: str) -> str:
    return f"{human_size(one.read_bytes)} {read}, {human_size(one.written_bytes)} {written}"


async def _rename(api: Api, args: argparse.Namespace) -> None:
    _print(await api.request("POST", f"{_path(args)}/rename", body={"to": args.to}), args)


async def _describe(api: Api, args: argparse.Namespace) -> None:
    body: dict[str, Any] = {}
    if args.description is not None:
        body["description"] = args.description
    if args.tag or args.no_tags:
        body["tags"] = args.tag or []
    _print(await api.request("POST", f"{_path(args)}/describe", body=body), args)


async def _change(api: Api, args: argparse.Namespace) -> None:
    body = _behaviour(args)
    if args.no_autostart:
        body["autostart"] = None
    if args.cpus is not None:
        body["cpus"] = args.cpus
    if args.memory is not None:
        body["memory"] = parse_size(args.memory)
    if args.network or args.no_networks:
        body["networks"] = [{"network": network} for network in args.network or []]
    _print(await api.request("POST", f"{_path(args)}/change", body=body), args)


async def _console(api: Api, args: argparse.Namespace) -> int:
    socket = await api.websocket(f"{_path(args)}/console")
    return await terminal.attach(socket, log_only=args.log_only, timeout=args.timeout)


async def _delete(api: Api, args: argparse.Namespace) -> None:
    await api.request("DELETE", _path(args))
    if not args.json:
        print(f"deleted {args.name}")


def _path(args: argparse.Namespace) -> str:
    return f"/v1/machines/{segment(args.name)}"


def _host_stop(machine: Machine) -> str:
    if machine.host_stop == "save":
        return f"saved within {machine.stop_timeout} s, or shut down; resumed after"
    return f"{machine.stop_timeout} s to shut down, started again after"


def _pending(pending: _Pending | None) -> str:
    if pending is None:
        return "nothing"
    cpus = f"{pending.cpus} processors" if pending.cpus is not None else ""
    memory = f"{human_size(pending.memory)} memory" if pending.memory is not None else ""
    networks = ""
    if pending.networks is not None:
        networks = "networks " + (", ".join(one.network for one in pending.networks) or "none")
    return ", ".join(filter(None, (cpus, memory, networks))) or "a change that this command does not know"


def _held(held: _Held | None) -> str:
    return "no" if held is None else f"since {held.since} by {held.by}: {held.reason}"


def _saved(saved: _Saved | None) -> str:
    if saved is None:
        return "none"
    size = f", {human_size(saved.size)}" if saved.size else ""
    return f"{saved.state}{size}, of {saved.since}" + (f": {saved.reason}" if saved.reason else "")


def _print(raw: bytes, args: argparse.Namespace) -> None:
    if args.json:
        print_json(raw)
        return
    machine = decoded(raw, Machine)
    print_fields(
        [
            ("Name", machine.name),
            ("UUID", machine.uuid),
            ("State", machine.state),
            ("CPUs", str(machine.cpus)),
            ("Memory", human_size(machine.memory)),
            ("Disks", ", ".join(disk.volume for disk in machine.disks) or "none"),
            ("Networks", ", ".join(interface.network for interface in machine.networks) or "none"),
            ("Host stops", _host_stop(machine)),
            ("Saved state", _saved(machine.saved)),
            ("Pending", _pending(machine.pending)),
            ("Held", _held(machine.held)),
            ("Autostart", "no" if machine.autostart is None else f"with the host, order {machine.autostart}"),
            ("On crash", machine.on_crash),
            ("Tags", ", ".join(machine.tags) or "none"),
            ("Created", machine.created or "-"),
            ("Description", machine.description or "-"),
        ]
    )
