"""The order of samples, as pure functions of seed, epoch and position."""
