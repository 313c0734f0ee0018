"""What was learned: features of the frozen encoder and what is measured with them."""
