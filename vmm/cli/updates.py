"""`holdfast update` and `holdfast host`: releases, and the restart that they need."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tarfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from vmm.cli.client import Api, decoded
from vmm.cli.command import Commands, add, group, remotely
from vmm.cli.output import Progress, clean, confirm, human_size, print_fields, print_json, print_table
from vmm.config import devices, gpt
from vmm.errors import UserError

# Each look is a call, and so a record in the audit trail.
_POLL_S = 2.0
_BUSY = ("checking", "downloading", "writing", "verifying", "finishing")
_NONE = "-"
_STICK_TYPE = uuid.UUID(devices.UPDATE_PARTITION_TYPE)
_BUNDLE_HINT = "a bundle is made by `tar -C REPOSITORY -cf BUNDLE metadata targets`"


class Slot(msgspec.Struct, frozen=True):
    """What the tables show of one place of a system."""

    name: str
    version: str = ""
    state: str = ""
    tries: int | None = None


class Failed(msgspec.Struct, frozen=True):
    """A release that failed here."""

    version: str
    reason: str = ""
    time: str = ""


class Status(msgspec.Struct, frozen=True):
    """What is shown of the updater; newer hosts may send more."""

    running: str
    phase: str
    epoch: int = 0
    floor: int = 0
    floor_source: str = ""
    version: str = ""
    done: int = 0
    total: int = 0
    error: str = ""
    available: str = ""
    staged: str = ""
    installed: str = ""
    checked: str = ""
    slots: tuple[Slot, ...] = ()
    failed: tuple[Failed, ...] = ()
    keys: str = ""

    @property
    def is_busy(self) -> bool:
        """Whether a job runs."""
        return self.phase in _BUSY


class _Event(msgspec.Struct, frozen=True):
    time: str
    type: str
    outcome: str
    version: str = ""
    reason: str = ""


class _Stopped(msgspec.Struct, frozen=True):
    name: str
    how: str
    reason: str = ""


class _Leaving(msgspec.Struct, frozen=True):
    machines: tuple[_Stopped, ...] = ()


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    verbs = group(commands, "update", "bring the host to another release")
    parser = _job(verbs, "check", "look for a release", _check)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--source",
        choices=("bundle", "stick"),
        default="",
        help="look into the imported bundle, or import that on the stick in the host, instead of the repository",
    )
    source.add_argument("--bundle", action="store_const", dest="source", const="bundle", help="as --source bundle")
    parser.add_argument(
        "--override-expiry", action="store_true", help="accept metadata that has expired, for hosts without network"
    )
    parser = _job(verbs, "download", "download a release and unpack it; nothing is written to a slot yet", _download)
    parser.add_argument("version", nargs="?", help="(default: the newest that is offered)")
    parser.add_argument("--retry-failed", action="store_true", help="even if it failed on this host before")
    _job(verbs, "apply", "write what was downloaded into the other slot; guests run on", _apply)
    add(verbs, "cancel", "end the job that runs", remotely(_cancel))
    add(verbs, "status", "show releases and what the updater does", remotely(_status))
    add(verbs, "history", "list what was installed, and what became of it", remotely(_history))
    _job(verbs, "rollback", "have the older of the two releases start from the next restart on", _rollback)
    parser = add(verbs, "import", "hand a release to the host as a file", remotely(_import))
    parser.add_argument("file", type=Path, help="the bundle")
    parser = add(verbs, "stick", "make an image for a USB stick that hands a release to any host", _stick)
    parser.add_argument("bundle", type=Path, help="the bundle")
    parser.add_argument("out", type=Path, help="the new image")
    verbs = group(commands, "host", "restart the host, or switch it off")
    for name, help_text, action in (
        ("reboot", "stop all machines and restart the host; those that ran are started again", _reboot),
        ("shutdown", "stop all machines and switch the host off", _shutdown),
    ):
        parser = add(verbs, name, help_text, remotely(action))
        parser.add_argument("--yes", action="store_true", help="do not ask")


def _job(verbs: Commands, name: str, help_text: str, action: Any) -> argparse.ArgumentParser:
    parser = add(verbs, name, help_text, remotely(action))
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the job runs")
    return parser


async def _check(api: Api, args: argparse.Namespace) -> None:
    body = {"override_expiry": args.override_expiry, "source": args.source}
    status = await _run(api, args, "check", body)
    if status is not None:
        if status.available and status.available != status.running:
            print(f"release {status.available} is available; this host runs {status.running}")
        else:
            print(f"nothing newer than {status.running} is offered to this host")


async def _download(api: Api, args: argparse.Namespace) -> None:
    status = await _run(api, args, "download", {"version": args.version, "retry_failed": args.retry_failed})
    if status is not None:
        print(f"release {status.staged or status.version} is downloaded; `holdfast update apply` writes it")


async def _apply(api: Api, args: argparse.Namespace) -> None:
    status = await _run(api, args, "apply", None)
    if status is not None:
        print(f"release {status.installed or status.version} is written and starts when the host restarts")
        print("a restart is needed: `holdfast host reboot`", file=sys.stderr)


async def _run(api: Api, args: argparse.Namespace, job: str, body: Any) -> Status | None:
    """Begin a job and wait for its end; the last status, unless all is printed already. Raises: UserError."""
    raw = await api.request("POST", f"/v1/update/{job}", body=body)
    if not args.no_wait:
        raw = await _wait(api, raw)
    status = decoded(raw, Status)
    if args.json:
        print_json(raw)
    if status.error and not status.is_busy:
        raise UserError(f"{job}: {clean(status.error)}", hint="`holdfast update status` shows the host's releases")
    if args.json:
        return None
    if args.no_wait and status.is_busy:
        print(f"{job} runs; `holdfast update status` tells how far it is", file=sys.stderr)
        return None
    return status


async def _wait(api: Api, raw: bytes) -> bytes:
    """Follow a job to its end; the updater's last word."""
    shown: tuple[str, int] | None = None
    progress: Progress | None = None
    try:
        while (status := decoded(raw, Status)).is_busy:
            if status.total:
                if progress is None or shown != (status.phase, status.total):
                    if progress is not None:
                        progress.end()
                    shown = status.phase, status.total
                    progress = Progress(f"{status.phase} {status.version}".rstrip(), status.total)
                progress.update(status.done)
            await asyncio.sleep(_POLL_S)
            raw, _ = await api.get("/v1/update", Status)
    except asyncio.CancelledError:
        print("\nnot waiting any more: the job goes on (`holdfast update cancel` ends it)", file=sys.stderr)
        raise
    finally:
        if progress is not None:
            progress.end()
    return raw


