"""Local folders and S3 behind one interface, leases, and folders on a node's own disk."""
