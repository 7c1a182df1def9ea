"""Holdfast's host software: one subpackage a responsibility, see docs/architecture.md."""

VERSION = "0.1.0"
"""The version used where no image states its own (os-release IMAGE_VERSION wins on the host)."""
