"""Makes datasets from images or existing shards: packing, indexing, shrinking, built-in sets."""
