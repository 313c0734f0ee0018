"""What the paper claims of layers, measured on any model: coding rate, sparsity, attention."""
