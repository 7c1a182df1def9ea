"""Keys and everything that is signed with them. Nothing else in the repository reads a private key."""
