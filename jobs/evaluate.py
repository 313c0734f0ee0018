"""python jobs/evaluate.py: the same as `crate-ray evaluate`."""

from crate_ray.jobs.evaluate import run

if __name__ == "__main__":
    run()
