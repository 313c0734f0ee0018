"""Checks and measurements on a real GPU, on a machine with nothing but torch: `python -m tests.gpu.check`."""
