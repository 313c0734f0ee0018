"""The Ray that a job runs on: a cluster that is there, or one of this machine alone."""

from __future__ import annotations

import logging
import os

import ray

from crate_ray.errors import UserError
from crate_ray.storage.arrow import ARROW_ENV


def start_ray(*, dashboard: bool = False) -> None:
    """Connect to the cluster that RAY_ADDRESS or this machine knows, else start Ray on this machine alone.

    That one has Ray's dashboard only where it is asked for: ten processes, which take 900 MB, and time from training.

    Raises UserError when there is an address but no cluster answers, or it wants another token.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in ARROW_ENV.items()})
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS is {address}, which is for submitting: ray job submit --working-dir . -- python jobs/…; "
            "to run the job here on a Ray of its own, set RAY_ADDRESS=local"
        )
    try:
        ray.init(include_dashboard=dashboard, runtime_env={"env_vars": ARROW_ENV}, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray"
        raise UserError(f"cannot use {where}: {str(error).splitlines()[0]}") from error
