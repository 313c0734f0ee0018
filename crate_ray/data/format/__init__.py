"""The stored format: tar shards, the manifest, the index, .npy arrays."""
