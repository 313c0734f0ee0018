"""From shards to encoded samples: ranged reads, windows within a byte budget, one sample reader."""
