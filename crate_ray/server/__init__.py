"""A model over HTTP on Ray Serve, for `crate-ray serve`."""
