"""The guard: applies rules to the audit trail, and acts through core on what they point out."""
