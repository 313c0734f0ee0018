"""The Ray that a job runs on: an existing cluster, or a Ray of this machine alone."""

from __future__ import annotations

import logging
import os

import ray

from crate_ray.errors import UserError
from crate_ray.quiet import quiet_driver
from crate_ray.storage.arrow import ARROW_ENV

SETUP_HOOK = "crate_ray.quiet.set_up_ray_process"
"""What every process runs that Ray starts for a job."""


def start_ray(*, dashboard: bool = False) -> None:
    """Connect to the cluster of RAY_ADDRESS, or to one that runs on this machine, else start Ray on this machine alone.

    A Ray that is started here has a dashboard only if `dashboard` asks for it: that takes ten processes and 900 MB.

    Raises UserError when RAY_ADDRESS is set but no cluster answers there, or when the cluster refuses the token.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in ARROW_ENV.items()})
    quiet_driver()
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS is {address}, which is for submitting: ray job submit --working-dir . -- python jobs/…; "
            "to run the job here on a Ray of its own, set RAY_ADDRESS=local"
        )
    runtime_env = {"env_vars": ARROW_ENV, "worker_process_setup_hook": SETUP_HOOK}
    try:
        ray.init(include_dashboard=dashboard, runtime_env=runtime_env, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray"
        raise UserError(f"cannot use {where}: {str(error).splitlines()[0]}") from error
