"""From shards to batches: their format, how they are prepared, in which order, read and decoded."""
