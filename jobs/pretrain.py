"""python jobs/pretrain.py: the same as `crate-ray pretrain`."""

from crate_ray.jobs.pretrain import run

if __name__ == "__main__":
    run()
