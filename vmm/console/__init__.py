"""The status screen on the host's own terminals: it shows, and takes no input."""
