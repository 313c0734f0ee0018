"""python jobs/search.py: the same as `crate-ray search`."""

from crate_ray.jobs.search import run

if __name__ == "__main__":
    run()
