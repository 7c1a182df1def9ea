"""Boots the image in QEMU with firmware, TPM and networks of its own, drives it, and breaks it on purpose."""
