"""python jobs/benchmark.py: the same as `crate-ray benchmark`."""

from crate_ray.jobs.benchmark import run

if __name__ == "__main__":
    run()
