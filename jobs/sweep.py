"""python jobs/sweep.py: the same as `crate-ray sweep`."""

from crate_ray.jobs.sweep import run

if __name__ == "__main__":
    run()
