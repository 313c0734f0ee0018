"""A fine-tuning run before it trains: open it, and give it the encoder that it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from crate_ray.config import ClassifierConfig, CrateMAEConfig, FinetuneConfig, Kind, ViTMAEConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.manifest import Manifest
from crate_ray.errors import UserError
from crate_ray.finetuning.task import new_classifier
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import ModelDescription
from crate_ray.runs.checkpoint import (
    INITIAL_WEIGHTS,
    FinetuneStart,
    Parent,
    RunRecord,
    newest_complete,
    read_record,
    write_initial_weights,
    write_record,
)
from crate_ray.runs.planning import Run, plan_run, with_absolute_paths
from crate_ray.storage.interface import Storage, open_storage

SCRATCH = "scratch"

Load = Callable[[str], tuple[MaskedAutoencoder, ModelDescription]]
"""Gives the model behind a reference."""


class _Encoder(NamedTuple):
    """What a fine-tuning starts from."""

    config: CrateMAEConfig | ViTMAEConfig
    description: ModelDescription | None = None
    """Of the model that it comes from."""
    pretrained: MaskedAutoencoder | None = None
    """The model whose weights are taken."""


def open_finetuning(config: FinetuneConfig, load: Load) -> Run:
    """Check the settings against the data and, when the run exists, against its record; nothing is started yet.

    `load` gives the model behind a reference. It is looked up once, and the weights are stored beside the run: a start
    that is repeated finds what the first one stored, wherever an alias points by then. Where another driver could work
    on the run, call it with the run's lease (see planning.driver_lease). Raises UserError when the data is missing, has
    no labels or does not fit, or when the run was begun with other data or another model.
    """
    config = with_absolute_paths(config)
    train, classes = _labelled(config)
    classifier = ClassifierConfig(num_classes=classes, pooling=config.pooling, classes=train.classes)
    storage = open_storage(config.storage, config.s3).under(config.name)
    known = _begun(storage, config)
    if known is not None:
        assert known.finetune is not None
        start = known.finetune
        return plan_run(config, start.encoder, mean_std=(known.mean, known.std), finetune=start)
    encoder = _find_encoder(config, load)
    if encoder.description is not None and encoder.description.kind != train.kind:
        raise UserError(
            f"{config.model} takes {encoder.description.kind}s, and {config.data.train} holds {train.kind}s; give "
            "data of the kind that it was trained on"
        )
    check_augmentation(config, train.kind, encoder.config.channels)
    description = encoder.description
    parent = None
    if encoder.pretrained is not None and description is not None:
        parent = Parent(
            reference=config.model, run_key=description.run_key, dataset=description.dataset, step=description.step
        )
    run = plan_run(
        config,
        encoder.config,
        mean_std=(description.mean, description.std) if description else None,
        finetune=FinetuneStart(encoder=encoder.config, classifier=classifier, parent=parent),
    )
    return _with_weights(run, encoder)


def check_augmentation(config: FinetuneConfig, kind: Kind, channels: int) -> None:
    """Raise UserError for RandAugment of what is no picture."""
    if config.augment.randaugment and (kind == "grid" or channels not in (1, 3)):
        raise UserError(f"RandAugment is for images, and {config.data.train} holds grids; set augment.randaugment 0")


def _begun(storage: Storage, config: FinetuneConfig) -> RunRecord | None:
    """The record of a fine-tuning that can go on without the model that it started from."""
    record = read_record(storage)
    if record is None or record.finetune is None:
        return None
    needs = record.finetune.parent is not None
    stored = not needs or (record.initial_weights is not None and storage.exists(INITIAL_WEIGHTS))
    return record if newest_complete(storage) or (stored and record.config == config) else None


def _labelled(config: FinetuneConfig) -> tuple[Manifest, int]:
    """Manifest of the training data, and the number of classes. Raises UserError when there are no labels."""
    if not isinstance(config.data.train, str) and len(config.data.train) > 1:
        raise UserError(
            "data.train has several datasets, whose classes have numbers of their own; pack them into one with "
            "jobs/prepare.py"
        )
    train = config.data.train if isinstance(config.data.train, str) else next(iter(config.data.train))
    manifests = {}
    for uri in filter(None, (train, config.data.validation)):
        manifest = manifests[uri] = load_dataset(open_storage(uri, config.s3)).manifest
        if manifest.num_classes is None:
            raise UserError(
                f"not every sample of {uri} has a class (a member `cls` with its number); pack images in class "
                "folders, or shards with labels, with jobs/prepare.py"
            )
    found = manifests[train]
    assert found.num_classes is not None
    held_out = manifests.get(config.data.validation or "")
    if held_out is None:
        return found, len(found.classes or ()) or found.num_classes
    assert held_out.num_classes is not None
    if found.classes and held_out.classes and found.classes != held_out.classes:
        raise UserError(
            f"{config.data.validation} has other classes than {train}: {', '.join(held_out.classes[:5])}, … instead "
            f"of {', '.join(found.classes[:5])}, …; pack both with the same class folders"
        )
    classes = len(found.classes or ()) or found.num_classes
    if held_out.num_classes > classes:
        raise UserError(
            f"{config.data.validation} has {held_out.num_classes} classes, {train} has {classes}; number the classes "
            "alike in both"
        )
    return found, classes


def _find_encoder(config: FinetuneConfig, load: Load) -> _Encoder:
    if config.model == SCRATCH:
        return _Encoder(config.encoder)
    reference = config.model.removeprefix(f"{SCRATCH}:")
    model, description = load(reference)
    return _Encoder(description.model, description, model if reference == config.model else None)


def _with_weights(run: Run, encoder: _Encoder) -> Run:
    """The run, with the encoder's weights and a fresh head stored beside it; random ones need not be stored."""
    if encoder.pretrained is None:
        return run
    model = new_classifier(run.record, run.config.seed)
    model.load_encoder(encoder.pretrained.float())
    digest = write_initial_weights(run.storage, model.state_dict())
    record = run.record.model_copy(update={"initial_weights": digest})
    write_record(run.storage, record)
    return replace(run, record=record)
