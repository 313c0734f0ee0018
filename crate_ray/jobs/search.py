"""`crate-ray search`: the images of an embedded dataset that are most similar to an image.

Modules that take seconds to import are imported after the settings have been checked.
"""

from __future__ import annotations

from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config.search import SearchConfig


def main(config: SearchConfig) -> None:
    """Find the neighbours, draw them, and print them as a table."""
    from rich.table import Table

    from crate_ray.evaluation.search import label_text, search
    from crate_ray.progress import console

    found = search(config)
    table = Table("rank", "similarity", "key", "name", "label", "sample", box=None)
    for rank, row in enumerate(found.neighbours, 1):
        cells = (f"{row.similarity:.4f}", row.key, row.name or "", label_text(row, found.classes), str(row.sample))
        table.add_row(str(rank), *cells)
    console().print(table)
    if config.picture:
        print(f"picture    {config.picture}")


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(SearchConfig, main)
