"""Turns mkosi.conf and image/ into a signed disk image; see docs/architecture.md, "The build"."""
