"""Decoding of bytes to images and grids, with one module per library."""
