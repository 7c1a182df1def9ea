"""Power cuts while a host takes an update: what is on its disk afterwards, and whether it starts from it."""
