"""Fair comparisons: several models, the same data, steps, seeds and trainer."""
