"""From object storage to batches: storage, shards, order, reading, decoding."""
