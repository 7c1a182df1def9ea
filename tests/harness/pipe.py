"""``python3 -m tests.harness.pipe SOCKET``: joins standard input and output with a Unix socket.

QEMU's user network starts one for each connection that a host makes to the address of the repository.
"""

from __future__ import annotations

import os
import select
import socket
import sys

_MOST = 1 << 16


def main() -> None:
    """Copy both ways until either end is done."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        try:
            server.connect(sys.argv[1])
        except OSError:
            return  # A trace would go to the host, as if the repository had said it.
        while True:
            readable = select.select([0, server], [], [])[0]
            if 0 in readable:
                if not (data := os.read(0, _MOST)):
                    return
                server.sendall(data)
            if server in readable:
                if not (data := server.recv(_MOST)):
                    return
                while data:
                    data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()
