"""Sweeps: search spaces, trials, reports; on Ray Tune."""
