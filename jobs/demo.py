"""python jobs/demo.py: the same as `make demo` in an installed environment."""

from crate_ray.jobs.demo import run

if __name__ == "__main__":
    run()
