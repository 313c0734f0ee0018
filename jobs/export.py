"""python jobs/export.py: the same as `crate-ray export`."""

from crate_ray.jobs.export import run

if __name__ == "__main__":
    run()
