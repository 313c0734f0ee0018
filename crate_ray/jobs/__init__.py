"""The mains of all jobs: `crate-ray NAME` and `python jobs/NAME.py` both run them."""
