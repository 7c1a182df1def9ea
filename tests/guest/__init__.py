"""The test guest that boots inside a host: a small Linux with a shell."""
