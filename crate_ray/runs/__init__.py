"""The files of a run on storage: record, checkpoints, commits, retention and export. Also model references."""
