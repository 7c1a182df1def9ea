"""The confined converter: one untrusted image into one raw file, then the process ends.

Its unit (holdfast-import@.service) takes away the network, all files but the two it is handed, and any share of memory
and time beyond the needful. Standard input is the connection from core.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

from vmm.errors import UserError
from vmm.process import CommandFailed, run
from vmm.volumes import qcow2
from vmm.volumes.qcow2 import ImageRefused
from vmm.volumes.types import Format, ImportRequest, ImportResult
from vmm.wire import problem_of

_MAX_LINE = 4096
_INFO_TIMEOUT_S, _CHECK_TIMEOUT_S = 60.0, 600.0
# qemu-img(1): 0 without errors; 3 when only space in the image is wasted.
_SOUND = (0, 3)


def convert(source: int, target: int, request: ImportRequest) -> int:
    """Check the image behind ``source`` and write its disk into ``target``, which reads as zeros.

    Returns: the size of the image's disk in bytes. Raises: ImageRefused.
    """
    size = _checked_size(source, request.format)
    if size > request.size:
        raise ImageRefused(f"the image's disk has {size} bytes, more than the {request.size} allowed")
    command = [
        "qemu-img",
        "convert",
        "-f",
        request.format,
        "-O",
        "raw",
        "-n",
        "--target-is-zero",
        "-S",
        "4k",
        "-m",
        "4",
    ]
    try:
        run([*command, _path(source), _path(target)], pass_fds=(source, target))
    except CommandFailed as error:
        raise ImageRefused(f"the image cannot be read: {_last_line(error.output)}") from None
    return size


def _checked_size(source: int, format: Format) -> int:
    """The image's size once it is known to stand for itself alone."""
    if format == "raw":
        # No byte of a raw image means anything; there is nothing to look at.
        return os.fstat(source).st_size
    size = qcow2.virtual_size(source)
    try:
        described = run(
            ["qemu-img", "info", "-f", format, "--output=json", _path(source)],
            pass_fds=(source,),
            timeout=_INFO_TIMEOUT_S,
        )
    except CommandFailed as error:
        raise ImageRefused(f"the image cannot be read: {_last_line(error.output)}") from None
    _check_description(msgspec.json.decode(described.stdout), size)
    # What lies beyond a truncated file's end would be read as zeros without a word.
    checked = run(
        ["qemu-img", "check", "-q", "-f", format, _path(source)],
        check=False,
        pass_fds=(source,),
        timeout=_CHECK_TIMEOUT_S,
    )
    if checked.returncode not in _SOUND:
        raise ImageRefused(
            "the image is damaged or incomplete", hint="Compare its length with the original; try qemu-img check on it."
        )
    return size


class _Specific(msgspec.Struct, frozen=True):
    data: dict[str, object] = {}


class _Info(msgspec.Struct, frozen=True, rename="kebab"):
    """The part of `qemu-img info --output=json` that is looked at."""

    format: str
    virtual_size: int
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    encrypted: bool = False
    snapshots: list[object] = []
    format_specific: _Specific = _Specific()


def _check_description(description: object, size: int) -> None:
    """Compare QEMU's reading of the header with ours. Raises: ImageRefused."""
    info = msgspec.convert(description, _Info)
    specific = info.format_specific.data
    checks = (
        (info.format == "qcow2", "the image is not in the format qcow2"),
        (info.virtual_size == size, "the image's size is ambiguous"),
        (info.backing_filename is None and info.full_backing_filename is None, "the image has a backing file"),
        ("data-file" not in specific and not specific.get("data-file-raw"), "the image has an external data file"),
        (not info.encrypted and "encrypt" not in specific, "the image is encrypted"),
        (not info.snapshots, "the image contains snapshots"),
        (not specific.get("corrupt"), "the image is marked as corrupt"),
    )
    for fine, message in checks:
        if not fine:
            raise ImageRefused(message)


def _path(descriptor: int) -> Path:
    """A name under which qemu-img can open a file that it was handed."""
    return Path(f"/proc/self/fd/{descriptor}")


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["qemu-img gave no reason"])[-1]


def main() -> int:
    """Serve the one request on standard input. Returns: the exit code."""
    with socket.socket(fileno=os.dup(0)) as connection:
        line, descriptors, _, _ = socket.recv_fds(connection, _MAX_LINE, 2)
        try:
            source, target = descriptors
            result = ImportResult(virtual_size=convert(source, target, msgspec.json.decode(line, type=ImportRequest)))
        except UserError as error:
            result = ImportResult(refused=msgspec.to_builtins(problem_of(error)))
        connection.sendall(msgspec.json.encode(result) + b"\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
