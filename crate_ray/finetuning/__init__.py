"""Fine-tuning: augmentation, mixing, layer-wise decay, and the loop that trains a classifier on Ray Train."""
