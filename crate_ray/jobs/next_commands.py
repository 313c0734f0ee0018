"""The commands that follow a training run."""

from __future__ import annotations

import shlex

from crate_ray.config import FinetuneConfig, PretrainConfig
from crate_ray.runs.mlflow_lookup import redact, tracking_uri


def next_commands(config: PretrainConfig | FinetuneConfig) -> list[str]:
    """Shell commands that evaluate a trained model (pretraining only), register it, and show the run in MLflow."""
    run = f"{config.storage.rstrip('/')}/{config.name}"
    uri = tracking_uri(config.tracking)
    tracked = ["--tracking.uri", redact(uri)] if config.tracking.uri else []
    endpoint = ["--s3.endpoint_url", redact(config.s3.endpoint_url)] if config.s3.endpoint_url else []
    commands = []
    if isinstance(config, PretrainConfig) and config.data.validation:
        commands.append(
            ["crate-ray", "evaluate", "--model", run, "--data", config.data.validation, *tracked, *endpoint]
        )
    commands.append(["crate-ray", "register", "--run", run, *tracked, *endpoint])
    if uri.startswith("sqlite:"):
        commands.append(["mlflow", "ui", "--backend-store-uri", uri])
    return [shlex.join(command) for command in commands]
