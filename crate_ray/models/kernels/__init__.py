"""Fast implementations of the models' functions, by device. Each is tested against `models.reference`."""
