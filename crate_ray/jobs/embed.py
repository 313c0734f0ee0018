"""`crate-ray embed`: embeddings of a dataset as files.

Modules that take seconds to import are imported after the settings have been checked.
"""

from __future__ import annotations

from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config import EmbedConfig


def main(config: EmbedConfig) -> None:
    """Load the model, embed the dataset, and print what was written."""
    from crate_ray.evaluation.embedding import embed_dataset
    from crate_ray.runs.references import load, pinned

    model, description = load(config.model, config.tracking, config.s3)
    reference = pinned(config.model, description.step, config.tracking, config.s3)
    record = embed_dataset(config, model, description, reference)
    numbers = " × ".join(map(str, record.shape))
    kind = "Parquet" if record.format == "parquet" else "tar shards of .npy arrays"
    print(f"{config.output}: {record.num_rows:,} embeddings of {numbers} numbers, {kind}")
    if record.skipped:
        causes = ", ".join(f"{count:,} {cause}" for cause, count in record.skipped.items())
        print(f"skipped    {sum(record.skipped.values()):,} bad samples ({causes}); listed in _embeddings.json")


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(EmbedConfig, main)
