"""From images or existing shards to a dataset: packing, indexing, shrinking, built-in sets."""
