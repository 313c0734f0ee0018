"""GPU paths on an emulated CUDA device; see device.py."""
