"""The management API: TLS, HTTP and sessions in front of core; it parses and decides nothing."""
