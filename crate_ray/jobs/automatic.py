"""`crate-ray pretrain --data PATH`: makes a dataset from the files at a path, chooses settings for it, and prints them.

This module gathers facts about the data and the machine. `crate_ray.config.automatic` chooses the settings.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import statistics
from dataclasses import dataclass
from math import ceil
from pathlib import PurePosixPath
from typing import Any

from crate_ray.config import PrepareConfig, PretrainConfig, S3Config
from crate_ray.config.automatic import GIB, Choice, DataFacts, MachineFacts, choose, held_out_count
from crate_ray.config.values import merge, validate
from crate_ray.errors import UserError
from crate_ray.storage.interface import Storage, open_storage

logger = logging.getLogger(__name__)

DATASETS_FOLDER = "datasets"
"""Folder for the datasets that this module makes, next to the runs."""

_MEASURED = 64
_SHORTEST_SIDE = 480 / 224
"""Larger images are packed with a shortest side of the model's image size times this.

This is enough for random crops of a fifth of the area."""
_UNKNOWN_GPU_BYTES = 16 * GIB
_VALIDATION_FOLDERS = ("validation", "val", "valid", "test")


@dataclass(frozen=True)
class PreparedData:
    """Datasets with manifests."""

    train: str
    validation: str | None
    origin: str
    """How the datasets were made, in words for the user."""


def complete(values: dict[str, Any], path: str) -> dict[str, Any]:
    """Complete the user's settings for a pretraining on the data at `path`.

    An existing run keeps the settings of its first start. Prints the choices and the reasons.

    Args:
        values: settings that the user gave, nested and not validated.
        path: folder or s3://bucket/prefix of images, .npy grids, tar shards, or a dataset with a manifest.

    Raises:
        UserError: there is nothing to train on, or `data.train` is given too.
    """
    given_data = values.get("data") or {}
    if given_data.get("train") is not None:
        raise UserError("data.train and --data are both given; give only one of them")
    s3 = validate(S3Config, values.get("s3") or {})
    source = open_storage(path, s3)
    name = str(values.get("name") or run_name(path))
    runs = open_storage(str(values.get("storage") or PretrainConfig.model_fields["storage"].default), s3)
    prepared = prepare_data(source, runs.under(DATASETS_FOLDER), values)
    facts = gather_data_facts(prepared, s3)
    choice = choose(facts, gather_machine_facts(), values)
    settings = _settings_of_run(runs.under(name)) or choice.settings
    for line in describe(prepared, facts, choice, resumes=settings is not choice.settings):
        print(line, flush=True)
    addresses = {"train": prepared.train, "validation": prepared.validation}
    settings = merge(settings, {"name": name, "data": {key: uri for key, uri in addresses.items() if uri}})
    return merge(settings, values)


def describe(prepared: PreparedData, facts: DataFacts, choice: Choice, *, resumes: bool) -> list[str]:
    """Lines for the user: what was chosen, and why."""
    held_out = f", {facts.num_held_out:,} held out for validation" if facts.num_held_out else ""
    noun = "images" if facts.kind == "image" else "grids"
    about = {"data": f"{facts.num_samples:,} {noun}{held_out}: {prepared.origin}", **choice.reasons}
    if resumes:
        about = {"data": about["data"], "settings": "those of the run, which exists already; options win over them"}
    return [f"{what:9} {text}" for what, text in about.items()]


def run_name(path: str) -> str:
    """Default name of a run: the name of its data's folder."""
    name = re.sub(r"[^\w.-]+", "-", PurePosixPath(os.path.abspath(path) if "://" not in path else path).name)  # noqa: PTH100
    return name.strip(".-") or str(PretrainConfig.model_fields["name"].default)


# --- Data -------------------------------------------------------------------------------------------------------------


