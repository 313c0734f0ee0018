"""What a run is on storage: its record, checkpoints, commits, retention, export, and how models are referred to."""
