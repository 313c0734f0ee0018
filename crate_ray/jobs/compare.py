"""Train several models in the same way and measure them: crate-ray compare --config compare.yaml

Ray and MLflow are imported only if they are needed. A comparison with `--launcher none` runs without them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config import CompareConfig
from crate_ray.progress import console
from crate_ray.storage.interface import open_storage


def main(config: CompareConfig) -> None:
    """Train and measure the models of a comparison, and show and store the table and its figure."""
    from crate_ray.comparison.compare import Trainer, compare
    from crate_ray.comparison.table import write_report

    trainer: Trainer
    if config.launcher == "ray":
        from crate_ray.comparison.on_ray import OnRay

        trainer = OnRay(config)
    else:
        from crate_ray.comparison.alone import Alone

        trainer = Alone(config)
    out = console()
    found = compare(config, trainer, lambda what: out.print(what, style="bold"))
    folder = open_storage(config.storage, config.s3).under(config.name)
    files = write_report(folder, config, found)
    print(files["comparison.md"].decode())
    print(f"table      {folder.uri}/comparison.md")
    drawn = "comparison.png" in files
    print(f"figure     {folder.uri}/comparison.png" if drawn else "figure     not drawn: matplotlib is not installed")


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line (by default the program's own) and compare."""
    run_job(CompareConfig, main, sys.argv[1:] if arguments is None else arguments)
