"""Training: one step, the optimiser and its schedule, checkpoints, the Ray Train loop, and what the driver does."""
