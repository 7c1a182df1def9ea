"""Sends the audit trail to the servers that the configuration names."""
