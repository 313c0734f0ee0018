"""From images or foreign shards to a dataset: packing, indexing, shrinking, the built-in sets."""
