"""All that knows Ray Train: the driver, its workers, and what they tell each other."""
