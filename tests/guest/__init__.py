"""Small test guests that boot inside a host: a Linux with a shell, and a bare UEFI probe."""
