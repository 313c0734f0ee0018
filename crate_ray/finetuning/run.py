"""Open a fine-tuning run: check it against its data and its record, and store the encoder that it starts from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from crate_ray.config import ClassifierConfig, CrateMAEConfig, FinetuneConfig, Kind, ViTMAEConfig
from crate_ray.data.format.classes import class_names, new_numbers
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.manifest import Manifest
from crate_ray.errors import UserError
from crate_ray.finetuning.task import new_classifier
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import ModelDescription
from crate_ray.models.resolution import at_image_size
from crate_ray.runs.commits import newest_complete
from crate_ray.runs.initial_weights import INITIAL_WEIGHTS, write_initial_weights
from crate_ray.runs.planning import Run, plan_run, with_absolute_paths
from crate_ray.runs.record import FinetuneStart, Parent, RunRecord, read_record, write_record
from crate_ray.runs.references import load_encoder
from crate_ray.storage.interface import Storage, open_storage

logger = logging.getLogger(__name__)

SCRATCH = "scratch"

Load = Callable[[str], tuple[MaskedAutoencoder, ModelDescription]]
"""Loads a masked autoencoder by reference."""


class _Encoder(NamedTuple):
    """The encoder that a fine-tuning starts from."""

    config: CrateMAEConfig | ViTMAEConfig
    description: ModelDescription | None = None
    """Description of its model; None for the encoder of the settings."""
    pretrained: MaskedAutoencoder | None = None
    """The model whose weights are used; None for random weights."""


def open_finetuning(config: FinetuneConfig, load: Load | None = None) -> Run:
    """Check the settings and, if the run exists, its record, and store the encoder's weights with the run.

    The model reference is resolved once. A repeated start uses the weights that the first start stored, even if an
    alias has moved since. If other drivers may work on the run, hold its lease (see planning.driver_lease).

    Args:
        config: the settings.
        load: loads the model by reference; by default references.load_encoder.

    Raises:
        UserError: the data is missing, has no labels or does not fit, or the run was started with other data or another
            model.
    """
    config = with_absolute_paths(config)
    train, names, classes = _labelled(config)
    known = _startable_record(open_storage(config.storage, config.s3).under(config.name), config)
    if known is not None:
        assert known.finetune is not None
        start = known.finetune
        return plan_run(config, start.encoder, mean_std=(known.mean, known.std), finetune=start)
    encoder = _load_encoder(config, load)
    description = encoder.description
    if description is not None and description.kind != train.kind:
        raise UserError(
            f"{config.model} takes {description.kind}s, and {config.data.train} holds {train.kind}s; give data of the "
            "kind that it was trained on"
        )
    check_augmentation(config, train.kind, encoder.config.channels)
    parent = None
    if encoder.pretrained is not None and description is not None:
        parent = Parent(
            reference=config.model, run_key=description.run_key, dataset=description.dataset, step=description.step
        )
    classifier = ClassifierConfig(num_classes=classes, pooling=config.pooling, classes=names)
    run = plan_run(
        config,
        encoder.config,
        mean_std=(description.mean, description.std) if description else None,
        finetune=FinetuneStart(encoder=encoder.config, classifier=classifier, parent=parent),
    )
    return _with_weights(run, encoder)


def check_augmentation(config: FinetuneConfig, kind: Kind, channels: int) -> None:
    """Raise UserError if RandAugment is set for samples that are not images."""
    if config.augment.randaugment and (kind == "grid" or channels not in (1, 3)):
        raise UserError(f"RandAugment is for images, and {config.data.train} holds grids; set augment.randaugment 0")


def _startable_record(storage: Storage, config: FinetuneConfig) -> RunRecord | None:
    """The record of the run if it can start or resume without loading its pretrained model again, else None."""
    record = read_record(storage)
    if record is None or record.finetune is None:
        return None
    needs = record.finetune.parent is not None
    stored = not needs or (record.initial_weights is not None and storage.exists(INITIAL_WEIGHTS))
    return record if newest_complete(storage) or (stored and record.config == config) else None


class _Labelled(NamedTuple):
    """The labelled training data."""

    manifest: Manifest
    names: tuple[str, ...] | None
    """Names of the classes, if known."""
    classes: int
    """Number of classes."""


def _labelled(config: FinetuneConfig) -> _Labelled:
    """The training data. Raises UserError if samples have no labels, or the validation data has other classes."""
    if not isinstance(config.data.train, str) and len(config.data.train) > 1:
        raise UserError(
            "data.train has several datasets, each with its own class numbers; pack them into one with "
            "crate-ray prepare"
        )
    train = config.data.train if isinstance(config.data.train, str) else next(iter(config.data.train))
    manifests = {}
    for uri in filter(None, (train, config.data.validation)):
        manifest = manifests[uri] = load_dataset(open_storage(uri, config.s3)).manifest
        if manifest.num_classes is None:
            raise UserError(
                f"not every sample of {uri} has a class (a member `cls` with its number); pack images in class "
                "folders, or shards with labels, with crate-ray prepare"
            )
    found = manifests[train]
    assert found.num_classes is not None
    names = class_names(found)
    classes = found.num_classes if names is None else len(names)
    if classes > found.num_samples and names is None:
        raise UserError(
            f"the class numbers of {train} go up to {classes - 1:,}, and it has {found.num_samples:,} samples; number "
            "the classes 0, 1, 2, … in the members 'cls', and pack or index it again"
        )
    if config.data.validation:
        _check_validation(manifests[config.data.validation], config.data.validation, train, names, classes)
    return _Labelled(found, names, classes)


def _check_validation(held_out: Manifest, uri: str, train: str, names: tuple[str, ...] | None, classes: int) -> None:
    numbers = new_numbers(names, held_out, uri, train)
    assert held_out.num_classes is not None
    needed = held_out.num_classes if numbers is None else int(numbers.max(initial=-1)) + 1
    if needed > classes:
        raise UserError(f"{uri} has {needed} classes, {train} has {classes}; number the classes the same way in both")
    own = class_names(held_out)
    if names and own and (absent := len(names) - len(own)):
        logger.warning("%s has no samples of %d of the %d classes of %s", uri, absent, classes, train)


def _load_encoder(config: FinetuneConfig, load: Load | None) -> _Encoder:
    if config.model == SCRATCH:
        return _Encoder(config.encoder)
    reference = config.model.removeprefix(f"{SCRATCH}:")
    model, description = load(reference) if load else load_encoder(reference, config.tracking, config.s3)
    if config.image_size is not None:
        model, description = at_image_size(model, description, config.image_size)
    return _Encoder(description.model, description, model if reference == config.model else None)


def _with_weights(run: Run, encoder: _Encoder) -> Run:
    """Store the pretrained encoder with a new head. Random weights are not stored: they follow from the seed."""
    if encoder.pretrained is None:
        return run
    model = new_classifier(run.record, run.config.seed)
    model.load_encoder(encoder.pretrained.float())
    digest = write_initial_weights(run.storage, model.state_dict())
    record = run.record.model_copy(update={"initial_weights": digest})
    write_record(run.storage, record)
    return replace(run, record=record)
