"""Training: a step, the optimizer, compilation, parallelism, guard, telemetry, the loop. Ray is in training/ray."""
