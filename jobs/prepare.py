"""python jobs/prepare.py: the same as `crate-ray prepare`."""

from crate_ray.jobs.prepare import run

if __name__ == "__main__":
    run()
