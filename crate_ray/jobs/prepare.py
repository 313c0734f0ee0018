"""Pack images or .npy grids into WebDataset shards with a manifest and an index, or index existing shards.

Modules that take seconds to import are imported after the settings are read.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, NoReturn

from crate_ray.cli import command, run_job
from crate_ray.config import PrepareConfig
from crate_ray.errors import UserError

if TYPE_CHECKING:
    from crate_ray.data.format.manifest import Manifest
    from crate_ray.data.prepare.sources import Source


def main(config: PrepareConfig) -> None:
    """Write the dataset, then print what was written and the next command."""
    from crate_ray.data.prepare.indexing import index_existing
    from crate_ray.data.prepare.packing import pack
    from crate_ray.data.prepare.validation import PARTS, pack_split
    from crate_ray.storage.interface import open_storage
    from crate_ray.storage.node_folders import check_kept

    output = open_storage(config.output, config.s3)
    check_kept(output.uri, "output")
    if config.source is None:
        _refuse_without_source(config)
        manifest = index_existing(
            output,
            shards=config.shards,
            image=config.image,
            max_pixels=config.largest_image,
            grid_axes=config.grid_axes,
            overwrite=config.overwrite,
            lease_seconds=config.lease_seconds,
        )
        written = {"train": (output.uri, manifest)}
    elif config.validation is None:
        written = {"train": (output.uri, pack(find_source(config, output.uri), output, config))}
    else:
        manifests = pack_split(find_source(config, output.uri), output, config)
        written = {name: (output.under(name).uri, manifest) for name, manifest in zip(PARTS, manifests, strict=True)}
    for uri, manifest in written.values():
        print(f"{uri}: {_summary(manifest)}")
    flags = {"train": "--data", "validation": "--data.validation"}
    data = " ".join(f"{flags[name]} {shlex.quote(uri)}" for name, (uri, _) in written.items())
    endpoint = f" --s3.endpoint-url {shlex.quote(config.s3.endpoint_url)}" if config.s3.endpoint_url else ""
    print(f"next: {command('pretrain')} {data}{endpoint}")


def _summary(manifest: Manifest) -> str:
    size = "varying size" if manifest.height is None else f"{manifest.height}×{manifest.width}"
    classes = f", {manifest.num_classes} classes" if manifest.num_classes else ""
    samples = f"1 {manifest.kind}" if manifest.num_samples == 1 else f"{manifest.num_samples:,} {manifest.kind}s"
    shards = "1 shard" if manifest.num_shards == 1 else f"{manifest.num_shards:,} shards"
    return f"{samples} in {shards} ({manifest.total_bytes:,} bytes), {manifest.channels} × {size}{classes}"


def _refuse_without_source(config: PrepareConfig) -> None:
    """Raise UserError for settings that only packing has, if shards are indexed in place."""
    if config.max_side is not None:
        raise UserError("max_side re-encodes images while they are packed; give them with --source")
    if config.validation is not None:
        raise UserError(
            "validation splits samples while they are packed, but without --source shards are indexed in place; give "
            "the samples with --source"
        )


def find_source(config: PrepareConfig, output_uri: str) -> Source:
    """The built-in dataset or the folder that config.source names."""
    from crate_ray.data.prepare.builtin import digits_source, plain_shapes_source, shapes_source
    from crate_ray.data.prepare.sources import is_address, open_source
    from crate_ray.storage.interface import open_storage

    assert config.source is not None
    if config.validation is not None and config.split != "all":
        raise UserError(
            f"split {config.split!r} is already one side of a fixed split; leave out --validation, or use --split all"
        )
    if config.image is not None and config.source in ("digits", "shapes", "plain-shapes"):
        raise UserError(f"image chooses a member of each sample in shards; leave it out for {config.source!r}")
    if config.source == "digits":
        return digits_source(config.split)
    if config.source in ("shapes", "plain-shapes"):
        generate = shapes_source if config.source == "shapes" else plain_shapes_source
        return generate(config.split, config.num_samples, config.image_size, config.seed)
    if config.split != "all":
        raise UserError(
            f"split {config.split!r} is for the built-in sets 'digits', 'shapes' and 'plain-shapes'; to split your own "
            "samples, use --validation 0.1"
        )
    if is_address(config.shards):
        raise UserError(f"shards is the address {config.shards}; together with --source, give names within the source")
    storage = open_storage(config.source, config.s3)
    if storage.uri == output_uri:
        raise UserError(f"source and output are both {output_uri}; use another output")
    return open_source(storage, config.shards, config.image)


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(PrepareConfig, main)
