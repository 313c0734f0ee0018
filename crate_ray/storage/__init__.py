"""Local folders and S3 behind one interface, leases in them, and everything kept on a node's own disk."""
