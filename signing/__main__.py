"""python3 -m signing: the holdfast-release command."""

from signing.cli import main

main()
