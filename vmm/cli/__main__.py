"""`python3 -m vmm.cli` is the `holdfast` command."""

from vmm.cli.main import main

if __name__ == "__main__":
    main()
