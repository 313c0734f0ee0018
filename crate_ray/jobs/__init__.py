"""The main function of every job, which `crate-ray NAME` and `python jobs/NAME.py` run."""
