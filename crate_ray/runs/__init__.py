"""What a run is on storage: its record, its checkpoints and commits, retention, export, and references to models."""
