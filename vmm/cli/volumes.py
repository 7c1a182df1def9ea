"""`holdfast volume`: the disks of virtual machines."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from vmm.cli.client import Api, decoded, segment
from vmm.cli.command import Commands, add, group, remotely
from vmm.cli.output import human_size, parse_size, print_fields, print_json, print_table

_QCOW2_MAGIC = b"QFI\xfb"


class Volume(msgspec.Struct, frozen=True):
    """What the tables show of a volume; newer hosts may send more."""

    name: str
    uuid: str
    size: int
    allocated: int = 0
    state: str = ""
    machine: str | None = None
    created: str = ""


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    verbs = group(commands, "volume", "manage the disks of virtual machines")
    parser = add(verbs, "create", "make an empty volume", remotely(_create))
    parser.add_argument("name")
    parser.add_argument("--size", required=True, help="as 10G")
    add(verbs, "list", "list the volumes", remotely(_list))
    add(verbs, "show", "show a volume", remotely(_show)).add_argument("name")
    parser = add(verbs, "upload", "make a volume from a disk image", remotely(_upload))
    parser.add_argument("file", type=Path, help="the image")
    parser.add_argument("name", help="the new volume")
    parser.add_argument(
        "--format", choices=("raw", "qcow2"), help="of the image (default: qcow2 if it starts like one, else raw)"
    )
    parser.add_argument("--size", help="make the volume larger than the image, as 20G")
    add(verbs, "delete", "delete a volume that no machine has", remotely(_delete)).add_argument("name")


async def _create(api: Api, args: argparse.Namespace) -> None:
    _print(await api.request("POST", "/v1/volumes", body={"name": args.name, "size": parse_size(args.size)}), args)


async def _list(api: Api, args: argparse.Namespace) -> None:
    raw, volumes = await api.get("/v1/volumes", tuple[Volume, ...])
    if args.json:
        print_json(raw)
        return
    print_table(
        ("NAME", "SIZE", "ALLOCATED", "STATE", "MACHINE"),
        [(v.name, human_size(v.size), human_size(v.allocated), v.state, v.machine or "-") for v in volumes],
    )


async def _show(api: Api, args: argparse.Namespace) -> None:
    _print(await api.request("GET", f"/v1/volumes/{segment(args.name)}"), args)


async def _upload(api: Api, args: argparse.Namespace) -> None:
    path: Path = args.file
    with path.open("rb") as file:
        image_format = args.format
        if image_format is None:
            image_format = "qcow2" if file.read(len(_QCOW2_MAGIC)) == _QCOW2_MAGIC else "raw"
            file.seek(0)
        query: dict[str, str | int] = {"format": image_format}
        if args.size:
            query["size"] = parse_size(args.size)
        _print(await api.upload(f"/v1/volumes/{segment(args.name)}/content", file, query), args)


async def _delete(api: Api, args: argparse.Namespace) -> None:
    await api.request("DELETE", f"/v1/volumes/{segment(args.name)}")
    if not args.json:
        print(f"deleted {args.name}")


def _print(raw: bytes, args: argparse.Namespace) -> None:
    if args.json:
        print_json(raw)
        return
    volume = decoded(raw, Volume)
    print_fields(
        [
            ("Name", volume.name),
            ("UUID", volume.uuid),
            ("Size", human_size(volume.size)),
            ("Allocated", human_size(volume.allocated)),
            ("State", volume.state or "-"),
            ("Machine", volume.machine or "none"),
            ("Created", volume.created or "-"),
        ]
    )