def prepare_data(source: Storage, folder: Storage, values: dict[str, Any]) -> PreparedData:
    """Make datasets from the files of a folder. Nothing is written into that folder.

    A folder with a manifest is used as it is. Otherwise images and grids are packed, or tar shards are indexed, into a
    sub-folder of `folder`. Its name is a digest of the names, sizes and times of the files, so this happens only once.

    Raises:
        UserError: the folder holds nothing to train on.
    """
    from crate_ray.data.format.manifest import MANIFEST_NAME
    from crate_ray.data.prepare.folders import is_hidden

    train, validation = _split_folders(source)
    given = (values.get("data") or {}).get("validation")
    if train.exists(MANIFEST_NAME):
        has_manifest = validation is not None and validation.exists(MANIFEST_NAME)
        return PreparedData(
            train.uri, given or (validation.uri if validation and has_manifest else None), "as prepared"
        )
    files = [(i.key, i.size, i.etag) for i in source.survey()[0] if not is_hidden(i.key)]
    image_size = _image_size(values)
    key = hashlib.sha256(repr([files, image_size, bool(given)]).encode()).hexdigest()[:16]
    target = folder.under(f"{run_name(source.uri)}-{key}")
    if any(key.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".npy")) for key, _, _ in files):
        validation = None if given else validation
        return _packed(train, validation, target, image_size, split=not given and validation is None, given=given)
    return _indexed(train, validation, target, given)


def _packed(
    train: Storage, validation: Storage | None, target: Storage, image_size: int, *, split: bool, given: str | None
) -> PreparedData:
    """Pack a folder of images or grids. With `split`, some of them are held out."""
    from crate_ray.data.format.dataset import load_dataset
    from crate_ray.data.format.manifest import MANIFEST_NAME
    from crate_ray.data.prepare.packing import pack
    from crate_ray.data.prepare.sources import open_source
    from crate_ray.data.prepare.validation import PARTS, split_source

    parts = {"train": target.under("train")}
    if split or validation is not None:
        parts["validation"] = target.under("validation")
    side = ceil(image_size * _SHORTEST_SIDE / 16) * 16
    if not all(part.exists(MANIFEST_NAME) for part in parts.values()):
        source = open_source(train)
        grids = source.items[0].name.lower().endswith(".npy")
        sources = {"train": source}
        if validation is not None:
            sources["validation"] = open_source(validation)
        elif split and (count := held_out_count(len(source.items))):
            sources = dict(zip(PARTS, split_source(source, count, seed=0), strict=True))
        for name, samples in sources.items():
            if not parts[name].exists(MANIFEST_NAME):
                config = PrepareConfig(output=parts[name].uri, max_side=None if grids else side)
                pack(samples, parts[name], config)
    held_out = parts.get("validation")
    has_held_out = held_out is not None and held_out.exists(MANIFEST_NAME)
    kind = load_dataset(parts["train"]).manifest.kind
    return PreparedData(
        parts["train"].uri,
        given or (held_out.uri if held_out and has_held_out else None),
        f"packed into {target.uri}" + (f", larger ones with a shortest side of {side}" if kind == "image" else ""),
    )


def _indexed(train: Storage, validation: Storage | None, target: Storage, given: str | None) -> PreparedData:
    """Index tar shards without copying them."""
    from crate_ray.data.format.manifest import MANIFEST_NAME
    from crate_ray.data.prepare.indexing import index_existing
    from crate_ray.data.prepare.sources import list_shards

    uris: dict[str, str] = {}
    for name, source in {"train": train, **({"validation": validation} if validation else {})}.items():
        part = target.under(name)
        if not part.exists(MANIFEST_NAME):
            try:
                list_shards(source, "*.tar")
            except UserError:
                raise UserError(
                    f"{source.uri} holds no images (.jpg .jpeg .png .webp), .npy grids or .tar shards to train on"
                ) from None
            index_existing(part, shards=f"{source.uri}/*.tar")
        uris[name] = part.uri
    return PreparedData(
        uris["train"], given or uris.get("validation"), f"shards of {train.uri}, indexed in {target.uri}"
    )


def _split_folders(source: Storage) -> tuple[Storage, Storage | None]:
    """The folder, or its sub-folders `train` and `validation` (`val`, `valid`, `test`) if it holds nothing else."""
    from crate_ray.data.prepare.folders import is_by_program, is_hidden

    keys = (info.key for info in source.survey()[0])
    top = {key.split("/", 1)[0] for key in keys if not is_hidden(key) and not is_by_program(key)}
    held_out = [name for name in _VALIDATION_FOLDERS if name in top]
    if "train" in top and held_out and top <= {"train", *_VALIDATION_FOLDERS}:
        if len(held_out) > 1:
            logger.warning("%s: validates on %s; not used: %s", source.uri, held_out[0], ", ".join(held_out[1:]))
        return source.under("train"), source.under(held_out[0])
    return source, None


