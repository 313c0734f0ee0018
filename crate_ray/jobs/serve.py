"""`crate-ray serve`: a model over HTTP, on Ray Serve.

Modules that take seconds to import are imported after the settings have been checked.
"""

from __future__ import annotations

from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config import ServeConfig


def main(config: ServeConfig) -> None:
    """Serve the model until SIGTERM or Ctrl-C."""
    from crate_ray.server.run import serve_model

    serve_model(config)


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(ServeConfig, main)
