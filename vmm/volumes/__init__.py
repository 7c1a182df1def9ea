"""Volumes: raw disk files of machines, and the confined import of images that others made."""
