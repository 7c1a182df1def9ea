"""Reads the kernel's audit events, libvirt's among them, and hands them to the audit daemon as records."""
