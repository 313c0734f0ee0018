"""The best trial as settings for crate-ray pretrain, and as a version of a registered model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from crate_ray.cli import parse_config
from crate_ray.config import PretrainConfig, SweepConfig
from crate_ray.config.yaml_text import dump_yaml
from crate_ray.errors import UserError
from crate_ray.runs.mlflow_lookup import login, tracking_uri
from crate_ray.runs.pretraining import open_run
from crate_ray.sweeps.axes import value_text
from crate_ray.sweeps.space import TRIALS_FOLDER, trial_config
from crate_ray.sweeps.trial import TrialRecord
from crate_ray.tracking.registry import register


def best_yaml(sweep: SweepConfig, shared: dict[str, Any], best: TrialRecord) -> str:
    """The best trial's complete pretraining settings, as a file for crate-ray pretrain --config.

    Raises:
        UserError: crate-ray pretrain could not start with this file.
    """
    config = trial_config(sweep, shared, best.values, f"{sweep.name}-best")
    settings = config.model_dump(mode="json") | {"storage": sweep.storage}
    value = value_text(best.objective)
    text = f"# Best of sweep {sweep.name}: {sweep.objective} {value} (trial {best.trial})\n{dump_yaml(settings)}"
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        path = Path(temporary) / "best.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            read = parse_config(PretrainConfig, ["--config", str(path)])
            # Under a name that no run has: a run of the name in the file may have begun with an earlier best.
            open_run(read.model_copy(update={"name": "check", "storage": config.storage}))
        except UserError as error:
            raise UserError(
                f"the settings of trial {best.trial}, the best of sweep {sweep.name!r}, cannot start a run: {error}"
            ) from None
    return text


def register_best(sweep: SweepConfig, best: TrialRecord, name: str) -> int:
    """Make the best trial's model a version of a registered model, unless it is one. Returns the version.

    Raises:
        UserError: as registry.register.
    """
    source = f"{sweep.storage.rstrip('/')}/{sweep.name}/{TRIALS_FOLDER}/trial-{best.trial}"
    client = MlflowClient(login(tracking_uri(sweep.tracking)))
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get("run") == source and version.tags.get("step") == str(best.step):
            return int(version.version)
    return int(register(source, name, sweep.tracking, sweep.s3).version)
