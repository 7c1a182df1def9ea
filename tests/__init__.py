"""Holdfast's tests and the harness that boots the image for them."""
