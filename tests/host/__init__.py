"""Tests on the booted release image."""
