"""Training: a step, the optimiser, compilation, parallelism, guard, telemetry, the loop. Ray is in training/ray."""
