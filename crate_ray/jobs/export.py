"""`crate-ray export`: a model in a form that other tools load.

Modules that take seconds to import are imported after the settings have been checked.
"""

from __future__ import annotations

from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config.export import ExportConfig


def main(config: ExportConfig) -> None:
    """Export the model, and print what was written, what goes in and what comes out."""
    from crate_ray.exporting.checking import BATCH_SIZES
    from crate_ray.exporting.export import export

    exported = export(config)
    for name, size in exported.files.items():
        print(f"{config.output.rstrip('/')}/{name}  {size / 1e6:,.1f} MB")
    if exported.input:
        print(f"input   {exported.input}")
    for name, shape in exported.outputs.items():
        print(f"output  {name} (batch, {', '.join(map(str, shape))})")
    if exported.difference is not None:
        sizes = ", ".join(map(str, BATCH_SIZES))
        print(f"check   differs from the model by at most {exported.difference:.1e} (batches of {sizes})")


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(ExportConfig, main)
