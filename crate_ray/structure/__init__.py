"""What CRATE claims of its layers, measured on any model: coding rates and sparsity, layer by layer."""
