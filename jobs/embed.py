"""python jobs/embed.py: the same as `crate-ray embed`."""

from crate_ray.jobs.embed import run

if __name__ == "__main__":
    run()
