"""Takes releases: what may be installed, getting it, writing the other slot, judging the boot into it."""
