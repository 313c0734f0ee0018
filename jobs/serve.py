"""python jobs/serve.py: the same as `crate-ray serve`."""

from crate_ray.jobs.serve import run

if __name__ == "__main__":
    run()