async def _cancel(api: Api, args: argparse.Namespace) -> None:
    _print(await api.request("POST", "/v1/update/cancel"), args)


async def _status(api: Api, args: argparse.Namespace) -> None:
    _print(await api.request("GET", "/v1/update"), args)


async def _history(api: Api, args: argparse.Namespace) -> None:
    raw, events = await api.get("/v1/update/history", tuple[_Event, ...])
    if args.json:
        print_json(raw)
        return
    print_table(
        ("TIME", "WHAT", "RELEASE", "OUTCOME", "REASON"),
        [(e.time, e.type.removeprefix("update."), e.version or _NONE, e.outcome, e.reason or _NONE) for e in events],
    )


async def _rollback(api: Api, args: argparse.Namespace) -> None:
    status = await _run(api, args, "rollback", None)
    if status is not None:
        print("rolled back: from its next restart on the host runs the older release")


async def _import(api: Api, args: argparse.Namespace) -> None:
    path: Path = args.file
    with path.open("rb") as file:
        raw = await api.upload("/v1/update/bundle", file, {})
    _print(raw, args)
    if not args.json:
        print("imported; `holdfast update check --bundle` looks into it", file=sys.stderr)


def _stick(args: argparse.Namespace) -> None:
    path: Path = args.bundle
    with path.open("rb") as bundle:
        _check_bundle(path, bundle)
        size = bundle.seek(0, os.SEEK_END)
        partition = gpt.create(args.out, size, _STICK_TYPE, devices.UPDATE_PARTITION)
        gpt.copy_into_partition(args.out, partition, bundle)
    print(f"wrote {args.out}; copy it to a stick as it is", file=sys.stderr)


def _check_bundle(path: Path, bundle: BinaryIO) -> None:
    """Find out here, not at the host, what is no bundle; the host checks everything anew. Raises: UserError."""
    try:
        with tarfile.open(fileobj=bundle, mode="r:") as archive:
            names = {member.name.removeprefix("./") for member in archive}
            bundle.seek(archive.offset)
        if bundle.read(1024) != bytes(1024):
            raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a whole, uncompressed tar: {error}", hint=_BUNDLE_HINT) from None
    if "metadata/timestamp.json" not in names:
        raise UserError(f"{path}: it holds no metadata/timestamp.json", hint=_BUNDLE_HINT)


async def _reboot(api: Api, args: argparse.Namespace) -> None:
    await _leave(api, args, "reboot", "restarts")


async def _shutdown(api: Api, args: argparse.Namespace) -> None:
    await _leave(api, args, "shutdown", "is switched off")


async def _leave(api: Api, args: argparse.Namespace, how: str, what: str) -> None:
    question = f"{api.name} {what}, and all of its machines stop. Go on?"
    if not args.yes and sys.stdin.isatty() and not confirm(question):
        raise UserError("nothing was done")
    raw = await api.request("POST", f"/v1/host/{how}")
    if args.json:
        print_json(raw)
        return
    machines = decoded(raw, _Leaving).machines
    if machines:
        print_table(("MACHINE", "HOW", "REASON"), [(m.name, m.how, m.reason or _NONE) for m in machines])
    print(f"{api.name} {what}", file=sys.stderr)


def _print(raw: bytes, args: argparse.Namespace) -> None:
    if args.json:
        print_json(raw)
        return
    status = decoded(raw, Status)
    print_fields(
        [
            ("Running", status.running),
            ("Available", status.available or _NONE),
            ("Downloaded", status.staged or _NONE),
            ("Installed", f"{status.installed} (starts when the host restarts)" if status.installed else _NONE),
            ("Updater", _doing(status)),
            ("Last error", status.error or _NONE),
            ("Last check", status.checked or "never"),
            ("Epoch", f"{status.epoch}; lowest allowed {status.floor} ({status.floor_source or _NONE})"),
            *([("Key change", status.keys)] if status.keys else []),
        ]
    )
    _table(
        ("SLOT", "RELEASE", "STATE", "TRIES LEFT"),
        [(s.name, s.version or _NONE, s.state, _NONE if s.tries is None else str(s.tries)) for s in status.slots],
    )
    _table(("FAILED RELEASE", "TIME", "REASON"), [(f.version, f.time or _NONE, f.reason) for f in status.failed])


def _doing(status: Status) -> str:
    if not status.is_busy:
        return "idle"
    of = f", {human_size(status.done)} of {human_size(status.total)}" if status.total else ""
    return f"{status.phase} {status.version}".rstrip() + of


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        print()
        print_table(titles, rows)
