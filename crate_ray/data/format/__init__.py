"""What lies on storage: tar shards, the manifest, the index, .npy arrays."""
