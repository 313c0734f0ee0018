"""Hostile input: `make fuzz` searches for FUZZ_SECONDS, `make test` runs the same examples each time."""
