"""The audit trail: takes records, chains them by hash, stores them durably and verifies them."""
