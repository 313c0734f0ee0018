"""Local folders and S3 behind one interface, and what rests on it: leases, node folders, arrow file systems."""
