"""Evaluation: features of the frozen encoder, and measurements with them."""