def _image_size(values: dict[str, Any]) -> int:
    """The longer side of the model's images if the user gave it, else 224."""
    given = str((values.get("model") or {}).get("image_size") or 224)
    return max([int(number) for number in re.findall(r"\d+", given)] or [224])


# --- Facts ------------------------------------------------------------------------------------------------------------


def gather_data_facts(prepared: PreparedData, s3: S3Config) -> DataFacts:
    """Number, kind and size of the samples. If sizes differ, the size is the median of some evenly spaced samples."""
    from crate_ray.data.format.dataset import load_dataset

    shards = load_dataset(open_storage(prepared.train, s3))
    manifest = shards.manifest
    height, width = manifest.height, manifest.width
    same_size = height is not None and width is not None
    if height is None or width is None:
        height, width = _median_size(shards)
    held_out = load_dataset(open_storage(prepared.validation, s3)) if prepared.validation else None
    return DataFacts(
        num_samples=manifest.num_samples,
        kind=manifest.kind,
        channels=manifest.channels,
        height=height,
        width=width,
        same_size=same_size,
        num_held_out=held_out.manifest.num_samples if held_out else 0,
    )


def _median_size(shards: Any) -> tuple[int, int]:
    from crate_ray.data.decode.errors import DecodeError
    from crate_ray.data.decode.samples import read_image_header
    from crate_ray.data.prepare.statistics import BadSample, grid_statistics
    from crate_ray.data.read.shard_reader import ShardReader

    manifest, reader = shards.manifest, ShardReader(shards)
    count = min(manifest.num_samples, _MEASURED)
    sizes: list[tuple[int, int]] = []
    for number in range(count):
        (sample,) = reader.read(number * manifest.num_samples // count, 1)
        content = next((sample.members[s] for s in manifest.image_suffixes if s in sample.members), None)
        if content is None:
            continue
        try:
            if manifest.kind == "grid":
                found = grid_statistics(bytes(content), moments=False).size
            else:
                found = read_image_header(content)[:2]
        except (DecodeError, BadSample):
            continue
        sizes.append((int(found[0]), int(found[1])))
    if not sizes:
        raise UserError(f"none of {count} samples of {shards.storage.uri} can be decoded")
    return tuple(int(statistics.median_low(column)) for column in zip(*sizes, strict=True))  # type: ignore[return-value]


def gather_machine_facts() -> MachineFacts:
    """Facts about the cluster that RAY_ADDRESS names, or else about this machine."""
    import psutil
    import torch

    devices = range(torch.cuda.device_count())
    gpu_bytes = min((torch.cuda.get_device_properties(device).total_memory for device in devices), default=0)
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        import ray

        from crate_ray.ray_cluster import cluster_nodes, start_ray

        start_ray()
        nodes = cluster_nodes()
        memory = [node["Resources"].get("memory") for node in ray.nodes() if node["Alive"]]
        gpus = sum(node.gpus for node in nodes)
        return MachineFacts(
            gpus=gpus,
            gpu_bytes=(gpu_bytes or _UNKNOWN_GPU_BYTES) if gpus else 0,
            cpus=sum(node.cpus for node in nodes),
            memory_bytes=int(min(filter(None, memory), default=4 * GIB)),
            nodes=max(1, sum(node.cpus >= 1 for node in nodes)),
        )
    return MachineFacts(
        gpus=len(devices),
        gpu_bytes=gpu_bytes,
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
    )


def _settings_of_run(run: Storage) -> dict[str, Any] | None:
    """Settings of an existing run, without name, storage and data addresses. None if there is no such run."""
    from crate_ray.runs.record import read_record

    record = read_record(run)
    if record is None or not isinstance(record.config, PretrainConfig):
        return None
    groups = {"model", "data", "training", "optim", "scaling", "checkpoint", "tracking"}
    settings = record.config.model_dump(mode="json", include=groups)
    for name in ("train", "validation"):
        settings["data"].pop(name)
    return settings
