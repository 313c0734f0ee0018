"""Training on Ray Train: the driver, its workers, and their messages. Nothing else in training/ imports Ray."""
