"""Pack images or .npy grids into WebDataset shards with a manifest and an index, or index shards that are there.

Modules that take seconds to import are imported after the settings are read.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, NoReturn

from crate_ray.cli import command, run_job
from crate_ray.config import PrepareConfig
from crate_ray.errors import UserError

if TYPE_CHECKING:
    from crate_ray.data.prepare.sources import Source


def main(config: PrepareConfig) -> None:
    """Write the dataset and say what was written and what to do next."""
    from crate_ray.data.prepare.indexing import index_existing
    from crate_ray.data.prepare.packing import pack
    from crate_ray.storage.interface import open_storage

    output = open_storage(config.output, config.s3)
    if config.source is None:
        if config.max_side is not None:
            raise UserError("max_side encodes images anew while they are packed; name them with --source")
        manifest = index_existing(
            output, shards=config.shards, overwrite=config.overwrite, lease_seconds=config.lease_seconds
        )
    else:
        manifest = pack(find_source(config, output.uri), output, config)
    size = "varying size" if manifest.height is None else f"{manifest.height}×{manifest.width}"
    classes = f", {manifest.num_classes} classes" if manifest.num_classes else ""
    shards = "1 shard" if manifest.num_shards == 1 else f"{manifest.num_shards:,} shards"
    print(
        f"{output.uri}: {manifest.num_samples:,} {manifest.kind}s in {shards} ({manifest.total_bytes:,} bytes), "
        f"{manifest.channels} × {size}{classes}"
    )
    endpoint = f" --s3.endpoint-url {shlex.quote(config.s3.endpoint_url)}" if config.s3.endpoint_url else ""
    print(f"next: {command('pretrain')} --data {shlex.quote(output.uri)}{endpoint}")


def find_source(config: PrepareConfig, output_uri: str) -> Source:
    """The built-in dataset or the folder that config.source names."""
    from crate_ray.data.prepare.builtin import digits_source, shapes_source
    from crate_ray.data.prepare.sources import is_address, open_source
    from crate_ray.storage.interface import open_storage

    assert config.source is not None
    if config.source == "digits":
        return digits_source(config.split)
    if config.source == "shapes":
        return shapes_source(config.split, config.num_samples, config.image_size, config.seed)
    if config.split != "all":
        raise UserError(
            f"split {config.split!r} is for the built-in sets 'digits' and 'shapes'; pack folders one by one"
        )
    if is_address(config.shards):
        raise UserError(f"shards is the address {config.shards}; with a source, give the shards' names within it")
    storage = open_storage(config.source, config.s3)
    if storage.uri == output_uri:
        raise UserError(f"source and output are both {output_uri}; write the new dataset somewhere else")
    return open_source(storage, config.shards)


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(PrepareConfig, main)
