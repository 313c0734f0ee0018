"""python jobs/register.py: the same as `crate-ray register`."""

from crate_ray.jobs.register import run

if __name__ == "__main__":
    run()
