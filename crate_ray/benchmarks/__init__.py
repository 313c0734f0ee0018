"""Benchmarks of loading, order, training and overhead against alternatives. Each measurement is a separate process."""
