"""The one place that runs other programs. Argument lists only, never a shell string."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from vmm.errors import UserError

Argument = str | Path


class CommandFailed(UserError):
    """A program exited with an error; the message holds its last lines of output."""

    code = "command-failed"
    status = 500

    def __init__(self, command: Sequence[str], returncode: int, output: str) -> None:
        tail = "\n".join(output.strip().splitlines()[-15:])
        super().__init__(f"{command[0]} failed with exit code {returncode}" + (f":\n{tail}" if tail else ""))
        self.returncode = returncode
        self.output = output


def run(
    command: Sequence[Argument],
    *,
    check: bool = True,
    capture: bool = True,
    input: str | None = None,
    output: IO[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Arguments: ``env`` is added to the current environment; ``timeout`` is in seconds;
    ``capture`` keeps standard output and error from the terminal, for the result; ``output`` is
    a file that both go to instead.

    Raises: CommandFailed on a non-zero exit code if ``check``, or when the time is up;
    UserError if the program does not exist.
    """
    arguments = [os.fspath(a) for a in command]
    try:
        result = subprocess.run(
            arguments,
            check=False,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            stdout=output or (subprocess.PIPE if capture else None),
            stderr=subprocess.STDOUT if output else (subprocess.PIPE if capture else None),
            env={**os.environ, **env} if env is not None else None,
            cwd=cwd,
            timeout=timeout,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
        )
    except FileNotFoundError:
        raise UserError(f"the program {arguments[0]} is not installed") from None
    except subprocess.TimeoutExpired as expired:
        raise CommandFailed(arguments, -1, f"no end after {expired.timeout:.0f} s") from None
    if check and result.returncode != 0:
        raise CommandFailed(arguments, result.returncode, (result.stdout or "") + (result.stderr or ""))
    return result


def spawn(
    command: Sequence[Argument],
    *,
    output: IO[bytes] | int | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a program that lives on beside us (QEMU, swtpm); standard error joins ``output``.

    Raises: UserError if the program does not exist.
    """
    arguments = [os.fspath(a) for a in command]
    try:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env={**os.environ, **env} if env is not None else None,
            pass_fds=pass_fds,
        )
    except FileNotFoundError:
        raise UserError(f"the program {arguments[0]} is not installed") from None
