"""Embed a dataset: crate-ray embed --model models:/crate-mae@champion --data s3://data/mine --output s3://out

Modules that take seconds to import are imported after the settings are read.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config import EmbedConfig


def main(config: EmbedConfig) -> None:
    """Fetch the model, embed, and say where the files are."""
    from crate_ray.evaluation.embedding import claim_output, embed
    from crate_ray.ray_cluster import start_ray
    from crate_ray.runs.references import fetch

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fetch(config.model, folder, config.tracking, config.s3)
        record = claim_output(config, folder)
        if not record.complete:
            start_ray()
            embed(config, folder, record)
    print(f"{config.output}: {record.num_samples:,} embeddings of {record.dim} numbers, Parquet")


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(EmbedConfig, main)
