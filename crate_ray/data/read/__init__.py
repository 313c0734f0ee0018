"""Reads encoded samples from shards: ranged reads, and windows within a byte budget."""
