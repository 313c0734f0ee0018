"""Pack a source as two datasets, one to train on and one held out: `prepare --validation 0.1`."""

from __future__ import annotations

import dataclasses

import numpy as np
import xxhash

from crate_ray.config import PrepareConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.manifest import MANIFEST_NAME, Manifest
from crate_ray.data.prepare.build import LEASE_NAME, Plan, build_dataset, refuse_existing, unfinished_error
from crate_ray.data.prepare.packing import plan_packing
from crate_ray.data.prepare.records import begin, digest_of, remove, unfinished_plan
from crate_ray.data.prepare.sources import Source
from crate_ray.errors import UserError
from crate_ray.storage.interface import Storage
from crate_ray.storage.lease import Lease

PARTS = ("train", "validation")
"""Names of the two datasets, which are sub-folders of the output."""


def split_source(source: Source, count: int, seed: int) -> tuple[Source, Source]:
    """Split into samples to train on and `count` held-out samples: those with the smallest hashes of name and seed.

    So the split does not depend on the order of the samples. If samples are added, few of the others change sides.
    """
    items = source.items
    names = (item.name.encode("utf-8", "surrogateescape") for item in items)
    hashes = np.array([xxhash.xxh3_64_intdigest(name, seed=seed % 2**64) for name in names], np.uint64)
    held_out = set(np.argsort(hashes, kind="stable")[:count].tolist())
    train = [item for number, item in enumerate(items) if number not in held_out]
    validation = [item for number, item in enumerate(items) if number in held_out]
    return dataclasses.replace(source, items=train), Source(validation, source.classes)


def pack_split(source: Source, output: Storage, config: PrepareConfig) -> tuple[Manifest, Manifest]:
    """Pack a source into `train` and `validation` under the output, or the rest of an interrupted packing.

    While the pair is unfinished, a file next to the two datasets holds the digest of both plans. If one of them has a
    manifest then, this part of the pair is finished.

    Returns:
        The manifests of train and validation.

    Raises:
        UserError: as `pack`, for either part; there are fewer than two samples; or the output itself is a dataset.
    """
    assert config.validation is not None
    total = len(source.items)
    if total < 2:
        raise UserError(f"{total} samples cannot be split; a validation set needs at least 2")
    count = min(max(round(config.validation * total), 1), total - 1)
    sources = split_source(source, count, config.seed)
    storages = [output.under(name) for name in PARTS]
    plans = [
        plan_packing(part, storage.uri, config, f"packing {name}")
        for part, storage, name in zip(sources, storages, PARTS, strict=True)
    ]
    digest = digest_of(["split", *(plan.digest for plan in plans)])
    with Lease(output, LEASE_NAME, f"the output {output.uri}", lease_seconds=config.lease_seconds) as lease:
        if unfinished_plan(output) != digest:
            _refuse(output, storages, plans, overwrite=config.overwrite)
            for storage in storages:
                storage.delete(MANIFEST_NAME)
            begin(output, digest)
        manifests = []
        for storage, plan in zip(storages, plans, strict=True):
            lease.check()
            if storage.exists(MANIFEST_NAME) and unfinished_plan(storage) is None:  # by an earlier run
                manifests.append(load_dataset(storage).manifest)
            else:
                manifests.append(build_dataset(storage, plan, overwrite=True, lease_seconds=config.lease_seconds))
        remove(output)
    train, validation = manifests
    return train, validation


def _refuse(output: Storage, storages: list[Storage], plans: list[Plan], *, overwrite: bool) -> None:
    """Raise a UserError if the two datasets would replace something, unless overwrite."""
    if output.exists(MANIFEST_NAME):
        raise UserError(
            f"{output.uri} is a dataset itself; a validation share writes {output.uri}/train and "
            f"{output.uri}/validation, so use another output"
        )
    if unfinished_plan(output) is not None and not overwrite:
        raise unfinished_error(output)
    for storage, plan in zip(storages, plans, strict=True):
        refuse_existing(storage, plan, overwrite=overwrite)
