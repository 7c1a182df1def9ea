"""`python3 -m image.builder COMMAND`: what the Makefile calls.

`image` builds; `tools COMMAND …` runs anything inside the tools tree; `clean` deletes what was built.
"""

from __future__ import annotations

import argparse
import os
import sys

from image.builder import host
from image.builder.layout import Layout
from vmm.errors import main


def entry() -> int:
    """Go into the tools tree if we are not there yet, then do as told."""
    parser = argparse.ArgumentParser(prog="image.builder", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("image", help="build build/image/holdfast.raw and all that belongs to it")
    commands.add_parser("clean", help="delete all that was built, keys excepted")
    tools = commands.add_parser("tools", help="run a command inside the tools tree")
    tools.add_argument("words", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()

    layout = Layout.from_environment()
    if os.environ.get("HOLDFAST_TOOLS") != "1":
        host.become_root()
        if arguments.command == "clean":
            host.clean(layout)
            return 0
        host.make_tools(layout)
        words = arguments.words if arguments.command == "tools" else ["python3", "-m", "image.builder", *sys.argv[1:]]
        command = host.inside_tools(layout, ["env", "HOLDFAST_TOOLS=1", *words])
        os.execvp(command[0], [os.fspath(word) for word in command])
    from image.builder.assemble import build_image  # noqa: PLC0415 - needs what only the tools tree has

    build_image(layout)
    return 0


if __name__ == "__main__":
    main(entry)
