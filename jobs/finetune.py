"""python jobs/finetune.py: the same as `crate-ray finetune`."""

from crate_ray.jobs.finetune import run

if __name__ == "__main__":
    run()
