"""Fast forms of the model's functions, by device; each is tested against the plain form."""
