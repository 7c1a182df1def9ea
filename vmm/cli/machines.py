"""`holdfast vm`: virtual machines."""

from __future__ import annotations

import argparse

import msgspec

from vmm.cli import terminal
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
    saved: _Saved | None = None


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
    add(verbs, "list", "list the virtual machines", remotely(_list))
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


async def _create(api: Api, args: argparse.Namespace) -> None:
    spec = {
        "name": args.name,
        "cpus": args.cpus,
        "memory": parse_size(args.memory),
        "disks": [{"volume": volume} for volume in args.disk],
        "networks": [{"network": network} for network in args.network],
        "description": args.description,
    }
    if args.host_stop is not None:
        spec["host_stop"] = args.host_stop
    if args.stop_timeout is not None:
        spec["stop_timeout"] = args.stop_timeout
    _print(await api.request("POST", "/v1/machines", body=spec), args)


async def _list(api: Api, args: argparse.Namespace) -> None:
    raw, machines = await api.get("/v1/machines", tuple[Machine, ...])
    if args.json:
        print_json(raw)
        return
    print_table(
        ("NAME", "STATE", "CPUS", "MEMORY", "NETWORKS", "UUID"),
        [
            (m.name, m.state, str(m.cpus), human_size(m.memory), ",".join(n.network for n in m.networks) or "-", m.uuid)
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
            ("Created", machine.created or "-"),
            ("Description", machine.description or "-"),
        ]
    )
