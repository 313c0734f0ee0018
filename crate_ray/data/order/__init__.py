"""Which sample goes where: pure functions of seed, epoch and position."""
