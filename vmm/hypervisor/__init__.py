"""Runs machines: the domain template and the only code that talks to libvirt."""
