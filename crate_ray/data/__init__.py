"""From shards to batches: storage format, preparation, order, reading and decoding."""
