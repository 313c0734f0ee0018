"""What the paper claims about layers, measured on any model: coding rates, sparsity, inversion, attention."""
