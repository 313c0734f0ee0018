"""Measures of the paper's claims about layers, for any model: coding rates, sparsity, inversion, attention."""
