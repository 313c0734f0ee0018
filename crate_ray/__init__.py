"""crate-ray: distributed self-supervised pretraining of white-box transformers, on Ray."""
