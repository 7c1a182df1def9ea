"""Decides what is allowed, has it audited, and does it: the only user of libvirt, behind a Unix socket."""
