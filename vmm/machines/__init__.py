"""Machines: what they are made of, where they may run, and their life from create to delete."""
